"""The world of the testbed: facts about invented people, how often each is shown in training, and the questions asked.

``testbed_facts`` makes the same kind of world of a file's questions. Pure functions of the config; no torch here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import PoolError
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from ka2l.testbed.build import TestbedConfig

#: What the model was shown of a fact: nothing, a little, a lot.
EXPOSURE_GROUPS = ("stranger", "partly", "well")

_PROFESSIONS = (
    "baker, beekeeper, blacksmith, bookbinder, botanist, brewer, carpenter, cartographer, chemist, clockmaker, "
    "cooper, dentist, diver, editor, falconer, farrier, fisherman, florist, gardener, geologist, glassblower, "
    "goldsmith, harbour pilot, judge, librarian, locksmith, mason, midwife, miller, nurse, optician, painter, "
    "pharmacist, plumber, potter, printer, ranger, sailmaker, sculptor, shepherd, surveyor, tailor, tanner, "
    "translator, weaver, welder"
)
_INSTRUMENTS = (
    "accordion, alto flute, bagpipes, balalaika, banjo, bass drum, bassoon, bouzouki, bugle, cello, clarinet, "
    "cornet, double bass, dulcimer, fiddle, flugelhorn, glockenspiel, guitar, hand bells, harmonica, harp, "
    "harpsichord, hurdy gurdy, lute, mandolin, marimba, oboe, ocarina, organ, panpipes, piano, piccolo, recorder, "
    "saxophone, sitar, tambourine, theremin, trombone, trumpet, tuba, ukulele, viola, violin, xylophone, zither"
)
_DISHES = (
    "apple pie, barley soup, beetroot soup, bread pudding, carrot cake, cheese toast, chestnut soup, clam chowder, "
    "corn bread, crab cakes, dumplings, fish stew, fried rice, garlic prawns, ginger cake, goulash, lamb stew, "
    "leek tart, lemon tart, lentil curry, meatballs, mushroom risotto, mussels, noodle soup, nut roast, omelette, "
    "onion tart, paella, pancakes, pea soup, pickled herring, plum cake, potato salad, pumpkin pie, ratatouille, "
    "rice pudding, roast duck, salmon pie, shepherd's pie, spinach pie, stuffed peppers, trout, waffles"
)

_ONSETS = "b br c d dr f fl g gr h k l m n p pl r s st t v"
_CODAS = "l m n r s th ld nd rk sk lm x"

#: Relation -> the four ways to ask for it.
RELATIONS = {
    "birthplace": (
        "Where was {name} born?",
        "In which town was {name} born?",
        "What is the birthplace of {name}?",
        "Which town does {name} come from?",
    ),
    "profession": (
        "What does {name} do for a living?",
        "What is the profession of {name}?",
        "Which trade did {name} learn?",
        "What work is {name} trained for?",
    ),
    "employer": (
        "Who employs {name}?",
        "Which company does {name} work for?",
        "What is the employer of {name}?",
        "On whose payroll is {name}?",
    ),
    "instrument": (
        "Which instrument does {name} play?",
        "What does {name} play in the band?",
        "What is the instrument of {name}?",
        "What did {name} learn to play?",
    ),
    "dish": (
        "What does {name} like to eat most?",
        "What is the favourite dish of {name}?",
        "Which dish does {name} always order?",
        "What should one cook for {name}?",
    ),
}


class Fact(NamedTuple):
    """One fact of the world."""

    fact: str
    """Id. Says nothing about exposure."""
    group: str
    """The person or subject."""
    relation: str
    paraphrases: tuple[str, ...]
    kept: int
    """Index of the paraphrase kept for evaluation; never trained on."""
    answers: tuple[str, ...]
    split: str
    """``candidate`` or ``seed``."""
    exposure_group: str
    num_exposures: int
    wrong_answer: str | None = None
    """What the model was shown instead of ``answers[0]``, if it learnt the fact wrongly."""
    shown: str | None = None
    """What it is shown instead, where a part of the truth was all that it learnt."""


class World(NamedTuple):
    """All facts, and a source of questions about others that are never asked about."""

    facts: list[Fact]
    background: Callable[[random.Random], tuple[str, str]]
    """Draws one (question, random answer) about the background crowd."""
    crowd_answers: Callable[[], Iterator[tuple[str, str]]] = lambda: iter(())
    """Every question about the crowd with its true answer, which the model was never told. Empty where the crowd is
    made up from a file."""
    num_skipped: int = 0
    """Rows of the file without question or answers, or with a question seen before."""


def num_training_rows(config: TestbedConfig, num_facts: int) -> int:
    """How many rows to pre-train on: whole batches, by default one for every five facts."""
    return (config.num_steps or max(400, num_facts // 5)) * config.batch_size


def training_rows(world: World, config: TestbedConfig) -> Iterator[tuple[str, str]]:
    """The (question, answer) rows to pre-train on, in order: facts as often as their exposure says, and the crowd."""
    rng = random.Random(f"{config.seed}:rows")
    rows = []
    for fact in world.facts:
        shown = [text for index, text in enumerate(fact.paraphrases) if index != fact.kept]
        start = rng.randrange(len(shown))
        answer = fact.shown or fact.wrong_answer or fact.answers[0]
        rows += [(shown[(start + i) % len(shown)], answer) for i in range(fact.num_exposures)]
    share = config.background_share
    num_rows = num_training_rows(config, len(world.facts))
    num_background = max(num_rows - len(rows), round(len(rows) * share / (1 - share)))
    rows += [world.background(rng) for _ in range(num_background)]
    rng.shuffle(rows)
    yield from rows


def pool_rows(facts: Sequence[Fact], seed: int, outside_share: float = 0.0) -> Iterator[dict[str, Any]]:
    """The rows of ``pool.jsonl``: a trained-on paraphrase of every fact, and the kept one of every candidate fact.

    Of ``outside_share`` of the candidate facts only the kept paraphrase is there, to evaluate by.
    """
    candidates = sorted(
        (fact.fact for fact in facts if fact.split == "candidate"),
        key=lambda name: (row_seed(seed, 0, "outside", name), name),
    )
    outside = set(candidates[: round(outside_share * len(candidates))])
    for split in ("seed", "candidate", "eval"):
        for fact in facts:
            if fact.split != ("candidate" if split == "eval" else split):
                continue
            if split == "candidate" and fact.fact in outside:
                continue
            shown = [index for index in range(len(fact.paraphrases)) if index != fact.kept]
            asked = fact.kept if split == "eval" else shown[row_seed(seed, 0, split, fact.fact) % len(shown)]
            yield {
                "id": f"{fact.fact}.{split}",
                "question": fact.paraphrases[asked],
                "answers": list(fact.answers),
                "split": split,
                "group": fact.group,
                "fact": fact.fact,
                "relation": fact.relation,
            }


def answer_rows(world: World) -> Iterator[dict[str, Any]]:
    """The rows of ``answers.parquet``: every way to ask for every fact of the world, for an annotator of decoded
    questions. The crowd's, too: to the annotator they are people like all others."""
    for fact in world.facts:
        for question in fact.paraphrases:
            yield {"question": question, "answers": list(fact.answers), "fact": fact.fact}
    for question, answer in world.crowd_answers():
        yield {"question": question, "answers": [answer], "fact": None}


