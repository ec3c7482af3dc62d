"""Evidence over model states, and what the base model's own samples add."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logit

from ka2l.knowledge.evidence import combine, filled
from ka2l.knowledge.semantic_entropy import disagreement_bounds


def test_the_base_model_alone_is_its_own_evidence() -> None:
    assert combine(np.array([-1.0, 0.5, 2.0])) == pytest.approx([-1.0, 0.5, 2.0])


def test_later_states_together_weigh_half_as_much_as_the_base_model() -> None:
    later = [np.array([1.0, 3.0]), np.array([3.0, 3.0])]
    assert combine(np.array([4.0, 0.0]), later) == pytest.approx([(4 + 0.5 * 2) / 1.5, (0 + 0.5 * 3) / 1.5])


def test_a_later_state_that_is_sure_of_everything_keeps_the_base_models_order() -> None:
    base = np.array([3.0, 1.0, -2.0])
    assert np.argsort(combine(base, [np.full(3, -40.0)])).tolist() == np.argsort(base).tolist()


def test_no_expert_can_outvote_all_others_by_an_extreme() -> None:
    score = combine(np.array([-3.0, 3.0]), [np.array([1e9, 0.0])], np.array([-3.0, 3.0]))
    assert score[0] < score[1]


def test_own_doubt_weighs_as_much_as_the_probe_that_predicts_it() -> None:
    assert combine(np.array([2.0, -3.0]), own_doubt=np.array([-1.0, 0.5])) == pytest.approx([0.5, -1.25])


def test_a_question_that_was_not_sampled_is_ranked_by_the_probes_alone() -> None:
    later = [np.array([1.0, 1.0])]
    score = combine(np.array([2.0, 2.0]), later, np.array([np.nan, 0.0]))
    assert score == pytest.approx([combine(np.array([2.0]), [np.array([1.0])])[0], (2 + 0.5 + 0) / 2.5])


def test_what_was_not_sampled_gets_the_doubt_that_its_probe_predicts_as_far_as_answers_can_show_it() -> None:
    least, most = logit(disagreement_bounds(10))
    found = filled(np.array([np.nan, np.nan, np.nan, -0.3]), np.array([-9.0, 0.5, 9.0, 4.0]), 10)
    assert found == pytest.approx([least, 0.5, most, -0.3])


def test_a_sampled_question_of_doubt_is_not_behind_one_that_was_not_sampled() -> None:
    probe = np.array([5.0, 4.9])
    _, most = logit(disagreement_bounds(10))
    score = combine(probe, own_doubt=filled(np.array([most, np.nan]), probe, 10))
    assert score[0] > score[1]
