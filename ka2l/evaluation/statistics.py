"""Exact match, F1, AUROC with intervals, forgetting."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Resamples are drawn in blocks of about this many entries, so that memory stays bounded whatever the sample size.
_BLOCK = 2**22
_LEVEL = 95.0


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


# --- answers ---------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """The answer as exact match and token F1 see it: NFKC, lower case, no punctuation, articles or extra blanks.

    The SQuAD script's rules (Rajpurkar et al. 2016, arXiv 1606.05250), which NQ-Open shares, with two repairs: a
    decimal point stays (``3.5`` is not ``35``), and an answer that is nothing but an article stays (option ``A``).
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d)\.(?=\d)", "\0", text)
    kept = (c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    text = "".join(kept).replace("\0", ".")
    return " ".join(_ARTICLES.sub(" ", text).split()) or " ".join(text.split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the normalised answer equals a normalised reference. An empty answer matches nothing."""
    normalised = normalise_answer(answer)
    return bool(normalised) and any(normalised == normalise_answer(reference) for reference in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 between the normalised answer's tokens and a reference's, 0 to 1. An empty answer scores 0."""
    tokens = Counter(normalise_answer(answer).split())
    best = 0.0
    for reference in references:
        expected = Counter(normalise_answer(reference).split())
        common = (tokens & expected).total()
        if common:
            best = max(best, 2 * common / (tokens.total() + expected.total()))
    return best


# --- scores ----------------------------------------------------------------------------------------------------------


def auroc(labels: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve of ``scores`` (n,) for the true ``labels`` (n,); NaN where only one class is there."""
    from sklearn.metrics import roc_auc_score

    truth = np.asarray(labels, dtype=bool)
    if truth.all() or not truth.any():
        return math.nan
    return float(roc_auc_score(truth, np.asarray(scores, dtype=np.float64)))


def auroc_with_ci(
    labels: Sequence[bool] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    seed: int,
    num_resamples: int = 1000,
) -> Estimate:
    """AUROC with the percentile interval of a bootstrap over rows.

    Every resample is a vector of row counts; one sort of the scores serves all, for the AUROC is the Mann-Whitney
    statistic: weight of negatives below each positive, ties at half. Resamples of one class are left out. All three
    numbers are NaN where the rows themselves hold one class.
    """
    truth = np.asarray(labels, dtype=bool)
    values = np.asarray(scores, dtype=np.float64)
    value = auroc(truth, values)
    if math.isnan(value):
        return Estimate(math.nan, math.nan, math.nan)
    order = np.argsort(values, kind="stable")
    truth = truth[order]
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # first row of each distinct score
    estimates = []
    for rows in _resamples(len(truth), seed, num_resamples):
        shift = np.arange(len(rows))[:, None] * len(truth)
        counts = np.bincount((rows + shift).ravel(), minlength=rows.size).reshape(rows.shape)
        positive = np.add.reduceat(counts * truth, starts, axis=1)
        negative = np.add.reduceat(counts * ~truth, starts, axis=1)
        wins = (positive * (np.cumsum(negative, axis=1) - 0.5 * negative)).sum(axis=1)
        num_pairs = positive.sum(axis=1) * negative.sum(axis=1)
        estimates.append(wins[num_pairs > 0] / num_pairs[num_pairs > 0])
    return _percentile_interval(value, np.concatenate(estimates))


def mean_with_ci(values: Sequence[float] | np.ndarray, seed: int, num_resamples: int = 1000) -> Estimate:
    """Mean of (n,) values with the percentile interval of a bootstrap over rows; NaN for no values."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Estimate(math.nan, math.nan, math.nan)
    means = [array[rows].mean(axis=1) for rows in _resamples(len(array), seed, num_resamples)]
    return _percentile_interval(float(array.mean()), np.concatenate(means))


def ratio_with_ci(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    seed: int,
    num_resamples: int = 1000,
) -> Estimate:
    """Sum of (n,) numerators over sum of (n,) denominators, with the percentile interval of a bootstrap over rows; NaN
    where the denominators add up to 0. Resamples that do are left out."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not below.sum():
        return Estimate(math.nan, math.nan, math.nan)
    ratios = []
    for rows in _resamples(len(below), seed, num_resamples):
        totals = below[rows].sum(axis=1)
        ratios.append(above[rows].sum(axis=1)[totals > 0] / totals[totals > 0])
    return _percentile_interval(float(above.sum() / below.sum()), np.concatenate(ratios))


def proportion_with_ci(correct: Sequence[bool] | np.ndarray) -> Estimate:
    """Share of true entries with Wilson's score interval (Wilson 1927, doi 10.2307/2276774); NaN for no entries."""
    hits = np.asarray(correct, dtype=bool)
    n = len(hits)
    if not n:
        return Estimate(math.nan, math.nan, math.nan)
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share = float(hits.mean())
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def _resamples(n: int, seed: int, num_resamples: int) -> Iterator[np.ndarray]:
    """Row indices of the bootstrap resamples, (block, n) at a time."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    for start in range(0, num_resamples, block):
        yield rng.integers(n, size=(min(block, num_resamples - start), n))


def _percentile_interval(value: float, estimates: np.ndarray) -> Estimate:
    if not len(estimates):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(estimates, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return Estimate(value, float(low), float(high))


# --- rounds ----------------------------------------------------------------------------------------------------------


def forgetting(before: Sequence[bool] | np.ndarray, now: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """What became of each answer between two model states.

    Args:
        before: whether each question was answered rightly, shape (n,).
        now: the same questions in the same order, shape (n,).

    Returns:
        ``forgotten``: share of the formerly right that are wrong now; ``kept``: 1 - forgotten; ``learned``: share of
        the formerly wrong that are right now. A share of nothing is NaN.
    """
    old, new = np.asarray(before, dtype=bool), np.asarray(now, dtype=bool)
    if old.shape != new.shape:
        raise ValueError(f"before has shape {old.shape}, now {new.shape}")
    kept = float(new[old].mean()) if old.any() else math.nan
    learned = float(new[~old].mean()) if not old.all() else math.nan
    return {"forgotten": 1.0 - kept, "kept": kept, "learned": learned}


def json_safe(value: Any) -> Any:
    """The value with NumPy scalars and arrays as plain Python, tuples as lists, and NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return json_safe(value.tolist())
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
