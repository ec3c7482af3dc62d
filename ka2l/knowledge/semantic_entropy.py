"""Semantic entropy of clusters of equivalent answers, and other scores of uncertainty.

Semantic entropy: Kuhn et al. 2023 (arXiv 2302.09664); Farquhar et al. 2024 (doi 10.1038/s41586-024-07421-0).
All entropies are in nats and rise with uncertainty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

#: So many draws the model's own probabilities of its answers are worth in `expected_shares`.
LIKELIHOOD_DRAWS = 10.0


def discrete_semantic_entropy(ids: Sequence[int]) -> float:
    """H = -sum_c p_c ln p_c with p_c = |c| / N, from 0 (one cluster) to ln N (no two answers alike).

    Args:
        ids: cluster of each of the N sampled answers, any integers.

    Raises:
        ValueError: there are no answers.
    """
    if not ids:
        raise ValueError("semantic entropy of no answers")
    # In descending order, so that equal cluster sizes give the same float whatever the order of the answers.
    sizes = sorted(Counter(ids).values(), reverse=True)
    return math.fsum(size / len(ids) * math.log(len(ids) / size) for size in sizes)


def weighted_semantic_entropy(ids: Sequence[int], logprobs: Sequence[float], answers: Sequence[str]) -> float:
    """Likelihood-weighted semantic entropy, nats: p_c is the summed probability of the cluster's distinct sequences.

    A sequence sampled twice counts once, with its larger log-probability: how often it came up is what that
    probability already says. The clusters' probabilities are normalised to sum to 1 (Farquhar et al. 2024).

    Args:
        ids: cluster of each of the N sampled answers.
        logprobs: each answer's sequence log-probability, nats; entries that are not finite are left out.
        answers: the texts, by which duplicates are found.

    Returns:
        The entropy, or NaN where no log-probability is finite.

    Raises:
        ValueError: the three differ in length or are empty.
    """
    if not ids:
        raise ValueError("semantic entropy of no answers")
    masses = sorted(log_masses(ids, logprobs, answers).values())
    if not masses:
        return math.nan
    total = _log_sum_exp(masses)
    return max(0.0, math.fsum(math.exp(mass - total) * (total - mass) for mass in masses))


def log_masses(ids: Sequence[int], logprobs: Sequence[float], answers: Sequence[str]) -> dict[int, float]:
    """Log of the summed probability of each cluster's distinct sequences, nats; clusters without a finite
    log-probability are left out. Arguments as of `weighted_semantic_entropy`."""
    sequences: dict[tuple[int, str], float] = {}
    for cluster, logprob, answer in zip(ids, logprobs, answers, strict=True):
        if math.isfinite(logprob):
            sequences[cluster, answer] = max(logprob, sequences.get((cluster, answer), -math.inf))
    clusters: dict[int, list[float]] = {}
    for (cluster, _), logprob in sequences.items():
        clusters.setdefault(cluster, []).append(logprob)
    return {cluster: _log_sum_exp(members) for cluster, members in clusters.items()}


def expected_shares(
    ids: Sequence[int], logprobs: Sequence[float], answers: Sequence[str]
) -> tuple[dict[int, float], float]:
    """Probabilities of meanings, from how often each came up and from how likely the model holds what it said.

    Of n answers, T distinct texts in C clusters, n_c are in cluster c, and the model gives the texts there the
    probability m_c in all. These count as s = `LIKELIHOOD_DRAWS` more draws: p_c = (n_c + s m_c) / (n + s). What is
    left, u = 1 - sum m, is of texts that were not drawn. As many of those as of the drawn ones, C / T, are taken for
    new meanings, and the others for what was said already, by n_c / n: so a long answer, which is hardly ever worded
    twice, is no doubt.

    Args:
        ids: cluster of each answer.
        logprobs: each answer's sequence log-probability, nats; where not finite, its probability counts as not known.
        answers: the texts.

    Returns:
        The probability of each cluster, and that of a meaning which was not drawn; together 1.

    Raises:
        ValueError: there are no answers, or the three differ in length.
    """
    if not ids:
        raise ValueError("the meanings of no answers")
    likelihood = {cluster: math.exp(mass) for cluster, mass in log_masses(ids, logprobs, answers).items()}
    # Texts that were cut off at a limit, or logged after rounding, may come to a little more than 1.
    whole = max(1.0, math.fsum(likelihood.values()))
    num_draws = len(ids) + LIKELIHOOD_DRAWS
    counts = Counter(ids)
    left = 1.0 - math.fsum(likelihood.values()) / whole
    new = len(counts) / len(set(zip(ids, answers, strict=True)))
    shares = {}
    for cluster, count in counts.items():
        own = likelihood.get(cluster, 0.0) / whole + left * (1 - new) * count / len(ids)
        shares[cluster] = (count + LIKELIHOOD_DRAWS * own) / num_draws
    return shares, LIKELIHOOD_DRAWS * left * new / num_draws


def disagreement(ids: Sequence[int], logprobs: Sequence[float], answers: Sequence[str]) -> float | None:
    """Probability of another meaning than the likeliest one, half a draw kept for either side; None for one answer,
    which cannot disagree. Arguments as of `expected_shares`."""
    if len(ids) < 2:
        return None
    shares, _ = expected_shares(ids, logprobs, answers)
    return _smoothed(max(shares.values()), len(ids))


def disagreement_bounds(num_answers: int) -> tuple[float, float]:
    """Least and most of `disagreement` for so many answers: all the same and certain, all different and unlikely."""
    return _smoothed(1.0, num_answers), _smoothed(1.0 / (num_answers + LIKELIHOOD_DRAWS), num_answers)


def _smoothed(share: float, num_answers: int) -> float:
    num_draws = num_answers + LIKELIHOOD_DRAWS
    return ((1.0 - share) * num_draws + 0.5) / (num_draws + 1.0)


def predictive_entropy(logprobs: Sequence[float]) -> float:
    """Monte-Carlo estimate of the entropy over sequences: minus the mean sequence log-probability, nats.

    Raises:
        ValueError: there are no answers.
    """
    if not logprobs:
        raise ValueError("predictive entropy of no answers")
    return -math.fsum(logprobs) / len(logprobs)


def mean_token_log_likelihood(logprob: float, num_tokens: int) -> float:
    """A sequence's log-probability per token, nats (at most 0; falls with uncertainty); 0 for a sequence of none."""
    return logprob / num_tokens if num_tokens else 0.0


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))
