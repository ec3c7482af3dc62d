"""Evidence over model states."""

from __future__ import annotations

import numpy as np
import pytest

from ka2l.evidence import combine


def test_the_base_model_alone_is_its_own_evidence() -> None:
    assert combine(np.array([-1.0, 0.5, 2.0]), []) == pytest.approx([-1.0, 0.5, 2.0])


def test_states_weigh_the_same() -> None:
    assert combine(np.array([4.0, 0.0]), [np.array([1.0, 3.0]), np.array([1.0, 3.0])]) == pytest.approx([2.0, 2.0])


def test_a_later_state_that_is_sure_of_everything_keeps_the_base_models_order() -> None:
    base = np.array([3.0, 1.0, -2.0])
    assert np.argsort(combine(base, [np.full(3, -40.0)])).tolist() == np.argsort(base).tolist()


def test_one_state_cannot_outvote_all_others_by_an_extreme() -> None:
    score = combine(np.array([-2.0, 2.0]), [np.array([1e9, 0.0]), np.array([-2.0, 2.0]), np.array([-2.0, 2.0])])
    assert score[0] < score[1]
