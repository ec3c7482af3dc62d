"""A language model judges long answers: which of their facts a reference states, and which of two answers is better.

Counting follows FActScore (Min et al. 2023, arXiv 2305.14251) and KnowTuning: take answer and reference apart, then
match fact by fact, against the reference alone. What an answer rightly says beyond its reference therefore counts as
incorrect. Pairs are judged twice with the answers' positions swapped (Zheng et al. 2023, arXiv 2306.05685).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ka2l.evaluation.facts import FactCounts, counts_by_match
from ka2l.prompts import compare_messages, match_messages, stated_facts_messages
from ka2l.teacher.request import TeacherPrompt
from ka2l.teacher.structured import Refused, TeacherClient
from ka2l.tuning.knowtuning import ASPECTS, Aspect

Preferred = Literal["first", "second", "tie"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StatedFacts(_Reply):
    """The atomic facts of an answer; none where it states nothing."""

    facts: list[str]


class MatchedFacts(_Reply):
    """For each fact of an answer the number of the reference's fact that states the same, from 1, or 0."""

    numbers: list[int]


class Preferences(_Reply):
    """The better of two answers in each aspect."""

    completeness: Preferred
    factuality: Preferred
    logicality: Preferred


class JudgedAnswer(NamedTuple):
    """An answer to count the facts of."""

    question: str
    answer: str
    reference: str


class JudgedPair(NamedTuple):
    """Two answers to compare."""

    question: str
    reference: str
    left: str
    right: str


class Comparison(NamedTuple):
    """What a judge said of a pair in both positions."""

    outcomes: dict[Aspect, int]
    """1 where both times the left answer was preferred, -1 the right one, 0 otherwise."""
    agreed: dict[Aspect, bool]
    """Whether both times the verdict was the same: how far the judge goes by position."""


class AnswerJudge(TeacherClient):
    """Puts answers to a teacher.

    Prompt ids begin with the ids that are given: a text that was asked under another id is not paid for again.
    """

    def count(self, answers: Mapping[str, JudgedAnswer]) -> dict[str, FactCounts | Refused]:
        """Counts of each answer, or why there are none. Answers that were not judged to the end are left out.

        Raises:
            KA2LError: as ``ask`` does; replies received until then are in its journal.
        """
        prompts = {
            f"{name}/{part}": TeacherPrompt(stated_facts_messages(entry.question, text), StatedFacts)
            for name, entry in answers.items()
            for part, text in (("answer", entry.answer), ("reference", entry.reference))
            if text.strip()
        }
        stated = self.replies(prompts)
        facts: dict[str, tuple[list[str], list[str]]] = {}
        made: dict[str, FactCounts | Refused] = {}
        for name, entry in answers.items():
            said = _facts(stated.get(f"{name}/answer")) if entry.answer.strip() else []
            expected = _facts(stated.get(f"{name}/reference")) if entry.reference.strip() else []
            if said is None or expected is None:
                continue
            if isinstance(said, Refused) or isinstance(expected, Refused):
                made[name] = said if isinstance(said, Refused) else expected  # type: ignore[assignment]
            elif not expected:
                made[name] = Refused("no facts in the reference")
            elif not said:
                made[name] = FactCounts(0, 0, len(expected), None)
            else:
                facts[name] = (said, expected)
        matched = self.replies(
            {
                f"{name}/match": TeacherPrompt(match_messages(answers[name].question, said, expected), MatchedFacts)
                for name, (said, expected) in facts.items()
            }
        )
        for name, (said, expected) in facts.items():
            reply = matched.get(f"{name}/match")
            if reply is not None:
                made[name] = reply if isinstance(reply, Refused) else _counted(reply.numbers, said, expected)
        return made

    def compare(self, pairs: Mapping[str, JudgedPair]) -> dict[str, Comparison | Refused]:
        """Both verdicts on each pair, or why there are none. Pairs that were not judged to the end are left out.

        Raises:
            KA2LError: as ``ask`` does; replies received until then are in its journal.
        """
        prompts: dict[str, TeacherPrompt] = {}
        for name, pair in pairs.items():
            for place, first, second in (("left_first", pair.left, pair.right), ("right_first", pair.right, pair.left)):
                messages = compare_messages(pair.question, pair.reference, first, second)
                prompts[f"{name}/{place}"] = TeacherPrompt(messages, Preferences)
        replies = self.replies(prompts)
        made: dict[str, Comparison | Refused] = {}
        for name in pairs:
            straight, swapped = replies.get(f"{name}/left_first"), replies.get(f"{name}/right_first")
            if straight is None or swapped is None:
                continue
            refused = [reply for reply in (straight, swapped) if isinstance(reply, Refused)]
            made[name] = refused[0] if refused else _both(straight, swapped)
        return made


def _facts(reply: Any) -> list[str] | Refused | None:
    if reply is None or isinstance(reply, Refused):
        return reply
    return list(dict.fromkeys(fact.strip() for fact in reply.facts if fact.strip()))


def _counted(numbers: list[int], said: list[str], expected: list[str]) -> FactCounts | Refused:
    if len(numbers) != len(said) or not all(0 <= number <= len(expected) for number in numbers):
        return Refused(f"{len(numbers)} numbers for {len(said)} facts, or one that no fact has")
    return counts_by_match([number - 1 if number else None for number in numbers], len(expected))


def _both(straight: Preferences, swapped: Preferences) -> Comparison:
    value = {"first": 1, "second": -1, "tie": 0}
    outcomes: dict[Aspect, int] = {}
    agreed: dict[Aspect, bool] = {}
    for aspect in ASPECTS:
        one, other = value[getattr(straight, aspect)], -value[getattr(swapped, aspect)]
        outcomes[aspect], agreed[aspect] = (one if one == other else 0), one == other
    return Comparison(outcomes, agreed)
