from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka2l.evaluation.reliability import abstention, reliability


def test_calibration_error_is_the_weighted_gap_between_stated_and_observed() -> None:
    made = reliability([0.2, 0.2, 0.2, 0.2, 0.9, 0.9], [True, False, False, False, True, True], num_bins=3)
    assert [(entry["count"], entry["observed"]) for entry in made["bins"]] == [(4, 0.25), (2, 1.0)]
    assert made["ece"] == pytest.approx((4 * 0.05 + 2 * 0.1) / 6)
    assert made["brier"] == pytest.approx((0.8**2 + 3 * 0.2**2 + 2 * 0.1**2) / 6)


def test_bins_hold_equally_many_questions_and_equal_confidences_share_one() -> None:
    draw = np.random.default_rng(0)
    stated = draw.random(1000) ** 8  # crowded near 0
    made = reliability(stated, draw.random(1000) < stated)
    assert [entry["count"] for entry in made["bins"]] == [100] * 10
    assert len(reliability([0.5] * 40, [True] * 40)["bins"]) == 1


def test_confidences_that_keep_their_word_have_an_error_near_nothing() -> None:
    draw = np.random.default_rng(1)
    stated = draw.random(20_000)
    assert reliability(stated, draw.random(20_000) < stated)["ece"] < 0.02
    assert reliability(stated, draw.random(20_000) < 0.5 * stated)["ece"] == pytest.approx(0.25, abs=0.02)


def test_leaving_out_the_most_doubtful_raises_accuracy() -> None:
    made = abstention([0.9, 0.8, 0.4, 0.1], [True, True, False, True])
    assert made["curve"] == [[0.25, 1.0], [0.5, 1.0], [0.75, pytest.approx(2 / 3)], [1.0, 0.75]]
    assert made["area"] == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)
    assert made["area_at_random"] == 0.75
    assert made["area_best"] == pytest.approx((1 + 1 + 1 + 3 / 4) / 4)


def test_a_confidence_that_never_changes_is_worth_what_chance_is() -> None:
    made = abstention([0.7] * 5, [True, False, True, False, False])
    assert made["area"] == made["area_at_random"] == pytest.approx(0.4)
    assert [accuracy for _, accuracy in made["curve"]] == pytest.approx([0.4] * 5)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=300))
def test_no_order_beats_the_one_that_knows_and_all_end_at_the_accuracy(rows: list[tuple[float, bool]]) -> None:
    scores, right = zip(*rows, strict=True)
    made = abstention(scores, right)
    assert made["area"] <= made["area_best"] + 1e-9
    assert len(made["curve"]) <= 100
    assert made["curve"][-1] == [1.0, pytest.approx(sum(right) / len(right))]


def test_nothing_asked_is_nothing_measured() -> None:
    assert reliability([], [])["ece"] is None
    assert abstention([], [])["area"] is None
