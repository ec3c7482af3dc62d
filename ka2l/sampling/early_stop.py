"""Early stop of sampling: draws answers in waves, and stops where more would hardly move the semantic entropy.

A model that says the same three times knows what it says, and one that says six different things does not: ten answers
tell little more. What is open is told by a posterior over the entropy. Answers are draws from unknown probabilities of
``NUM_MEANINGS`` meanings; a priori these follow one of the symmetric Dirichlet distributions with ``CONCENTRATIONS``,
each as likely, from models that are sure of everything to models that guess. Mean and variance of the entropy under a
Dirichlet posterior have closed forms (Wolpert and Wolf 1995, doi 10.1103/PhysRevE.52.6841), and the data weigh the
mixture (as Nemenman, Shafee and Bialek 2002, arXiv physics/0108025, do with a continuum). Stopping semantic entropy by
its posterior's spread: Ciosek et al. 2025, arXiv 2504.03579.

Few answers are coarse: all questions whose three answers agree would share one entropy. How likely the model held what
it said orders them, so the entropy in the end takes its own probabilities for further draws (`expected_entropy`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ka2l.answers.normalise import surface_key
from ka2l.knowledge.semantic_entropy import expected_shares

if TYPE_CHECKING:
    import numpy as np

    from ka2l.sampling.sampler import Generation, Request, Sampler

#: More meanings than any question's answers have: the posterior hardly depends on it.
NUM_MEANINGS = 50
#: Of the symmetric Dirichlet priors.
CONCENTRATIONS = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0)
#: Answers drawn of every question, and then at a time where the entropy is still open.
FIRST, WAVE = 3, 2
#: Standard deviation of the entropy's posterior, nats, below which it is settled.
TOLERANCE = 0.55


class EntropyPosterior(NamedTuple):
    """What some answers say of the semantic entropy."""

    mean: float
    """Nats."""
    deviation: float
    """Standard deviation, nats."""


def entropy_posterior(ids: Sequence[int]) -> EntropyPosterior:
    """Of the entropy over meanings, from the cluster of each answer drawn so far.

    Raises:
        ValueError: there are no answers.
    """
    if not ids:
        raise ValueError("the semantic entropy of no answers")
    return _posterior(tuple(sorted(Counter(ids).values(), reverse=True)))


def is_settled(answers: Sequence[str]) -> bool:
    """Whether further answers would hardly move the entropy.

    Meanings are told apart by their text alone, since this is asked while answers are being drawn. That makes at most
    too many of them, so a question whose answers are worded in several ways is asked on.
    """
    keys = [surface_key(answer) for answer in answers]
    first_seen = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return entropy_posterior([first_seen[key] for key in keys]).deviation < TOLERANCE


def expected_entropy(ids: Sequence[int], logprobs: Sequence[float], answers: Sequence[str]) -> float:
    """Semantic entropy, nats, of a question whose answers were drawn until it was settled: that of `expected_shares`,
    with what was not drawn spread evenly over `NUM_MEANINGS`.

    Comparable between questions with different numbers of answers, which the entropy of the counts is not. Arguments
    and errors as of `expected_shares`.
    """
    shares, unseen = expected_shares(ids, logprobs, answers)
    terms = [-share * math.log(share) for share in shares.values()]
    if unseen > 0:
        terms.append(-unseen * math.log(unseen / NUM_MEANINGS))
    return max(0.0, math.fsum(sorted(terms)))


def draw_until_settled(
    sampler: Sampler, requests: Sequence[Request], may_stop: Sequence[bool]
) -> list[list[Generation]]:
    """At most ``num_samples`` answers a request, the first of those that it would have drawn at once.

    Args:
        may_stop: whether a request is done once its entropy is settled; others get all their answers.
    """
    num_first = [
        min(FIRST, request.num_samples) if may else request.num_samples
        for request, may in zip(requests, may_stop, strict=True)
    ]
    made = sampler.generate([_part(request, 0, count) for request, count in zip(requests, num_first, strict=True)])
    while asked := [
        index for index, request in enumerate(requests) if may_stop[index] and _is_open(request, made[index])
    ]:
        parts = [
            _part(request, len(made[index]), min(WAVE, request.num_samples - len(made[index])))
            for index in asked
            for request in [requests[index]]
        ]
        for index, more in zip(asked, sampler.generate(parts), strict=True):
            made[index] = [*made[index], *more]
    return made


def _part(request: Request, start: int, count: int) -> Request:
    # Sample i of a request draws from seed + i.
    return request._replace(num_samples=count, seed=request.seed + start)


def _is_open(request: Request, made: Sequence[Generation]) -> bool:
    if len(made) >= request.num_samples or any(answer.finish_reason == "rejected" for answer in made):
        return False
    return not is_settled([answer.answer for answer in made])


@lru_cache(maxsize=2**12)
def _posterior(counts: tuple[int, ...]) -> EntropyPosterior:
    """From the answers in each cluster, in descending order."""
    import numpy as np
    from scipy.special import gammaln, logsumexp

    num_answers, num_seen = sum(counts), len(counts)
    num_meanings = max(NUM_MEANINGS, num_seen)
    evidence, means, second_moments = [], [], []
    for concentration in CONCENTRATIONS:
        total = num_meanings * concentration
        # Which of the meanings the clusters are, nobody knows: as many ways as the seen ones can be chosen in order.
        evidence.append(
            gammaln(total)
            - gammaln(total + num_answers)
            + sum(gammaln(count + concentration) - gammaln(concentration) for count in counts)
            + gammaln(num_meanings + 1)
            - gammaln(num_meanings - num_seen + 1)
        )
        parameters = np.array([*counts, 0]) + concentration
        mean, second = _dirichlet_entropy(parameters, np.array([*([1] * num_seen), num_meanings - num_seen]))
        means.append(mean)
        second_moments.append(second)
    weights = np.exp(np.array(evidence) - logsumexp(evidence))
    mean = float(weights @ np.array(means))
    variance = float(weights @ np.array(second_moments)) - mean**2
    return EntropyPosterior(mean, max(0.0, variance) ** 0.5)


def _dirichlet_entropy(parameters: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """First and second moment of the entropy, nats, of probabilities that a Dirichlet distribution gives.

    Args:
        parameters: shape (k,), each standing for as many equal ones as ``times`` (k,) says.
    """
    from scipy.special import digamma, polygamma

    total = float(times @ parameters)
    mean = digamma(total + 1) - float(times @ (parameters / total * digamma(parameters + 1)))
    shared = polygamma(1, total + 2)
    terms = parameters * (digamma(parameters + 1) - digamma(total + 2))
    pairs = (times @ terms) ** 2 - times @ terms**2 - shared * (total**2 - times @ parameters**2)
    squares = (digamma(parameters + 2) - digamma(total + 2)) ** 2 + polygamma(1, parameters + 2) - shared
    alone = times @ (parameters * (parameters + 1) * squares)
    return float(mean), float((pairs + alone) / (total * (total + 1)))
