"""Calibration of confidences, and accuracy when the model abstains below a confidence.

Bins hold equally many questions (adaptive calibration error, Nixon et al. 2019, arXiv 1904.01685), since confidences
crowd at the ends, where bins of equal width would hold nearly all; the abstention curve is the risk-coverage curve of
El-Yaniv and Wiener 2010 (jmlr.org/papers/v11/el-yaniv10a), with accuracy in place of risk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ka2l.evaluation.statistics import auroc, proportion_with_ci
from ka2l.knowledge.calibration import binned

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_BINS = 10
#: Points of an abstention curve that are kept.
_MOST_POINTS = 100


def reliability(
    confidences: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Expected calibration error over bins of equally many rows, and the reliability table.

    Args:
        confidences: stated probabilities of being right, shape (n,).
        correct: whether it was right, shape (n,).
        num_bins: bins at most; rows of equal confidence share one, so there are fewer where few values differ.

    Returns:
        ``ece``: mean absolute difference of stated and observed, weighted by rows; ``brier``: mean squared error;
        ``bins``: for each ``count``, mean ``predicted``, share ``observed`` and its 95 % interval ``observed_ci``.
        ``ece`` and ``brier`` are None without rows. An ECE is biased upwards by chance: with perfect confidences it is
        about ``sqrt(num_bins / (2 pi n))`` where half of the answers are right.
    """
    stated, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=bool)
    if not len(stated):
        return {"ece": None, "brier": None, "bins": []}
    ranked = np.sort(stated)
    edges = np.unique(ranked[[len(ranked) * k // num_bins for k in range(1, num_bins)]])
    index = np.searchsorted(edges, stated, side="right")
    made = binned(stated, right, index)
    for entry, number in zip(made["bins"], np.unique(index).tolist(), strict=True):
        share = proportion_with_ci(right[index == number])
        entry["observed_ci"] = [share.low, share.high]
    return made


def abstention(confidences: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """Accuracy against coverage when the least confident are left unanswered.

    Args:
        confidences: any scores, higher is surer, shape (n,); equal ones are answered in no particular order.
        correct: whether the answer is right, shape (n,).

    Returns:
        ``curve``: at most 100 points ``[coverage, accuracy]`` with coverage rising to 1; ``area``: mean accuracy over
        all coverages, ``area_at_random``: of an order that knows nothing, which is the accuracy itself, ``area_best``:
        of one that knows every wrong answer; ``auroc``: of the confidence for being right. None without rows.
    """
    scores, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=bool)
    n = len(scores)
    if not n:
        return {"curve": [], "area": None, "area_at_random": None, "area_best": None, "auroc": None}
    accuracy = _accuracy_by_rank(scores, right)
    best = _accuracy_by_rank(right.astype(float), right)
    kept = np.unique(np.ceil(np.linspace(1, n, min(n, _MOST_POINTS))).astype(int))
    ranking = auroc(right, scores)
    return {
        "curve": [[float(rank / n), float(accuracy[rank - 1])] for rank in kept],
        "area": float(accuracy.mean()),
        "area_at_random": float(right.mean()),
        "area_best": float(best.mean()),
        "auroc": None if np.isnan(ranking) else ranking,
    }


def _accuracy_by_rank(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Expected accuracy of the k surest answers, shape (n,) for k = 1 to n: ties are broken at random."""
    order = np.argsort(-scores, kind="stable")
    _, group, counts = np.unique(-scores[order], return_inverse=True, return_counts=True)
    hits = np.bincount(group, weights=right[order].astype(float))
    return np.cumsum((hits / counts)[group]) / np.arange(1, len(scores) + 1)
