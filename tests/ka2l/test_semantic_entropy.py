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

from ka2l.equivalence import LexicalEquivalence, cluster_answers
from ka2l.semantic_entropy import (
    discrete_semantic_entropy,
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