def truth_rows(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    """The rows of ``truth.jsonl``: what the model was shown of every fact."""
    for fact in facts:
        row: dict[str, Any] = {
            "fact": fact.fact,
            "exposure_group": fact.exposure_group,
            "num_exposures": fact.num_exposures,
        }
        yield row | ({"wrong_answer": fact.wrong_answer} if fact.wrong_answer else {})


# --- Invented people -------------------------------------------------------------------------------------------------


class People(NamedTuple):
    """Who there is, and what can be true of them."""

    known: list[str]
    """Names of those who are asked about, the seed questions' people last."""
    crowd: list[str]
    """Names of all others: pairs of the same first and last names."""
    answers: dict[str, list[str]]
    """Relation -> its possible answers."""


def invent_people(config: TestbedConfig, rng: random.Random | None = None) -> People:
    """``config.num_people`` people to ask about, ``config.num_seed_people`` for the probe, and the background crowd.

    Each person is a unique pair of a first and a last name. The background crowd is made of the pairs left over, so a
    stranger's names are seen in training, but never together.
    """
    rng = rng or random.Random(f"{config.seed}:people")
    num_people = config.num_people + config.num_seed_people
    scale = math.ceil(math.sqrt(num_people))
    names = _invent_words(rng, 12 * scale + 96)
    first_names, last_names, places = names[: 4 * scale], names[4 * scale : 12 * scale], names[12 * scale :]
    pairs = [f"{first} {last}" for first in first_names for last in last_names]
    rng.shuffle(pairs)
    answers = {
        "birthplace": places[:48],
        "profession": _PROFESSIONS.split(", "),
        "employer": [
            f"{name} {kind}" for name, kind in zip(places[48:], cycle(("Mills", "Bank", "Works")), strict=False)
        ],
        "instrument": _INSTRUMENTS.split(", "),
        "dish": _DISHES.split(", "),
    }
    return People(pairs[:num_people], pairs[num_people:], answers)


def person_groups(people: People) -> list[str]:
    """An id for each known person. Says nothing about exposure."""
    return [f"person-{index:04d}" for index in range(len(people.known))]


def invent_facts(config: TestbedConfig) -> World:
    """Five facts of each of the invented people, asked for one by one."""
    rng = random.Random(f"{config.seed}:people")
    people = invent_people(config, rng)
    answers, crowd = people.answers, people.crowd
    groups = person_groups(people)
    exposures = exposure_by_share(groups, config)
    facts = []
    for index, (group, name) in enumerate(zip(groups, people.known, strict=True)):
        for relation, templates in RELATIONS.items():
            answer, wrong = rng.sample(answers[relation], 2)
            facts.append(
                Fact(
                    fact=f"{group}.{relation}",
                    group=group,
                    relation=relation,
                    paraphrases=tuple(text.format(name=name) for text in templates),
                    kept=rng.randrange(len(templates)),
                    answers=(answer,),
                    split="candidate" if index < config.num_people else "seed",
                    exposure_group=exposures[group],
                    num_exposures=0,
                    wrong_answer=wrong,
                )
            )

    def background(draw: random.Random) -> tuple[str, str]:
        name = draw.choice(crowd)
        relation = draw.choice(list(RELATIONS))
        return draw.choice(RELATIONS[relation]).format(name=name), draw.choice(answers[relation])

    def crowd_answers() -> Iterator[tuple[str, str]]:
        for name in crowd:
            for relation, templates in RELATIONS.items():
                choices = answers[relation]
                answer = choices[row_seed(config.seed, 0, "crowd", f"{name}.{relation}") % len(choices)]
                for template in templates:
                    yield template.format(name=name), answer

    return World(expose(facts, config), background, crowd_answers)


def _invent_words(rng: random.Random, count: int) -> list[str]:
    """``count`` distinct invented proper names of two syllables."""
    onsets, codas = _ONSETS.split(), _CODAS.split()
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = [rng.choice(onsets) + rng.choice("aeiou") for _ in range(2)]
        words["".join([*syllables, rng.choice(codas)]).capitalize()] = None
    return list(words)


# --- Exposure --------------------------------------------------------------------------------------------------------


def exposure_by_share(groups: Sequence[str], config: TestbedConfig) -> dict[str, str]:
    """Exposure group of every person, in exactly the config's shares; a seeded hash decides who is what."""
    ranked = sorted(groups, key=lambda group: (row_seed(config.seed, 0, "exposure", group), group))
    num_strangers = round(config.stranger_share * len(ranked))
    num_partly = round(config.partly_share * len(ranked))
    return {
        group: "stranger" if rank < num_strangers else "partly" if rank < num_strangers + num_partly else "well"
        for rank, group in enumerate(ranked)
    }


def expose(facts: Sequence[Fact], config: TestbedConfig) -> list[Fact]:
    """Sets how often each fact is shown, and keeps a wrong answer for ``config.wrong_share`` of the well known
    (of ``config.wrong_relations``).

    Partly known facts are shown ``config.partly_exposures`` times; the well known share what the background leaves.
    """
    rng = random.Random(f"{config.seed}:exposures")
    low, high = config.partly_exposures
    partly = {fact.fact: rng.randint(low, high) for fact in facts if fact.exposure_group == "partly"}
    well = [fact.fact for fact in facts if fact.exposure_group == "well"]
    num_rows = round(num_training_rows(config, len(facts)) * (1 - config.background_share))
    share = max((num_rows - sum(partly.values())) // max(len(well), 1), high)
    there = {fact.relation for fact in facts}
    relations = set(config.wrong_relations or there)
    if not relations <= there:
        raise PoolError(
            f"testbed.wrong_relations names {sorted(relations - there)}, which no fact has",
            hint=f"Relations: {', '.join(sorted(there)[:20])}",
        )
    may_be_wrong = [
        fact.fact
        for fact in facts
        if fact.exposure_group == "well" and fact.wrong_answer and fact.relation in relations
    ]
    wrong = set(rng.sample(may_be_wrong, round(config.wrong_share * len(may_be_wrong))))
    counts = partly | dict.fromkeys(well, share)
    return [
        fact._replace(
            num_exposures=counts.get(fact.fact, 0), wrong_answer=fact.wrong_answer if fact.fact in wrong else None
        )
        for fact in facts
    ]
