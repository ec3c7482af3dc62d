"""Answers are drawn until the posterior of the semantic entropy is narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka2l.sampling.early_stop import (
    CONCENTRATIONS,
    FIRST,
    NUM_MEANINGS,
    WAVE,
    _dirichlet_entropy,
    draw_until_settled,
    entropy_posterior,
    expected_entropy,
    is_settled,
)
from ka2l.sampling.sampler import Generation, Request, rejected

CLUSTERS = st.lists(st.integers(0, 9), min_size=1, max_size=20)


@pytest.mark.parametrize("concentration", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("counts", [(4,), (3, 1), (1, 1, 1, 1), (5, 3, 2)])
def test_both_moments_are_those_of_entropies_drawn_from_the_dirichlet(
    counts: tuple[int, ...], concentration: float
) -> None:
    parameters = np.array([*counts, *([0] * (12 - len(counts)))]) + concentration
    mean, second = _dirichlet_entropy(parameters, np.ones(12))
    drawn = np.random.default_rng(0).dirichlet(parameters, 200_000)
    entropies = -(drawn * np.log(np.maximum(drawn, 1e-300))).sum(axis=1)
    assert mean == pytest.approx(entropies.mean(), abs=4 * entropies.std() / math.sqrt(200_000))
    assert second == pytest.approx((entropies**2).mean(), abs=4 * (entropies**2).std() / math.sqrt(200_000))


def test_equal_parameters_may_be_given_once_with_their_number() -> None:
    whole = _dirichlet_entropy(np.array([4.5, 0.5, 0.5, 0.5]), np.ones(4))
    assert _dirichlet_entropy(np.array([4.5, 0.5]), np.array([1, 3])) == pytest.approx(whole)


@given(CLUSTERS)
def test_the_entropy_is_one_that_its_meanings_can_have(ids: list[int]) -> None:
    found = entropy_posterior(ids)
    assert 0 <= found.mean <= math.log(NUM_MEANINGS)
    assert 0 <= found.deviation < math.log(NUM_MEANINGS)


@given(CLUSTERS, st.randoms())
def test_neither_order_nor_names_of_clusters_matter(ids: list[int], random) -> None:  # type: ignore[no-untyped-def]
    renamed = [100 - name for name in ids]
    random.shuffle(renamed)
    assert entropy_posterior(renamed) == entropy_posterior(ids)


@pytest.mark.parametrize("ids", [[0], [0, 1], [0, 0, 1], [0, 1, 2]])
def test_more_answers_of_the_same_kind_narrow_it(ids: list[int]) -> None:
    assert entropy_posterior(ids * 8).deviation < entropy_posterior(ids).deviation


def test_with_many_answers_it_is_the_entropy_of_their_shares() -> None:
    ids = [0] * 500 + [1] * 300 + [2] * 200
    shares = np.array([0.5, 0.3, 0.2])
    assert entropy_posterior(ids).mean == pytest.approx(-(shares * np.log(shares)).sum(), abs=0.02)


def test_agreement_and_disagreement_are_settled_at_once_and_what_lies_between_is_not() -> None:
    assert is_settled(["Paris"] * FIRST)
    assert is_settled(["Paris", "Lyon", "Nice", "Lille", "Metz", "Brest"])
    assert not is_settled(["Paris", "Paris", "Lyon", "Nice"])
    assert is_settled(["Paris", "paris.", "Paris ", "PARIS"]), "one answer in four spellings"


def test_an_unsure_question_is_asked_on_and_then_settled() -> None:
    answers = ["Paris", "Lyon"]
    lengths = [count for count in range(FIRST, 60, 2) if is_settled((answers * 30)[:count])]
    assert lengths
    assert lengths[0] > FIRST


def test_doubt_rises_from_agreement_to_disagreement_and_falls_with_more_agreement() -> None:
    rising = ([0] * 6, [0] * 4, [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3])
    means = [entropy_posterior(ids).mean for ids in rising]
    assert means == sorted(means)
    assert len(set(means)) == len(means)


def test_no_answers_have_no_entropy() -> None:
    with pytest.raises(ValueError, match="no answers"):
        entropy_posterior([])


def test_the_prior_holds_sure_and_guessing_models() -> None:
    assert min(CONCENTRATIONS) * NUM_MEANINGS < 0.2
    assert max(CONCENTRATIONS) >= 1


# --- drawing ---------------------------------------------------------------------------------------------------------


class Scripted:
    """Sample i of the prompt [n] is answer ``(seed + i) mod n``: one answer for n = 1, never the same one for many."""

    def __init__(self) -> None:
        self.num_drawn = 0
        self.num_calls = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        self.num_calls += 1
        self.num_drawn += sum(request.num_samples for request in requests)
        return [
            [
                Generation(f"answer {(request.seed + i) % request.prompt_token_ids[0]}", (1,), -1.0, 1, "stop")
                for i in range(request.num_samples)
            ]
            for request in requests
        ]


def requests_of(*kinds: int) -> list[Request]:
    return [Request([kind], 10, 1.0, seed=100 * row) for row, kind in enumerate(kinds)]


def test_what_is_drawn_is_the_beginning_of_what_would_have_been_drawn_at_once() -> None:
    requests = requests_of(1, 2, 3, 1000)
    whole = Scripted().generate(requests)
    found = draw_until_settled(Scripted(), requests, [True] * 4)
    for some, every in zip(found, whole, strict=True):
        assert some == every[: len(some)]
        assert len(some) >= FIRST
        assert len(some) == 10 or is_settled([answer.answer for answer in some])


def test_sure_and_lost_questions_are_done_early_and_purposes_that_may_not_stop_get_all() -> None:
    counts = [len(row) for row in draw_until_settled(Scripted(), requests_of(1, 1000, 1), [True, True, False])]
    assert counts[0] == FIRST
    assert FIRST < counts[1] < 10
    assert counts[2] == 10


def test_all_open_questions_are_asked_together() -> None:
    sampler = Scripted()
    draw_until_settled(sampler, requests_of(*[2] * 20), [True] * 20)
    assert sampler.num_calls <= 1 + (10 - FIRST) // WAVE


def test_a_prompt_that_does_not_fit_is_not_asked_again() -> None:
    class Refusing(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
            super().generate(requests)
            return [rejected(request) for request in requests]

    sampler = Refusing()
    found = draw_until_settled(sampler, requests_of(5), [True])
    assert sampler.num_calls == 1
    assert {answer.finish_reason for answer in found[0]} == {"rejected"}


def test_fewer_answers_than_the_first_wave_are_drawn_at_once() -> None:
    (made,) = draw_until_settled(Scripted(), [Request([7], FIRST - 1, 1.0, 0)], [True])
    assert len(made) == FIRST - 1


# --- the entropy in the end ------------------------------------------------------------------------------------------


def of_paris(probability: float, num_answers: int = FIRST) -> float:
    return expected_entropy([0] * num_answers, [math.log(probability)] * num_answers, ["Paris"] * num_answers)


def test_agreement_on_what_the_model_holds_certain_is_no_entropy() -> None:
    assert of_paris(1.0) == pytest.approx(0.0, abs=1e-9)


def test_of_questions_whose_answers_all_agree_the_likelier_answer_has_less() -> None:
    found = [of_paris(probability) for probability in (0.99, 0.9, 0.5, 0.1)]
    assert found == sorted(found)
    assert len(set(found)) == 4


def test_more_answers_that_agree_leave_less() -> None:
    assert of_paris(0.5, 10) < of_paris(0.5, 5) < of_paris(0.5, 3)


def test_with_many_answers_their_counts_alone_decide() -> None:
    ids = [0] * 500 + [1] * 500
    unlikely = expected_entropy(ids, [-9.0] * 1000, [f"answer {name}" for name in ids])
    assert unlikely == pytest.approx(math.log(2), abs=0.1)


def test_a_text_drawn_twice_has_its_probability_once_and_wordings_of_a_meaning_add_up() -> None:
    log_half = math.log(0.5)
    again = expected_entropy([0, 0, 0], [log_half] * 3, ["Paris"] * 3)
    reworded = expected_entropy([0, 0, 0], [log_half, log_half, log_half], ["Paris", "Paris", "It is Paris"])
    assert reworded == pytest.approx(0.0, abs=1e-9)
    assert again > 0.3


def test_long_answers_that_agree_in_other_words_are_less_doubtful_than_short_ones_that_do_not() -> None:
    wordings = [f"It is Paris, as far as I can tell, {place}" for place in range(FIRST)]
    long = expected_entropy([0] * FIRST, [-20.0] * FIRST, wordings)
    short = expected_entropy([0, 1, 0], [math.log(0.5), math.log(0.3), math.log(0.5)], ["Paris", "Lyon", "Paris"])
    assert long < short


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_without_log_probabilities_what_was_drawn_still_orders_questions(logprob: float) -> None:
    texts = ["Paris", "Lyon", "Nice"]
    found = [expected_entropy(ids, [logprob] * 3, texts) for ids in ([0, 0, 0], [0, 0, 1], [0, 1, 2])]
    assert found == sorted(found)
    assert all(math.isfinite(value) for value in found)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-30, 0)), min_size=1, max_size=20), st.randoms())
def test_neither_order_nor_names_of_clusters_matter_to_it(drawn: list[tuple[int, float]], random) -> None:  # type: ignore[no-untyped-def]
    rows = [(name, logprob, f"text {place}") for place, (name, logprob) in enumerate(drawn)]
    found = expected_entropy(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]
    random.shuffle(rows)
    ids, logprobs, texts = map(list, zip(*rows, strict=True))
    assert found == pytest.approx(expected_entropy([9 - name for name in ids], logprobs, texts))
    assert found >= 0


def test_no_answers_have_no_expected_entropy() -> None:
    with pytest.raises(ValueError, match="no answers"):
        expected_entropy([], [], [])
