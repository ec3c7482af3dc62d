"""Metrics against scikit-learn, closed forms and hand-worked answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ka2l.evaluation.statistics import (
    auroc,
    auroc_with_ci,
    exact_match,
    forgetting,
    json_safe,
    mean_with_ci,
    normalise_answer,
    proportion_with_ci,
    ratio_with_ci,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  The  Beatles! ", "beatles"),
        ("An apple, a pear", "apple pear"),
        ("ﬁve km²", "five km2"),
        ("head-up display", "headup display"),
        ("“Guwahati”", "guwahati"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("A", "a"),
        ("The The", "the the"),
        ("...", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_squad_does_with_two_repairs(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


def test_exact_match_accepts_any_reference_and_never_an_empty_answer() -> None:
    assert exact_match("the Bing Crosby.", ["Rudy Vallee", "Bing Crosby"])
    assert not exact_match("Crosby", ["Bing Crosby"])
    assert not exact_match("3.5", ["35"])
    assert not exact_match("", ["", "..."])
    assert not exact_match("Paris", [])


def test_token_f1_is_the_best_over_references() -> None:
    assert token_f1("President Richard Nixon", ["Gerald Ford", "Richard Nixon"]) == pytest.approx(0.8)
    assert token_f1("the Nixon Nixon", ["Nixon"]) == pytest.approx(2 / 3)
    assert token_f1("Paris", ["London"]) == 0.0
    assert token_f1("", ["London"]) == 0.0
    assert token_f1("", [""]) == 0.0


def test_auroc_is_nan_for_one_class() -> None:
    assert math.isnan(auroc([True, True], [0.1, 0.2]))
    assert auroc([False, True, True], [0.1, 0.2, 0.05]) == pytest.approx(0.5)


def _plain_bootstrap(labels: np.ndarray, scores: np.ndarray, seed: int, num_resamples: int) -> list[float]:
    order = np.argsort(scores, kind="stable")  # rows are drawn in order of score, so that row order plays no part
    labels, scores = labels[order], scores[order]
    rng = np.random.default_rng(seed)
    return [
        roc_auc_score(labels[rows], scores[rows])
        for rows in rng.integers(len(labels), size=(num_resamples, len(labels)))
        if 0 < labels[rows].sum() < len(rows)
    ]


@pytest.mark.parametrize("num_levels", [3, 1000])
def test_bootstrap_of_auroc_equals_resampling_with_scikit_learn(num_levels: int) -> None:
    rng = np.random.default_rng(7)
    labels = rng.random(60) < 0.3
    scores = np.round((labels + rng.normal(size=60)) * num_levels) / num_levels  # few levels make many ties
    estimate = auroc_with_ci(labels, scores, seed=3, num_resamples=200)
    low, high = np.percentile(_plain_bootstrap(labels, scores, 3, 200), [2.5, 97.5])
    assert estimate == pytest.approx((roc_auc_score(labels, scores), low, high), abs=1e-12)


def test_bootstrap_leaves_out_resamples_of_one_class() -> None:
    labels, scores = np.array([True, False, False, False]), np.array([0.9, 0.1, 0.2, 0.95])
    estimate = auroc_with_ci(labels, scores, seed=0, num_resamples=300)
    values = _plain_bootstrap(labels, scores, 0, 300)
    assert len(values) < 300
    assert estimate[1:] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert all(math.isnan(v) for v in auroc_with_ci([True, True], [0.0, 1.0], seed=0))


def test_bootstrap_interval_follows_the_seed_and_not_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random(50) < 0.5, rng.random(50)
    whole = auroc_with_ci(labels, scores, seed=1)
    assert auroc_with_ci(labels, scores, seed=1) == whole
    assert auroc_with_ci(labels, scores, seed=2) != whole
    monkeypatch.setattr("ka2l.evaluation.statistics._BLOCK", 50 * 128)
    assert auroc_with_ci(labels, scores, seed=1) == whole


def test_interval_of_auroc_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    truth = 0.7602499  # P(N(1,1) > N(0,1)) = Phi(1 / sqrt 2)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = rng.random(150) < 0.5
        _, low, high = auroc_with_ci(labels, labels + rng.normal(size=150), seed=seed, num_resamples=300)
        covered += low <= truth <= high
    assert 88 <= covered <= 99


def test_wilson_interval_matches_a_published_value_and_stays_in_bounds() -> None:
    # Newcombe 1998 (Stat Med 17:857), table I, method 3: 81 of 263 -> 0.2553, 0.3662; 0 of 20 -> 0, 0.1611.
    estimate = proportion_with_ci([True] * 81 + [False] * 182)
    assert estimate[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion_with_ci([False] * 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-5)
    assert all(math.isnan(v) for v in proportion_with_ci([]))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_wilson_interval_holds_the_share(correct: list[bool]) -> None:
    value, low, high = proportion_with_ci(correct)
    assert 0 <= low <= value <= high <= 1


@settings(max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_bootstrap_interval_of_a_mean_lies_within_the_values(values: list[float]) -> None:
    estimate = mean_with_ci(values, seed=0, num_resamples=100)
    assert estimate.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9


def test_mean_interval_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = mean_with_ci(values, seed=0, num_resamples=2000)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_forgetting_counts_lost_and_won_answers_apart() -> None:
    shares = forgetting([True, True, True, True, False, False], [True, False, False, True, True, False])
    assert shares == {"forgotten": 0.5, "kept": 0.5, "learned": 0.5}
    nothing_known = forgetting([False, False], [True, False])
    assert math.isnan(nothing_known["forgotten"])
    assert nothing_known["learned"] == 0.5
    with pytest.raises(ValueError, match="shape"):
        forgetting([True], [True, False])


def test_metrics_become_strict_json() -> None:
    metrics = {
        "auroc": auroc_with_ci([True, False, True], [0.3, 0.1, 0.2], seed=0, num_resamples=10),
        "forgetting": forgetting([False], [True]),
        "count": np.int64(3),
        "array": np.array([0.5, np.nan], dtype=np.float32),
        "flag": np.bool_(True),
    }
    safe = json_safe(metrics)
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe
    assert safe["array"] == [0.5, None]
    assert safe["forgetting"]["kept"] is None


def test_a_ratio_is_of_sums_and_its_interval_holds_it() -> None:
    made = ratio_with_ci([4, 0, 3], [4, 2, 6], seed=0)
    assert made.value == pytest.approx(7 / 12)
    assert made.low < made.value < made.high
    assert ratio_with_ci([1, 1], [2, 2], seed=0) == (0.5, 0.5, 0.5)
    assert math.isnan(ratio_with_ci([0], [0], seed=0).value)
