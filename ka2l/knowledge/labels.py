"""Labels questions known or unknown by a threshold on semantic entropy that is fitted to the data.

The threshold is the best split in two by squared error (Kossen et al. 2024, arXiv 2406.15927), as KA2L
(arXiv 2603.17566) uses it: an answer is unknown where H >= gamma*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from ka2l.schemas import PROBE_SPLITS
from ka2l.section import Section
from ka2l.seeds import row_seed

#: Threshold where every entropy is 0 and nothing is unknown: above 0, below any entropy that samples can have
#: (ln N / N for one odd answer out of N), and safe in float32.
ALL_KNOWN_THRESHOLD = 1e-6


class LabelsConfig(Section):
    """How the seed questions are divided for the probe."""

    train: float = Field(default=0.6, gt=0.0, lt=1.0)
    """Share of seed questions that the threshold and the probe's weights are fitted on."""
    validation: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share that layer choice, early stopping and calibration see. The rest is the test split."""

    @model_validator(mode="after")
    def _test_is_left(self) -> LabelsConfig:
        if self.train + self.validation >= 1.0:
            raise ValueError(f"train {self.train} + validation {self.validation} leave nothing for the test split")
        return self


class Labels(NamedTuple):
    """What the seed questions are called."""

    threshold: float
    """gamma*, nats."""
    unknown: np.ndarray
    """H >= threshold, shape (n,), bool."""


def fit_threshold(entropies: np.ndarray) -> float:
    """gamma* = argmin over gamma of the squared error of H around the means of {H < gamma} and {H >= gamma}.

    Candidates are the midpoints between neighbouring distinct values; of equally good ones the lowest is taken. The
    squared error of a split is the total minus the part between the groups, so one pass over the sorted values with
    running sums finds it in O(n log n).

    Where all values are equal there is nothing to split, and the label is still defined: all unknown if that value is
    positive (the threshold is the value itself), all known if it is 0 (:data:`ALL_KNOWN_THRESHOLD`).

    Args:
        entropies: shape (n,), nats.

    Raises:
        ValueError: there are none, or some are not finite.
    """
    values = np.sort(np.asarray(entropies, dtype=np.float64))
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"a threshold needs finite entropies, got {len(values)} of which {np.isfinite(values).sum()} are"
        )
    if values[0] == values[-1]:
        return float(values[0]) if values[0] > ALL_KNOWN_THRESHOLD else ALL_KNOWN_THRESHOLD

    below = np.flatnonzero(np.diff(values)) + 1  # rows under each candidate
    n = len(values)
    sums = np.cumsum(values - values.mean())[below - 1]
    between = sums**2 * (n / (below * (n - below)))
    best = int(np.argmax(between >= between.max() * (1 - 1e-12)))  # the first of all that tie up to rounding
    low, high = values[below[best] - 1], values[below[best]]
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)


def split_seed_questions(
    question_ids: Sequence[str], groups: Sequence[str | None], config: LabelsConfig, run_seed: int
) -> list[str]:
    """Assigns each seed question to one of ``schemas.PROBE_SPLITS``; questions of one group stay together.

    Groups go, largest first and otherwise in an order drawn from the run's seed, to the split that is furthest below
    its share. The outcome depends on ids, groups and seed, never on the order of the rows.

    Args:
        question_ids: shape (n,).
        groups: what belongs together; None is a group of its own.
        config: the wanted shares.
        run_seed: the run's seed.

    Returns:
        The split of each row. No split is empty where there are three groups or more; with fewer, train comes first.
    """
    keys = [("id", i) if group is None else ("group", group) for i, group in zip(question_ids, groups, strict=True)]
    sizes = Counter(keys)
    order = sorted(sizes, key=lambda key: (-sizes[key], row_seed(run_seed, 0, "probe_split", "\x1f".join(key)), key))
    shares = (config.train, config.validation, 1.0 - config.train - config.validation)
    missing = {split: share * len(keys) for split, share in zip(PROBE_SPLITS, shares, strict=True)}
    empty = list(PROBE_SPLITS)
    assigned: dict[tuple[str, str], str] = {}
    for position, key in enumerate(order):
        # max takes the first of equals, so ties go in the order of PROBE_SPLITS.
        split = max(missing, key=missing.__getitem__)
        if empty and len(order) - position <= len(empty):
            split = "train" if "train" in empty else max(empty, key=missing.__getitem__)
        assigned[key] = split
        missing[split] -= sizes[key]
        if split in empty:
            empty.remove(split)
    return [assigned[key] for key in keys]


def label_questions(question_ids: Sequence[str], entropies: np.ndarray, probe_splits: Sequence[str]) -> Labels:
    """Labels every seed question with the threshold of the train split.

    Args:
        question_ids: shape (n,).
        entropies: semantic entropy of each, shape (n,), nats.
        probe_splits: split of each, shape (n,).

    Raises:
        ValueError: lengths differ, an entropy is not finite (the question is named), or the train split is empty.
    """
    values = np.asarray(entropies, dtype=np.float64)
    if not len(question_ids) == len(values) == len(probe_splits):
        raise ValueError(f"{len(question_ids)} ids, {len(values)} entropies and {len(probe_splits)} splits")
    bad = [i for i, value in zip(question_ids, values, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"{len(bad)} questions have no finite entropy, the first is {bad[0]!r}")
    threshold = fit_threshold(values[np.asarray(probe_splits) == "train"])
    return Labels(threshold, values >= threshold)
