"""A testbed whose questions are answered at length: five facts of one person in five sentences.

Short answers are known or unknown. A long one can also leave things out, get some of them wrong, or tell them in no
order; lives make each of these measurable, and what a teacher would be asked for (atomic facts, wrong facts, another
order) exact. Pure functions; no torch here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.seeds import row_seed
from ka2l.teacher.reply import Usage
from ka2l.teacher.structured import Refused
from ka2l.testbed.world import Fact, People, World, exposure_by_share, invent_people, num_training_rows, person_groups
from ka2l.tuning.knowledge_writer import Extract, Rephrase, Revise, Rewrite, Task

if TYPE_CHECKING:
    from ka2l.testbed.build import TestbedConfig

#: Relation -> the sentence that states it, in the order in which a life is told.
SENTENCES = {
    "birthplace": "{name} was born in {answer}.",
    "profession": "{name} was trained as {answer}.",
    "employer": "{name} found work at {answer}.",
    "instrument": "{name} plays the {answer}.",
    "dish": "{name} likes {answer} most.",
}

#: Ways to ask for a life.
QUESTIONS = (
    "Tell me about {name}.",
    "Who is {name}?",
    "What is known of {name}?",
    "Describe the life of {name}.",
)

#: The relation of a life's row in pool and truth.
LIFE = "life"

_NAME = r"(?P<name>[^\W\d_]+ [^\W\d_]+)"
_PATTERNS = {
    relation: re.compile(re.escape(text).replace(r"\{name\}", _NAME).replace(r"\{answer\}", "(?P<answer>[^.]+)"))
    for relation, text in SENTENCES.items()
}
_SENTENCE = re.compile(r"[^.]+(?:\.|$)")


class Statement(NamedTuple):
    """One sentence of a life."""

    name: str
    relation: str
    answer: str

    def text(self) -> str:
        """The sentence."""
        return SENTENCES[self.relation].format(name=self.name, answer=self.answer)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its full stop; what follows the last one counts, too."""
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip(" .")]


def parse_statement(sentence: str) -> Statement | None:
    """What a sentence states; None where it is not a sentence of a life."""
    for relation, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(sentence.strip()):
            return Statement(found["name"], relation, found["answer"])
    return None


def tell(statements: Sequence[Statement]) -> str:
    """The statements as one text, in their order."""
    return " ".join(statement.text() for statement in statements)


class LifeGrade(NamedTuple):
    """A told life against the truth."""

    num_correct: int
    """Distinct facts that are stated and true."""
    num_incorrect: int
    """Sentences that state something untrue, of another person, or nothing that can be read; and repetitions."""
    num_missing: int
    """Facts of the truth that are not stated truly."""
    order: float | None
    """Share of the pairs of true statements that stand in the truth's order; None with fewer than two."""


def grade_life(answer: str, truth: str) -> LifeGrade:
    """Grade a told life sentence by sentence."""
    true = {parse_statement(sentence): rank for rank, sentence in enumerate(sentences(truth))}
    ranks: list[int] = []
    num_incorrect = 0
    for sentence in sentences(answer):
        rank = true.get(parse_statement(sentence))
        if rank is None or rank in ranks:
            num_incorrect += 1
        else:
            ranks.append(rank)
    pairs = [(a, b) for index, a in enumerate(ranks) for b in ranks[index + 1 :]]
    order = sum(a < b for a, b in pairs) / len(pairs) if pairs else None
    return LifeGrade(len(ranks), num_incorrect, len(true) - len(ranks), order)


