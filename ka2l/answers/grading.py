"""Grades an answer: compares it with the accepted answers, by an equivalence where text alone does not decide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ka2l.answers.equivalence import Equivalence
from ka2l.answers.normalise import surface_key
from ka2l.evaluation.statistics import exact_match, token_f1


class Grade(NamedTuple):
    """One answer against its references."""

    correct: bool
    """Equivalent to a reference, an exact match, or a list of several references and nothing else."""
    exact_match: bool
    """The normalised text equals a reference's."""
    token_f1: float
    """Best token F1 against a reference, 0 to 1."""


def grade_answers(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]], equivalence: Equivalence
) -> list[Grade]:
    """Grades one answer a question against its accepted answers; an empty answer is never correct.

    Args:
        questions: one text a question.
        answers: one answer a question.
        references: the accepted answers of each question; with none, no answer is correct.
        equivalence: asked only where text alone does not decide; ``left`` is the answer, ``right`` the reference.
    """
    rows = list(zip(questions, answers, references, strict=True))
    exact = [exact_match(answer, accepted) for _, answer, accepted in rows]
    correct = [same or _lists(answer, accepted) for same, (_, answer, accepted) in zip(exact, rows, strict=True)]
    pairs = [
        (i, question, answer, reference)
        for i, (question, answer, accepted) in enumerate(rows)
        if not correct[i] and surface_key(answer)
        for reference in dict.fromkeys(accepted)
        if surface_key(reference)
    ]
    if pairs:
        owners, *columns = zip(*pairs, strict=True)
        for owner, same in zip(owners, equivalence.equivalent(*columns), strict=True):
            correct[owner] = correct[owner] or same
    return [Grade(correct[i], exact[i], token_f1(answer, accepted)) for i, (_, answer, accepted) in enumerate(rows)]


def _lists(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is several accepted answers and nothing else: ``Joaquin Phoenix and Reese Witherspoon``."""
    parts = re.split(r"[,;&]|\band\b", answer)
    return len(parts) > 1 and all(exact_match(part, accepted) for part in parts)
