"""Groups the answers to a question by meaning.

The greedy clustering of semantic entropy (Kuhn et al. 2023, arXiv 2302.09664; Farquhar et al. 2024, doi
10.1038/s41586-024-07421-0), which fixes the order in which an equivalence is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ka2l.answers.equivalence import Equivalence
from ka2l.answers.normalise import surface_key


class ClusterResult(NamedTuple):
    """Answers grouped by meaning."""

    ids: list[list[int]]
    """Cluster of every answer, one list a question; ids count from 0 in order of first appearance."""
    num_pairs_asked: int
    """Pairs (answer, representative) that the equivalence was asked."""
    num_pairs_full: int
    """Pairs of every answer, duplicates too, with every representative before it: what the loop of the public code
    for semantic entropy compares, which asks a representative about all later answers."""


def cluster_answers(
    questions: Sequence[str], answers: Sequence[Sequence[str]], equivalence: Equivalence
) -> ClusterResult:
    """Greedy clustering: an answer joins the first cluster whose representative it is equivalent to, else opens one.

    Args:
        questions: one text a question.
        answers: each question's sampled answers.
        equivalence: decides the pairs; ``left`` is the answer, ``right`` the representative, a cluster's first answer.

    Answers of one question with the same :func:`~ka2l.answers.normalise.surface_key` are one answer, and the first
    spelling stands for all; an empty answer is equivalent to empty ones only. Under that reading the result is the
    plain greedy algorithm's. It is asked column by column: the first answer without a cluster opens one, and all others
    without a cluster are compared with it. So an answer meets the representatives in their order and no further than
    the first that takes it, and pairs of all questions are asked together, in as many calls as a question has clusters.
    Pairs whose marks tell them apart are not asked.
    """
    keys = [[surface_key(answer) for answer in row] for row in answers]
    first_spellings: list[dict[str, str]] = [{} for _ in answers]
    for row, row_keys, spellings in zip(answers, keys, first_spellings, strict=True):
        for answer, key in zip(row, row_keys, strict=True):
            spellings.setdefault(key, answer)

    leaders: list[dict[str, str]] = [{"": ""} for _ in answers]
    waiting = [[key for key in spellings if key] for spellings in first_spellings]
    may_match = _shared_marks(first_spellings, equivalence)
    num_asked = 0
    while any(waiting):
        pairs = [(q, key, row[0]) for q, row in enumerate(waiting) for key in row[1:] if may_match(q, key, row[0])]
        for known, row in zip(leaders, waiting, strict=True):
            known.update({key: key for key in row[:1]})
        if pairs:
            verdicts = equivalence.equivalent(
                [questions[q] for q, _, _ in pairs],
                [first_spellings[q][key] for q, key, _ in pairs],
                [first_spellings[q][leader] for q, _, leader in pairs],
            )
            num_asked += len(pairs)
            for (q, key, leader), same in zip(pairs, verdicts, strict=True):
                if same:
                    leaders[q][key] = leader
        waiting = [[k for k in row if k not in known] for known, row in zip(leaders, waiting, strict=True)]

    ids = [_numbered([known[key] for key in row]) for known, row in zip(leaders, keys, strict=True)]
    # Clusters are numbered as they open, so the representatives before an answer are the largest id so far plus one.
    num_full = sum(largest + 1 for row in ids for largest in accumulate(row[:-1], max))
    return ClusterResult(ids, num_asked, num_full)


def _shared_marks(spellings: Sequence[dict[str, str]], equivalence: Equivalence) -> Callable[[int, str, str], bool]:
    """Whether two of a question's answers may be the same, by the equivalence's marks where it has them."""
    marks_of: Callable[[str], frozenset[Any]] | None = getattr(equivalence, "marks", None)
    if marks_of is None:
        return lambda q, a, b: True
    marks = [{key: marks_of(answer) for key, answer in row.items()} for row in spellings]
    return lambda q, a, b: not marks[q][a].isdisjoint(marks[q][b])


def _numbered(names: Sequence[str]) -> list[int]:
    """Each name's number in order of first appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