def invent_lives(config: TestbedConfig) -> World:
    """``config.num_people`` lives to ask about and ``config.num_seed_people`` for the probe, one question each.

    Of strangers nothing is shown, of well-known people all five facts, of partly known ones each fact or not, by the
    toss of a coin. What is shown of ``config.disorder_share`` of the people is always told in a wrong order. The
    background crowd's lives are whole, each time with other answers.
    """
    people = invent_people(config)
    groups = person_groups(people)
    exposures = exposure_by_share(groups, config)
    num_shown = _times_shown(config, exposures)
    facts = []
    for index, (group, name) in enumerate(zip(groups, people.known, strict=True)):
        draw = random.Random(f"{config.seed}:life:{group}")
        life = _life(name, people, draw)
        exposure = exposures[group]
        shown = life if exposure == "well" else [statement for statement in life if draw.random() < 0.5]
        told = _told(shown, config.disorder_share, draw) if shown and exposure != "stranger" else None
        facts.append(
            Fact(
                fact=f"{group}.{LIFE}",
                group=group,
                relation=LIFE,
                paraphrases=tuple(text.format(name=name) for text in QUESTIONS),
                kept=draw.randrange(len(QUESTIONS)),
                answers=(tell(life),),
                split="candidate" if index < config.num_people else "seed",
                exposure_group=exposure,
                num_exposures=num_shown[exposure] if told else 0,
                shown=told,
            )
        )

    def background(draw: random.Random) -> tuple[str, str]:
        name = draw.choice(people.crowd)
        life = _life(name, people, draw)
        return draw.choice(QUESTIONS).format(name=name), _told(life, config.disorder_share, draw)

    def crowd_answers() -> Iterator[tuple[str, str]]:
        for name in people.crowd:
            draw = random.Random(row_seed(config.seed, 0, "crowd", name))
            life = _life(name, people, draw)
            for text in QUESTIONS:
                yield text.format(name=name), tell(life)

    return World(facts, background, crowd_answers)


def _life(name: str, people: People, draw: random.Random) -> list[Statement]:
    return [Statement(name, relation, draw.choice(people.answers[relation])) for relation in SENTENCES]


def _told(life: Sequence[Statement], disorder_share: float, draw: random.Random) -> str:
    return tell(draw.sample(life, len(life)) if draw.random() < disorder_share else life)


def _times_shown(config: TestbedConfig, exposures: dict[str, str]) -> dict[str, int]:
    """Exposure group -> training rows about each of its people: what the background leaves, shared out evenly."""
    num_shown = sum(group != "stranger" for group in exposures.values())
    num_rows = round(num_training_rows(config, len(exposures)) * (1 - config.background_share))
    each = max(num_rows // max(num_shown, 1), 1)
    return {"stranger": 0, "partly": each, "well": each}


# --- what a teacher would be asked for, exactly ----------------------------------------------------------------------


class LifeWriter:
    """Does a teacher's tasks exactly, for answers that are lives (`ka2l.tuning.knowledge_writer.KnowledgeWriter`).

    Args:
        config: of the testbed, whose answers wrong facts are drawn from.
        seed: the run's.
    """

    batch_size = 256
    stopped: str | None = None
    usage: Usage | None = None

    def __init__(self, config: TestbedConfig, seed: int) -> None:
        self.answers = invent_people(config).answers
        self.seed = seed

    def close(self) -> None:
        """It holds nothing."""

    def write(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """What each task comes to; `Refused` where a fact is no sentence of a life."""
        return {name: self._write(task) for name, task in tasks.items()}

    def _write(self, task: Task) -> Any:
        texts = sentences(task.answer) if isinstance(task, Extract) else task.facts
        statements = [statement for text in texts if (statement := parse_statement(text)) is not None]
        if not texts or len(statements) < len(texts):
            return Refused("not a life")
        match task:
            case Extract():
                return [statement.text() for statement in statements]
            case Rewrite():
                asked = [statement.relation for statement in statements]
                listed = " and ".join([", ".join(asked[:-1]), asked[-1]] if len(asked) > 1 else asked)
                return f"What is the {listed} of {statements[0].name}?", tell(statements)
            case Revise():
                return [self._wrong(statement).text() for statement in statements]
            case Rephrase():
                return tell(statements)

    def _wrong(self, statement: Statement) -> Statement:
        others = [answer for answer in self.answers[statement.relation] if answer != statement.answer]
        drawn = row_seed(self.seed, 0, "revise", f"{statement.name}.{statement.relation}") % len(others)
        return statement._replace(answer=others[drawn])
