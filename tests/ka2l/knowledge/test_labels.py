"""The threshold against brute force in exact arithmetic; the split of the seed questions."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ka2l.knowledge.labels import (
    ALL_KNOWN_THRESHOLD,
    LabelsConfig,
    fit_threshold,
    label_questions,
    split_seed_questions,
)
from ka2l.knowledge.semantic_entropy import discrete_semantic_entropy
from ka2l.schemas import PROBE_SPLITS


def _squared_error(values: list[Fraction]) -> Fraction:
    if not values:
        return Fraction(0)
    mean = sum(values, Fraction(0)) / len(values)
    return sum(((v - mean) ** 2 for v in values), Fraction(0))


def _brute_force(values: list[Fraction]) -> Fraction:
    distinct = sorted(set(values))
    candidates = [(a + b) / 2 for a, b in pairwise(distinct)]
    # min takes the first of equals: the lowest gamma.
    return min(
        candidates,
        key=lambda g: _squared_error([v for v in values if v < g]) + _squared_error([v for v in values if v >= g]),
    )


@given(st.lists(st.integers(0, 24), min_size=2, max_size=30).filter(lambda values: len(set(values)) > 1))
def test_threshold_is_the_brute_force_argmin_and_the_lowest_of_ties(eighths: list[int]) -> None:
    values = [Fraction(v, 8) for v in eighths]
    assert fit_threshold(np.array([float(v) for v in values])) == float(_brute_force(values))


def test_equally_good_thresholds_give_the_lowest() -> None:
    assert fit_threshold(np.array([0.0, 1.0, 2.0])) == 0.5
    assert fit_threshold(np.array([0.1, 0.2, 0.3])) == pytest.approx(0.15)


def test_two_heaps_are_parted_between_them() -> None:
    rng = np.random.default_rng(0)
    entropies = np.concatenate([rng.normal(0.2, 0.05, 300), rng.normal(1.8, 0.2, 200)])
    assert 0.4 < fit_threshold(entropies) < 1.2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_valued_entropies_are_labelled_all_known_or_all_unknown(dtype: type) -> None:
    zeros = np.zeros(5, dtype=dtype)
    assert fit_threshold(zeros) == ALL_KNOWN_THRESHOLD
    assert not (zeros >= dtype(fit_threshold(zeros))).any()
    same = np.full(5, np.log(10), dtype=dtype)
    assert (same >= fit_threshold(same)).all()
    # The least doubt that many samples can show still lies above.
    assert discrete_semantic_entropy([0] * 9999 + [1]) > ALL_KNOWN_THRESHOLD


def test_neighbouring_floats_are_still_parted() -> None:
    low = 1.0
    high = np.nextafter(low, 2.0)
    gamma = fit_threshold(np.array([low, high]))
    assert low < gamma <= high


def test_threshold_of_nothing_or_of_nan_is_refused() -> None:
    for entropies in ([], [0.5, np.nan]):
        with pytest.raises(ValueError, match="finite"):
            fit_threshold(np.array(entropies))


def test_threshold_sees_the_train_split_alone() -> None:
    ids = [f"q{i}" for i in range(6)]
    splits = ["train", "train", "train", "train", "validation", "test"]
    labels = label_questions(ids, np.array([0.0, 0.2, 2.0, 2.2, 0.1, 9.0]), splits)
    assert labels.threshold == pytest.approx(1.1)
    assert labels.unknown.tolist() == [False, False, True, True, False, True]
    elsewhere = label_questions(ids, np.array([0.0, 0.2, 2.0, 2.2, 7.0, 0.0]), splits)
    assert elsewhere.threshold == labels.threshold


def test_a_question_without_entropy_is_named() -> None:
    with pytest.raises(ValueError, match="'b'"):
        label_questions(["a", "b"], np.array([0.1, np.nan]), ["train", "train"])


def test_split_meets_the_wanted_shares() -> None:
    ids = [f"q{i}" for i in range(400)]
    counts = Counter(split_seed_questions(ids, [None] * 400, LabelsConfig(), run_seed=0))
    assert counts == {"train": 240, "validation": 80, "test": 80}


def test_split_is_drawn_from_the_seed_and_blind_to_row_order() -> None:
    ids = [f"q{i}" for i in range(60)]
    groups = [f"g{i % 23}" if i % 3 else None for i in range(60)]
    split = dict(zip(ids, split_seed_questions(ids, groups, LabelsConfig(), 5), strict=True))
    order = np.random.default_rng(0).permutation(60)
    shuffled_ids = [ids[i] for i in order]
    shuffled = split_seed_questions(shuffled_ids, [groups[i] for i in order], LabelsConfig(), 5)
    assert dict(zip(shuffled_ids, shuffled, strict=True)) == split
    assert split_seed_questions(ids, groups, LabelsConfig(), 6) != list(split.values())


_group = st.one_of(st.none(), st.sampled_from("abcdefgh"))


@given(
    st.lists(_group, min_size=1, max_size=60),
    st.floats(0.02, 0.96),
    st.floats(0.02, 0.98),
    st.integers(0, 3),
)
def test_splits_are_disjoint_by_group_and_never_empty(
    groups: list[str | None], train: float, rest: float, seed: int
) -> None:
    config = LabelsConfig(train=train, validation=rest * (1 - train))
    ids = [f"q{i}" for i in range(len(groups))]
    splits = split_seed_questions(ids, groups, config, seed)
    assert set(splits) <= set(PROBE_SPLITS)
    assert "train" in splits
    assert len({(g, s) for g, s in zip(groups, splits, strict=True) if g}) == len({g for g in groups if g})
    num_groups = len({g or i for g, i in zip(groups, ids, strict=True)})
    assert len(set(splits)) == min(3, num_groups)


def test_a_group_that_is_called_like_a_question_stays_apart_from_it() -> None:
    # Fewer than three groups would leave a split empty.
    splits = split_seed_questions(["a", "b", "c"], [None, "a", None], LabelsConfig(), 0)
    assert set(splits) == set(PROBE_SPLITS)


def test_shares_that_leave_no_test_split_are_refused() -> None:
    with pytest.raises(ValidationError, match="test split"):
        LabelsConfig(train=0.8, validation=0.2)
