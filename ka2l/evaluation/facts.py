"""Counts the facts of long answers that are right, wrong and missing, and compares two answers by them.

Who counts them is another matter: the testbed's truth (here) or a judge (`ka2l.evaluation.judge`). The figures are
those of KnowTuning's Tables 2 and 3 (Lyu et al. 2024, arXiv 2402.11176), with intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ka2l.evaluation.statistics import mean_with_ci, ratio_with_ci
from ka2l.testbed.lives import grade_life, parse_statement, sentences
from ka2l.tuning.knowtuning import ASPECTS, Aspect


class FactCounts(NamedTuple):
    """One answer against its reference, fact by fact."""

    num_correct: int
    """Distinct facts of the reference that the answer states."""
    num_incorrect: int
    """Facts that the answer states and the reference does not."""
    num_missing: int
    """Facts of the reference that the answer does not state."""
    order: float | None
    """Share of the pairs of correct facts that stand in the reference's order; None with fewer than two."""

    @property
    def share_correct(self) -> float | None:
        """Of the facts stated; None where none is."""
        stated = self.num_correct + self.num_incorrect
        return self.num_correct / stated if stated else None


def counts_by_match(matches: Sequence[int | None], num_reference: int) -> FactCounts:
    """Counts of an answer by what its facts state.

    Args:
        matches: for each fact of the answer, in order, the position of the reference's fact that it states, or None.
            Several that state the same fact count once, where the first of them stands.
        num_reference: facts of the reference.
    """
    ranks = list(dict.fromkeys(match for match in matches if match is not None))
    pairs = [(a, b) for index, a in enumerate(ranks) for b in ranks[index + 1 :]]
    order = sum(a < b for a, b in pairs) / len(pairs) if pairs else None
    return FactCounts(len(ranks), list(matches).count(None), num_reference - len(ranks), order)


def counts_by_testbed(answer: str, truth: str) -> FactCounts | None:
    """Counts of a told life, exactly; repetitions are incorrect. None where the truth is no life of the testbed."""
    told = sentences(truth)
    if not told or any(parse_statement(sentence) is None for sentence in told):
        return None
    return FactCounts(*grade_life(answer, truth))


def counts_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, FactCounts]:
    """Counts by question of rows of schemas.EVALUATED; rows without counts are left out."""
    return {
        row["question_id"]: FactCounts(*(row[name] for name in FactCounts._fields))
        for row in rows
        if row["num_correct"] is not None
    }


def fact_metrics(counts: Sequence[FactCounts], seed: int) -> dict[str, Any]:
    """Figures over answers; an estimate is ``[value, low, high]`` with a 95 % bootstrap interval over answers.

    Returns:
        ``num_answers``; ``correct``, ``incorrect``, ``missing``: facts an answer, mean; ``share_correct``: of all facts
        stated; ``completeness``: of all facts of the references; ``order``: mean over answers that have one. An
        estimate of nothing is None.
    """
    correct = [entry.num_correct for entry in counts]
    incorrect = [entry.num_incorrect for entry in counts]
    missing = [entry.num_missing for entry in counts]
    stated = [a + b for a, b in zip(correct, incorrect, strict=True)]
    expected = [a + b for a, b in zip(correct, missing, strict=True)]
    orders = [entry.order for entry in counts if entry.order is not None]
    estimates = {
        "correct": mean_with_ci(correct, seed),
        "incorrect": mean_with_ci(incorrect, seed),
        "missing": mean_with_ci(missing, seed),
        "share_correct": ratio_with_ci(correct, stated, seed),
        "completeness": ratio_with_ci(correct, expected, seed),
        "order": mean_with_ci(orders, seed),
    }
    return {"num_answers": len(counts)} | {
        name: None if estimate.value != estimate.value else list(estimate) for name, estimate in estimates.items()
    }


def compare_facts(left: FactCounts, right: FactCounts) -> dict[Aspect, int | None]:
    """Which of two answers to one question is better: 1 the left one, -1 the right one, 0 neither.

    Completeness: more correct facts. Factuality: a larger share of the stated facts correct; None where either answer
    states nothing. Logicality: more pairs in order; None where either has fewer than two correct facts.
    """
    return {
        "completeness": _sign(left.num_correct, right.num_correct),
        "factuality": _sign(left.share_correct, right.share_correct),
        "logicality": _sign(left.order, right.order),
    }


def _sign(left: float | None, right: float | None) -> int | None:
    return None if left is None or right is None else (left > right) - (left < right)


def win_rates(outcomes: Sequence[Mapping[Aspect, int | None]], seed: int) -> dict[str, Any]:
    """For each aspect over pairs: ``num_pairs``, shares ``win``, ``tie``, ``lose``, and ``net``, wins less losses, as
    ``[value, low, high]`` with a 95 % bootstrap interval over pairs. Aspects without an outcome are left out."""
    rates: dict[str, Any] = {}
    for aspect in ASPECTS:
        found = [outcome for entry in outcomes if (outcome := entry.get(aspect)) is not None]
        if found:
            shares = {name: found.count(value) / len(found) for name, value in (("win", 1), ("tie", 0), ("lose", -1))}
            rates[aspect] = {"num_pairs": len(found)} | shares | {"net": list(mean_with_ci(found, seed))}
    return rates
