"""The second axis: what a head on hidden states learns of answers that are sure and wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from ka2l.evaluation.statistics import auroc
from ka2l.knowledge.wrongness import QUADRANTS, fit_correctness, quadrants


class Answered(NamedTuple):
    states: np.ndarray
    evidence: np.ndarray
    wrong: np.ndarray


def answered(num_questions: int, seed: int, share_bad: float = 0.2, width: int = 16) -> Answered:
    """Questions of which the uncertain are wrong, and of the certain those of one bad source, which one direction of
    the states shows. The evidence for unknown says nothing about the source."""
    rng = np.random.default_rng(seed)
    from_bad_source = rng.random(num_questions) < share_bad
    uncertain = rng.random(num_questions) < 0.4
    states = rng.normal(size=(num_questions, width))
    states[:, 0] += 4 * from_bad_source
    evidence = np.where(uncertain, 5.0, -5.0) + rng.normal(size=num_questions)
    return Answered(states, evidence, uncertain | from_bad_source)


def test_the_head_finds_confident_mistakes_that_the_evidence_cannot_see() -> None:
    seen, rest = answered(150, seed=0), answered(2_000, seed=1)
    predicted = fit_correctness(*seen, seed=0).predict(rest.states, rest.evidence)
    certain = rest.evidence < 0
    by_evidence = auroc(rest.wrong[certain], rest.evidence[certain])
    by_head = auroc(rest.wrong[certain], predicted[certain])
    assert by_evidence is not None
    assert by_head is not None
    assert by_evidence < 0.6 < 0.9 < by_head


def test_its_probabilities_are_calibrated() -> None:
    seen, rest = answered(600, seed=2), answered(4_000, seed=3)
    predicted = fit_correctness(*seen, seed=0).predict(rest.states, rest.evidence)
    assert predicted.mean() == pytest.approx(rest.wrong.mean(), abs=0.05)
    certain = rest.evidence < -1
    assert predicted[certain].mean() == pytest.approx(rest.wrong[certain].mean(), abs=0.06)


def test_uncertain_questions_do_not_teach_it_about_certain_ones() -> None:
    rng = np.random.default_rng(4)
    certain, uncertain = answered(200, seed=5, share_bad=0.3), rng.normal(size=(800, 16))
    uncertain[:, 1] += 4  # all of them wrong: a head that listened would call this direction wrong
    head = fit_correctness(
        np.concatenate([certain.states, uncertain]),
        np.concatenate([certain.evidence, np.full(800, 6.0)]),
        np.concatenate([certain.wrong, np.ones(800, dtype=bool)]),
        seed=0,
    )
    probe = np.zeros((2, 16))
    probe[1, 1] = 4
    plain, shifted = head.predict(probe, np.full(2, -6.0))
    assert shifted < plain + 0.2


def test_a_confident_answer_is_held_right_until_annotation_has_shown_others() -> None:
    rng = np.random.default_rng(0)
    uncertain_alone = fit_correctness(rng.normal(size=(300, 4)), np.full(300, 3.5), rng.random(300) < 0.97, seed=0)
    assert uncertain_alone.classifier is None
    sure, unsure = uncertain_alone.predict(rng.normal(size=(2, 4)), np.array([-3.0, 3.0]))
    assert sure < 0.1 < 0.9 < unsure


@pytest.mark.parametrize("wrong", [np.zeros(8, bool), np.ones(8, bool), np.arange(8) < 1])
def test_too_few_mistakes_or_right_answers_give_the_base_rate(wrong: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    head = fit_correctness(rng.normal(size=(8, 4)), np.full(8, -2.0), wrong, seed=0)
    predicted = head.predict(rng.normal(size=(5, 4)), np.full(5, -2.0))
    assert np.isfinite(predicted).all()
    assert np.ptp(predicted) == pytest.approx(0.0)
    assert abs(predicted[0] - wrong.mean()) < 0.3


def test_two_confident_mistakes_already_show_where_others_are() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(40, 16))
    wrong = np.arange(40) < 2
    states[wrong, 0] += 6
    head = fit_correctness(states, np.full(40, -5.0), wrong, seed=0)
    others = rng.normal(size=(20, 16))
    others[:10, 0] += 6
    predicted = head.predict(others, np.full(20, -5.0))
    assert predicted[:10].min() > predicted[10:].max()


def test_constant_states_and_no_questions_to_predict_are_no_trouble() -> None:
    seen = answered(40, seed=6)
    head = fit_correctness(np.ones((40, 3)), seen.evidence, seen.wrong, seed=0)
    assert np.isfinite(head.predict(np.ones((4, 3)), np.zeros(4))).all()
    assert head.predict(np.empty((0, 3)), np.empty(0)).shape == (0,)


def test_the_same_seed_gives_the_same_head() -> None:
    seen, rest = answered(100, seed=7), answered(20, seed=8)
    first, second = (fit_correctness(*seen, seed=3).predict(rest.states, rest.evidence) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(ValueError, match="disagree"):
        fit_correctness(np.empty((0, 3)), np.empty(0), np.empty(0, bool), seed=0)
    with pytest.raises(ValueError, match="disagree"):
        fit_correctness(np.ones((2, 3)), np.ones(3), np.ones(2, bool), seed=0)


def test_the_two_axes_cross_into_four_quadrants() -> None:
    evidence, p_wrong = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([0.1, 0.9, 0.5, 0.4])
    assert tuple(quadrants(evidence, p_wrong)) == QUADRANTS
