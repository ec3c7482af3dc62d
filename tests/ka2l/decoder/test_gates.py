from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from ka2l.decoder.config import DecoderConfig
from ka2l.decoder.gates import (
    NearestStates,
    Variant,
    diversity,
    first_of_text,
    is_well_formed,
    make_variants,
    needs_mark,
)
from ka2l.pool.rows import question_key

STATES = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
IDS = [f"q{index}" for index in range(6)]


def config(**values: Any) -> DecoderConfig:
    return DecoderConfig(kind="inversion", **values)


def variants(ids: list[str], states: np.ndarray, config: DecoderConfig, seed: int, noise: float = 0.5) -> list[Variant]:
    return make_variants(ids, states, config, seed, spread=states.std(axis=0), noise=noise)


def test_every_parent_gets_as_many_variants_of_each_kind_as_the_config_says() -> None:
    made = variants(IDS, STATES, config(num_sampled=1, num_noised=3, num_interpolated=2), 0)
    counts = Counter((variant.parents[0], variant.kind) for variant in made)
    assert counts == {
        (name, kind): n for name in IDS for kind, n in (("sampled", 1), ("noised", 3), ("interpolated", 2))
    }


def test_a_sampled_variant_is_the_parents_own_state() -> None:
    made = variants(IDS, STATES, config(num_sampled=1, num_noised=0, num_interpolated=0), 0)
    assert np.array_equal([variant.state for variant in made], STATES)


def test_noise_has_the_size_that_is_asked_for_in_units_of_the_layers_spread() -> None:
    states = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32) * np.arange(1, 9)
    ids = [f"q{index}" for index in range(400)]
    made = variants(ids, states, config(num_sampled=0, num_noised=1, num_interpolated=0), 0, noise=0.5)
    moved = np.stack([variant.state for variant in made]) - states
    assert moved.std(axis=0) / states.std(axis=0) == pytest.approx(0.5, rel=0.15)


def test_noise_of_a_parent_does_not_depend_on_the_order_of_the_others() -> None:
    only_noise = config(num_sampled=0, num_noised=2, num_interpolated=0)
    forward = {v.parents[0]: v.state for v in variants(IDS, STATES, only_noise, 5)}
    backward = {v.parents[0]: v.state for v in variants(IDS[::-1], STATES[::-1], only_noise, 5)}
    for name in IDS:
        assert forward[name] == pytest.approx(backward[name], rel=1e-5)


def test_a_mixture_lies_between_its_two_parents_and_nearer_to_the_first() -> None:
    made = variants(IDS, STATES, config(num_sampled=0, num_noised=0, num_interpolated=2), 0)
    for variant in made:
        first, second = (STATES[IDS.index(name)] for name in variant.parents)
        assert first is not second
        to_first, to_second = np.linalg.norm(variant.state - first), np.linalg.norm(variant.state - second)
        assert to_first <= to_second + 1e-5
        assert to_first + to_second == pytest.approx(np.linalg.norm(first - second), rel=1e-4)


def test_one_unknown_question_alone_has_no_neighbours_to_mix_with() -> None:
    made = variants(IDS[:1], STATES[:1], config(num_sampled=1, num_noised=1, num_interpolated=2), 0)
    assert [variant.kind for variant in made] == ["sampled", "noised"]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Where was Ada born?", True),
        ("Where was Ada born", False),
        ("", False),
        ("Ada?", False),
        ("Where? was Ada born?", False),
        ("Where was was was Ada born?", False),
        ("Where was Ada\x00 born?", False),
        (" ".join(["word", "other"] * 31) + "?", False),
    ],
)
def test_well_formed_means_some_words_no_stutter_and_one_mark(text: str, good: bool) -> None:
    assert is_well_formed(text, marked=True) is good


def test_questions_of_a_pool_without_marks_need_none() -> None:
    assert not needs_mark(["who wrote hamlet", "where is paris", "is it?"])
    assert needs_mark(["Who wrote Hamlet?", "Where is Paris?"])
    assert is_well_formed("who wrote hamlet", marked=False)


def test_a_text_counts_once_and_not_at_all_where_it_is_taken() -> None:
    texts = ["Where is Paris?", "where is  paris", "Who is Ada?", "What is tea?"]
    assert first_of_text(texts, {question_key("who is Ada")}).tolist() == [True, False, False, True]


def test_similarity_is_the_cosine_of_centred_states() -> None:
    near = NearestStates(np.array([[11.0, 10.0], [10.0, 12.0]]), np.array([10.0, 10.0]))
    near.add(np.array([[15.0, 10.0], [9.0, 9.0]]))
    assert near.similarity == pytest.approx([1.0, 0.0], abs=1e-6)


def test_of_two_states_alike_only_the_first_in_order_is_new() -> None:
    near = NearestStates(np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]), np.zeros(2))
    assert near.first_of_kind(np.array([1, 0, 2]), 0.9).tolist() == [True, False, True]


def test_diversity_is_the_share_of_different_words_and_pairs() -> None:
    assert diversity(["a b a", "a b"]) == {"distinct_1": 2 / 5, "distinct_2": 2 / 3}
    assert diversity([]) == {"distinct_1": 0.0, "distinct_2": 0.0}
