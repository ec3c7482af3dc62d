"""Semantic entropy against published values and closed forms."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.knowledge.semantic_entropy import (
    disagreement,
    disagreement_bounds,
    discrete_semantic_entropy,
    expected_shares,
    mean_token_log_likelihood,
    predictive_entropy,
    weighted_semantic_entropy,
)


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> list[dict]:
    lines = (shared_dir / "vectors" / "uqlm_discrete_semantic_entropy.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_closed_forms() -> None:
    assert discrete_semantic_entropy([0, 1, 2, 1]) == pytest.approx(1.0397, abs=5e-5)
    assert discrete_semantic_entropy([0, 0, 1, 1]) == pytest.approx(math.log(2))
    assert discrete_semantic_entropy([5] * 10) == 0.0
    assert discrete_semantic_entropy(list(range(10))) == pytest.approx(math.log(10))


def test_published_entropies_follow_from_the_published_cluster_sizes(published: list[dict]) -> None:
    assert published
    for row in published:
        for sizes in row["cluster_sizes_consistent_with_entropy"]:
            ids = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
            assert discrete_semantic_entropy(ids) == pytest.approx(row["entropy"], abs=1e-6)


def test_lexical_clusters_of_the_published_responses_give_the_published_entropies(published: list[dict]) -> None:
    # uqlm clusters with an NLI model, which puts numbers of one answer apart or together by its own lights (row 4:
    # "32.5" with "30." or "32"); all other responses are plainly lexical.
    rows = [row for row in published if row["id"] != "uqlm-se-4"]
    result = cluster_answers([""] * len(rows), [row["responses"] for row in rows], LexicalEquivalence())
    for row, ids in zip(rows, result.ids, strict=True):
        assert sorted(Counter(ids).values(), reverse=True) in row["cluster_sizes_consistent_with_entropy"], row["id"]
        assert discrete_semantic_entropy(ids) == pytest.approx(row["entropy"], abs=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.randoms())
def test_discrete_entropy_is_bounded_and_blind_to_order_and_names(ids: list[int], random: object) -> None:
    entropy = discrete_semantic_entropy(ids)
    assert 0 <= entropy <= math.log(len(set(ids))) + 1e-12
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert discrete_semantic_entropy(shuffled) == entropy
    assert discrete_semantic_entropy([100 - i for i in ids]) == entropy


def test_weighted_entropy_sums_probabilities_within_a_cluster() -> None:
    logprobs = np.log([0.2, 0.1, 0.1])
    # Clusters of mass 0.3 and 0.1, normalised to 3/4 and 1/4.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert weighted_semantic_entropy([0, 0, 1], logprobs, ["Paris", "in Paris", "Rome"]) == pytest.approx(expected)


def test_weighted_entropy_counts_a_repeated_sequence_once() -> None:
    once = weighted_semantic_entropy([0, 1], np.log([0.3, 0.1]), ["Paris", "Rome"])
    thrice = weighted_semantic_entropy([0, 0, 0, 1], np.log([0.3, 0.3, 0.3, 0.1]), ["Paris", "Paris", "Paris", "Rome"])
    assert thrice == pytest.approx(once)


def test_weighted_entropy_survives_tiny_probabilities_and_missing_ones() -> None:
    assert weighted_semantic_entropy([0, 1], [-5000.0, -5000.0], ["a", "b"]) == pytest.approx(math.log(2))
    assert weighted_semantic_entropy([0, 1], [-1.0, -math.inf], ["a", "b"]) == 0.0
    assert math.isnan(weighted_semantic_entropy([0], [-math.inf], ["a"]))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-50, 0)), min_size=1, max_size=12),
    st.floats(-100, 0),
)
def test_weighted_entropy_is_bounded_and_blind_to_a_common_factor(rows: list[tuple[int, float]], shift: float) -> None:
    ids = [cluster for cluster, _ in rows]
    answers = [str(i) for i in range(len(rows))]
    entropy = weighted_semantic_entropy(ids, [logprob for _, logprob in rows], answers)
    assert 0 <= entropy <= math.log(len(set(ids))) + 1e-9
    shifted = weighted_semantic_entropy(ids, [logprob + shift for _, logprob in rows], answers)
    assert shifted == pytest.approx(entropy, abs=1e-9)


def test_sequence_scores() -> None:
    assert predictive_entropy([-1.0, -3.0]) == 2.0
    assert mean_token_log_likelihood(-6.0, 3) == -2.0
    assert mean_token_log_likelihood(0.0, 0) == 0.0


def test_no_answers_are_an_error() -> None:
    for score in (lambda: discrete_semantic_entropy([]), lambda: predictive_entropy([])):
        with pytest.raises(ValueError, match="no answers"):
            score()
    with pytest.raises(ValueError):
        weighted_semantic_entropy([0, 1], [-1.0], ["a", "b"])


# --- expected probabilities of meanings -------------------------------------------------------------------------------


DRAWN = st.lists(st.tuples(st.integers(0, 4), st.floats(-30, 0), st.integers(0, 3)), min_size=1, max_size=20)


@given(DRAWN)
def test_the_shares_of_what_was_drawn_and_of_what_was_not_come_to_one(drawn: list[tuple[int, float, int]]) -> None:
    ids, logprobs, wordings = map(list, zip(*drawn, strict=True))
    texts = [f"meaning {name}, wording {wording}" for name, wording in zip(ids, wordings, strict=True)]
    shares, unseen = expected_shares(ids, logprobs, texts)
    assert set(shares) == set(ids)
    assert min(shares.values()) > 0
    assert unseen >= 0
    assert sum(shares.values()) + unseen == pytest.approx(1.0)


def test_what_the_model_holds_certain_is_certain_however_few_its_answers() -> None:
    shares, unseen = expected_shares([0, 0], [0.0, 0.0], ["Paris", "Paris"])
    assert shares == {0: pytest.approx(1.0)}
    assert unseen == pytest.approx(0.0)


def test_an_answer_that_was_unlikely_leaves_room_for_others() -> None:
    likely, _ = expected_shares([0, 0, 0], [math.log(0.9)] * 3, ["Paris"] * 3)
    unlikely, _ = expected_shares([0, 0, 0], [math.log(0.3)] * 3, ["Paris"] * 3)
    assert likely[0] > unlikely[0] > 0.3


def test_long_answers_of_one_meaning_are_no_doubt_though_each_wording_is_unlikely() -> None:
    texts = [f"It is Paris, as far as I can tell, {place}" for place in range(10)]
    assert disagreement([0] * 10, [-20.0] * 10, texts) < 0.15
    assert disagreement(list(range(10)), [-20.0] * 10, texts) > 0.85


def test_disagreement_lies_within_what_so_many_answers_can_show() -> None:
    least, most = disagreement_bounds(5)
    assert disagreement([0] * 5, [0.0] * 5, ["Paris"] * 5) == pytest.approx(least)
    assert least < disagreement([0, 1, 2, 3, 4], [-9.0] * 5, list("abcde")) <= most
    assert disagreement_bounds(10)[0] < least


def test_one_answer_cannot_disagree_and_none_have_no_meaning() -> None:
    assert disagreement([0], [-1.0], ["Paris"]) is None
    with pytest.raises(ValueError, match="no answers"):
        expected_shares([], [], [])
