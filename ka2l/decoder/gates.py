"""Makes variants of the states of unknown questions, and checks the questions that are decoded from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ka2l.pool.rows import question_key
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from ka2l.decoder.config import DecoderConfig

#: How a decoded question's state was made.
VARIANTS = ("sampled", "noised", "interpolated")

#: Where a decoded question may end, in the order of the gates. ``surplus``: it passed them all, but the round had no
#: annotation left for it.
GATES = ("malformed", "duplicate_text", "duplicate_state", "known", "unanswerable", "surplus", "kept")

#: Neighbouring states that a state is mixed with.
_NUM_NEIGHBOURS = 5
#: Of the neighbour in a mixture, from and to: the parent stays the nearer one.
_MIXTURE = (0.2, 0.5)
_MIN_WORDS, _MAX_WORDS = 3, 60
#: Other states that some are compared with at once: the products of all pairs are held for these.
_STATES_AT_ONCE = 4096
#: Share of the training questions that end in a question mark from which on a decoded one must.
_MARKED_SHARE = 0.9


class Variant(NamedTuple):
    """A state to decode, made from that of one unknown question or two."""

    parents: list[str]
    """Ids of the questions whose states it is made of."""
    kind: str
    """One of VARIANTS."""
    state: np.ndarray
    """Shape (D,)."""


def make_variants(
    ids: Sequence[str], states: np.ndarray, config: DecoderConfig, seed: int, *, spread: np.ndarray, noise: float
) -> list[Variant]:
    """The states to decode, ordered by kind and then as the parents come.

    Args:
        ids: unknown questions.
        states: their states, shape (N, D).
        seed: what noise and mixtures derive from, together with the parent's id: other parents never change them.
        spread: standard deviation of the layer's states over the pool, shape (D,).
        noise: standard deviation of the noise, in units of ``spread``.
    """
    neighbours = _neighbours(states, spread)
    sampled, noised, mixed = [], [], []
    for row, question_id in enumerate(ids):
        rng = np.random.default_rng(row_seed(seed, 0, "variants", question_id))
        state = states[row]
        sampled += [Variant([question_id], "sampled", state)] * config.num_sampled
        noised += [
            Variant([question_id], "noised", add_noise(state, noise, spread, rng)) for _ in range(config.num_noised)
        ]
        for other in rng.permutation(neighbours[row])[: config.num_interpolated]:
            share = rng.uniform(*_MIXTURE)
            mixture = (1 - share) * state + share * states[other]
            mixed.append(Variant([question_id, ids[other]], "interpolated", mixture.astype(states.dtype)))
    return [*sampled, *noised, *mixed]


def add_noise(states: np.ndarray, noise: float, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """States of shape (..., D) with Gaussian noise of ``noise`` times ``spread``, shape (D,)."""
    return (states + noise * spread * rng.standard_normal(states.shape)).astype(states.dtype)


def _neighbours(states: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Rows of the nearest other states by standardised Euclidean distance, shape (N, at most 5)."""
    if len(states) < 2:
        return np.zeros((len(states), 0), dtype=int)
    from sklearn.neighbors import NearestNeighbors

    scaled = states / np.maximum(spread, 1e-6)
    count = min(_NUM_NEIGHBOURS, len(states) - 1)
    return NearestNeighbors(n_neighbors=count).fit(scaled).kneighbors(return_distance=False)


def needs_mark(questions: Iterable[str]) -> bool:
    """Whether questions of this kind end in a question mark."""
    marks = [question.rstrip().endswith("?") for question in questions]
    return bool(marks) and sum(marks) / len(marks) >= _MARKED_SHARE


def is_well_formed(question: str, *, marked: bool) -> bool:
    """Whether a text looks like a question: some words, no stutter, and one closing question mark where due."""
    words = question.split()
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS or not question.isprintable():
        return False
    if marked and (not question.endswith("?") or question.count("?") > 1):
        return False
    return re.search(r"\b(\w+)\W+\1\W+\1\b", question, re.IGNORECASE) is None


def first_of_text(questions: Sequence[str], taken: Collection[str]) -> np.ndarray:
    """Which questions are the first of their normalised text and not in ``taken`` (keys of `question_key`). (N,)"""
    seen: set[str] = set()
    new = []
    for question in questions:
        key = question_key(question)
        new.append(key not in taken and key not in seen)
        seen.add(key)
    return np.array(new, dtype=bool)


class NearestStates:
    """The largest cosine similarity of some states to others that come in batches.

    States are centred first: hidden states share a large common component, beside which all would look alike.

    Args:
        states: shape (N, D).
        centre: mean state of the pool, shape (D,).
    """

    def __init__(self, states: np.ndarray, centre: np.ndarray) -> None:
        self._centre = centre
        self._unit = self._directions(states)
        self.similarity = np.full(len(states), -1.0)
        """Shape (N,)."""

    def _directions(self, states: np.ndarray) -> np.ndarray:
        centred = states.astype(np.float64) - self._centre
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    def add(self, others: np.ndarray) -> None:
        """Compare with further states, shape (M, D)."""
        for start in range(0, len(others) if len(self._unit) else 0, _STATES_AT_ONCE):
            directions = self._directions(others[start : start + _STATES_AT_ONCE])
            self.similarity = np.maximum(self.similarity, (self._unit @ directions.T).max(axis=1))

    def first_of_kind(self, candidates: np.ndarray, threshold: float) -> np.ndarray:
        """Which of the rows ``candidates`` are new: farther than ``threshold`` from all others and from every row kept
        before them. Shape (len(candidates),)."""
        kept: list[int] = []
        new = np.zeros(len(candidates), dtype=bool)
        for position, row in enumerate(candidates):
            among = (self._unit[kept] @ self._unit[row]).max() if kept else -1.0
            self.similarity[row] = max(self.similarity[row], among)
            new[position] = self.similarity[row] <= threshold
            if new[position]:
                kept.append(int(row))
        return new


def diversity(questions: Sequence[str]) -> dict[str, float]:
    """Distinct-1 and distinct-2 (Li et al. 2016, arXiv 1510.03055): different words and word pairs, over all."""
    words = [question.split() for question in questions]
    single = [word for row in words for word in row]
    pairs = [pair for row in words for pair in pairwise(row)]
    return {
        "distinct_1": len(set(single)) / max(1, len(single)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }
