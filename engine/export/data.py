"""Writes a run's annotated answers in the formats of other trainers. Reads committed tables only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pyarrow.compute as pc

from engine.execution.campaign import Campaign
from engine.stages.tables import among
from ka2l.prompts import EXAMPLES, PromptConfig, chat_messages, plain_prompt
from ka2l.tuning.sft import completion

Format = Literal["alpaca", "sharegpt", "prompt_completion", "preference"]
FORMATS: tuple[Format, ...] = get_args(Format)
#: Where each format lies in an export.
FILES: Mapping[Format, str] = {
    "alpaca": "data/alpaca.json",
    "sharegpt": "data/sharegpt.json",
    "prompt_completion": "data/prompt_completion.jsonl",
    "preference": "data/preference.jsonl",
}
#: Parts besides those of `ka2l.tuning.knowtuning`: an answer as it was annotated; a comparison with the base model's
#: own.
ANNOTATED, OWN_ANSWER = "annotated", "own_answer"


class Example(NamedTuple):
    """A question with an answer to learn, and where they come from."""

    question: str
    answer: str
    rejected: str | None
    """A worse answer; None where nothing is compared."""
    question_id: str
    part: str
    """ANNOTATED or OWN_ANSWER, or of KnowTuning's pairs what it says there (schemas.PAIRS)."""
    annotator: str
    """Who answered the annotated question."""
    round: int

    def provenance(self) -> dict[str, Any]:
        """What every row of every format says of itself."""
        return {key: getattr(self, key) for key in ("question_id", "part", "annotator", "round")}


class AnnotatedSet(NamedTuple):
    """All that the annotators of a run's rounds gave."""

    answers: list[Example]
    """To learn: annotated answers, and with KnowTuning the questions for their hardest facts."""
    preferences: list[Example]
    """Comparisons of two answers."""

    def of(self, name: Format) -> list[Example]:
        """What a format is made from."""
        return self.preferences if name == "preference" else self.answers


class Asked(NamedTuple):
    """How the run put a question to its model."""

    config: PromptConfig
    chat: bool
    """By the tokenizer's chat template."""

    def prompt(self, question: str) -> str | list[dict[str, str]]:
        """TRL's prompt: text, or for a chat model the messages that its template renders."""
        shots = EXAMPLES[: self.config.num_shots]
        make: Any = chat_messages if self.chat else plain_prompt
        made: str | list[dict[str, str]] = make(question, self.config.instruction, shots)
        return made

    def answer(self, answer: str) -> str | list[dict[str, str]]:
        """TRL's completion to such a prompt."""
        text = completion(answer, self.chat)
        return [{"role": "assistant", "content": text}] if self.chat else text


def annotated_set(campaign: Campaign, last_round: int) -> AnnotatedSet:
    """What was annotated up to a round, in the order of rounds and question ids."""
    answers: list[Example] = []
    comparisons: list[Example] = []
    accepted: dict[str, list[str]] = {}
    for index in range(last_round + 1):
        table = campaign.stage("annotate", index).table(["question_id", "question", "answers", "annotator"])
        rows = table.sort_by("question_id").to_pylist()
        of_round = {
            row["question_id"]: Example(
                row["question"], row["answers"][0].strip(), None, row["question_id"], ANNOTATED, row["annotator"], index
            )
            for row in rows
        }
        accepted |= {row["question_id"]: row["answers"] for row in rows}
        answers += of_round.values()
        if campaign.config.tuning.augments:
            for pair in _pairs(campaign, index, of_round):
                (answers if pair.rejected is None else comparisons).append(pair)
    if not campaign.config.tuning.compares:
        comparisons = _own_wrong_answers(campaign, last_round, answers, accepted)
    return AnnotatedSet(answers, comparisons)


def _pairs(campaign: Campaign, index: int, annotated: Mapping[str, Example]) -> Iterable[Example]:
    """What KnowTuning has made of a round's answers."""
    table = campaign.stage("augment", index).table()
    for row in table.sort_by([("question_id", "ascending"), ("part", "ascending")]).to_pylist():
        yield annotated[row["question_id"]]._replace(
            question=row["question"], answer=row["better"], rejected=row["worse"], part=row["part"]
        )


def _own_wrong_answers(
    campaign: Campaign, last_round: int, answers: Sequence[Example], accepted: Mapping[str, list[str]]
) -> list[Example]:
    """The annotated answer against what the base model mostly said itself, where that was graded wrong: the stage
    ``feedback`` holds it, for questions that were sampled for rehearsal."""
    graded = campaign.stage("feedback", last_round + 1)
    if graded.manifest() is None or not graded.shard_names():
        return []
    wrong = graded.table(["question_id", "top_answer"], among(accepted) & (pc.field("correct") == False))  # noqa: E712
    own = dict(zip(wrong["question_id"].to_pylist(), wrong["top_answer"].to_pylist(), strict=True))
    return [
        example._replace(rejected=said, part=OWN_ANSWER)
        for example in answers
        if example.part == ANNOTATED
        and (said := (own.get(example.question_id) or "").strip())
        and said not in accepted[example.question_id]
    ]


def write_format(path: Path, name: Format, examples: Sequence[Example], asked: Asked) -> int:
    """Write one file; returns its number of rows."""
    rows = [_row(name, example, asked) | example.provenance() for example in examples]
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return len(rows)


def _row(name: Format, example: Example, asked: Asked) -> dict[str, Any]:
    instruction = asked.config.instruction
    match name:
        case "alpaca":
            # Without an instruction of the run's own, the question is what the model is told to do.
            told, given = (instruction, example.question) if instruction else (example.question, "")
            return {"instruction": told, "input": given, "output": example.answer}
        case "sharegpt":
            said = f"{instruction}\n\n{example.question}" if instruction else example.question
            turns = [{"from": "human", "value": said}, {"from": "gpt", "value": example.answer}]
            return {"conversations": turns}
        case "prompt_completion":
            return {"prompt": asked.prompt(example.question), "completion": asked.answer(example.answer)}
        case "preference":
            assert example.rejected is not None
            return {
                "prompt": asked.prompt(example.question),
                "chosen": asked.answer(example.answer),
                "rejected": asked.answer(example.rejected),
            }


def why_no_preferences(campaign: Campaign) -> str:
    """Why a run has no comparisons to give, in a sentence."""
    if campaign.config.tuning.compares:
        return "KnowTuning made no comparison of this run's answers."
    if campaign.config.tuning.rehearsal == 0:
        return "There are no wrong answers to compare with: the run did not sample its model (tuning.rehearsal is 0)."
    return (
        "There are no wrong answers to compare with: none of the model's own to annotated questions was graded wrong."
    )
