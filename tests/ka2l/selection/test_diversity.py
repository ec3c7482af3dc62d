"""Strategies that spread over hidden states: what they cover, and that they cope with any pool."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ka2l.selection import diversity
from ka2l.selection.strategies import Candidates, Selected, SelectionConfig, select

COMPARED = SelectionConfig.COMPARED
KINDS = ("probe_diverse", *COMPARED)


def pick(candidates: Candidates, kind: str, budget: int = 12, seed: int = 0, **config: Any) -> Selected:
    return select(candidates, SelectionConfig(kind=kind, budget=budget, **config), seed)


def candidates_at(states: Any, p_unknown: Any = 0.5, asked: Any = None) -> Candidates:
    """Candidates with these states."""
    states = np.asarray(states, dtype=np.float32)
    p_unknown = np.broadcast_to(p_unknown, len(states)).astype(np.float64)
    ids = [f"q{index}" for index in range(len(states))]
    asked = None if asked is None else np.asarray(asked, dtype=np.float32)
    return Candidates(ids, np.log(p_unknown / (1 - p_unknown)), p_unknown, states=states, asked_states=asked)


def blobs(*sizes: int, spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States in well-separated clusters of these sizes, shape (num_states, 8), and the cluster of each."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    centres = 10 * rng.normal(size=(len(sizes), 8))
    return centres[cluster] + spread * rng.normal(size=(len(cluster), 8)), cluster


@st.composite
def pools(draw: st.DrawFn) -> tuple[Candidates, int]:
    """Candidates, perhaps with equal states and with asked ones, and a budget from 1 to all of them."""
    num_candidates = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    num_distinct = draw(st.sampled_from([1, 2, 5, num_candidates]))
    values = rng.normal(size=(num_distinct, 4))
    states = values[rng.integers(0, num_distinct, size=num_candidates)]
    asked = draw(st.sampled_from([None, values[:1], rng.normal(size=(7, 4))]))
    p_unknown = rng.choice([0.1, 0.5, 0.9], size=num_candidates) if draw(st.booleans()) else rng.random(num_candidates)
    return candidates_at(states, np.clip(p_unknown, 0.01, 0.99), asked), draw(st.integers(1, num_candidates))


@settings(max_examples=30)
@pytest.mark.parametrize("kind", KINDS)
@given(pool=pools(), seed=st.integers(0, 1000))
def test_any_pool_gives_the_budget_without_repeats_whatever_its_order(
    kind: str, pool: tuple[Candidates, int], seed: int
) -> None:
    candidates, budget = pool
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selected = pick(candidates, kind, budget, seed)
    assert len(set(selected.indices.tolist())) == len(selected.indices) == len(selected.scores) == budget
    np.testing.assert_array_equal(selected.scores, candidates.score[selected.indices])
    order = np.random.default_rng(seed).permutation(len(candidates.question_ids))
    other = candidates.take(order)
    again = pick(other, kind, budget, seed)
    assert order[again.indices].tolist() == selected.indices.tolist()


def clustered(seed: int = 0) -> tuple[Candidates, np.ndarray]:
    """120 candidates in 12 clusters; the scores favour cluster 0, then cluster 1, and so on; three are known."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(12), 10)
    centres = rng.normal(size=(12, 16)) * 10
    scales = np.logspace(0, 3, 16)  # no single dimension may decide
    score = 8.5 - cluster + 0.1 * rng.normal(size=120)
    states = (centres[cluster] + rng.normal(size=(120, 16))) * scales
    return Candidates([f"q{i}" for i in range(120)], score, 1 / (1 + np.exp(-score)), None, states), cluster


def test_diverse_covers_more_clusters_than_the_plain_top() -> None:
    candidates, cluster = clustered()
    diverse = pick(candidates, "probe_diverse", budget=10, pool_factor=6)
    plain = pick(candidates, "probe", budget=10)
    assert len(set(cluster[plain.indices])) == 1
    assert set(cluster[diverse.indices]) == set(range(6))


def test_diverse_starts_from_the_best_and_stays_among_the_likely_unknown() -> None:
    candidates, _ = clustered()
    selected = pick(candidates, "probe_diverse", budget=10, pool_factor=3)
    assert selected.indices[0] == candidates.score.argmax()
    assert selected.scores.min() >= np.sort(candidates.score)[::-1][29]
    np.testing.assert_array_equal(candidates.score[selected.indices], selected.scores)


def test_diverse_with_a_factor_of_one_is_the_plain_top_in_another_order() -> None:
    candidates, _ = clustered()
    diverse = pick(candidates, "probe_diverse", budget=10, pool_factor=1)
    assert set(diverse.indices) == set(pick(candidates, "probe", budget=10).indices)


def test_diverse_leaves_known_questions_alone_while_the_unknown_fill_the_budget() -> None:
    candidates, cluster = clustered()
    assert candidates.states is not None
    candidates.states[cluster >= 9] *= 100  # outliers, which are the farthest from everything
    assert cluster[pick(candidates, "probe_diverse", budget=60).indices].max() == 8
    more = pick(candidates, "probe_diverse", budget=95)
    assert set(more.indices) == set(pick(candidates, "probe", budget=95).indices)


def test_diverse_copes_with_equal_states() -> None:
    candidates = candidates_at(np.ones((60, 8)))
    assert len(set(pick(candidates, "probe_diverse", budget=30).indices.tolist())) == 30


@pytest.mark.parametrize("kind", COMPARED)
def test_no_more_than_the_cap_is_compared_and_which_is_up_to_the_seed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "MAX_COMPARED", 20)
    states, _ = blobs(50, 50)
    seen = [set(pick(candidates_at(states), kind, 20, seed).indices.tolist()) for seed in range(4)]
    assert len(set.union(*seen)) > 40  # of each 20 compared all are chosen
    assert len(pick(candidates_at(states), kind, 30).indices) == 30  # the budget goes first


@pytest.mark.parametrize("kind", ["core_set", "typi_clust", "prob_cover"])
def test_what_was_asked_in_earlier_rounds_is_not_asked_about_again(kind: str) -> None:
    states, cluster = blobs(40, 40, 40, 40)
    chosen = pick(candidates_at(states, asked=states[cluster < 2][::8]), kind, budget=2).indices
    assert sorted(cluster[chosen]) == [2, 3]


@pytest.mark.parametrize("kind", ["core_set", "typi_clust", "prob_cover"])
def test_the_scores_decide_nothing(kind: str) -> None:
    states, _ = blobs(20, 20, 20)
    certain, doubtful = candidates_at(states, 0.001), candidates_at(states, np.linspace(0.01, 0.99, 60))
    np.testing.assert_array_equal(pick(certain, kind).indices, pick(doubtful, kind).indices)


def test_core_set_reaches_a_small_far_cluster() -> None:
    states, cluster = blobs(200, 2, 200)
    assert set(cluster[pick(candidates_at(states), "core_set", budget=3).indices]) == {0, 1, 2}


@pytest.mark.parametrize("num_asked", [0, 4])
def test_core_set_chooses_as_scikit_activeml_does(num_asked: int) -> None:
    from skactiveml.pool import CoreSet

    states = np.random.default_rng(3).normal(size=(150, 6))
    states = (states - states.mean(0)) / states.std(0)
    asked = np.random.default_rng(4).normal(size=(num_asked, 6))
    ours = pick(candidates_at(states, asked=asked), "core_set", budget=20).indices
    # Theirs draws the first question of all, too, but another.
    labels = np.where(np.arange(150 + num_asked) < 150, np.nan, 1.0)
    if not num_asked:
        labels[ours[0]] = 1.0
    theirs = CoreSet(random_state=0).query(np.concatenate([states, asked]), labels, batch_size=19)
    assert ours[0 if num_asked else 1 :][:19].tolist() == theirs.tolist()


def test_typi_clust_takes_the_densest_question_of_each_cluster_the_largest_first() -> None:
    rng = np.random.default_rng(0)
    sizes = (60, 90, 30)
    centres = 10 * np.eye(3)
    # Most of a cluster lies close to its centre; the others lie far apart from each other.
    parts = [centre + rng.normal(size=(size, 3)) * np.where(np.arange(size) < size - 5, 0.1, 2.0)[:, None]
             for centre, size in zip(centres, sizes, strict=True)]  # fmt: skip
    cluster = np.repeat(np.arange(3), sizes)
    chosen = pick(candidates_at(np.concatenate(parts)), "typi_clust", budget=3).indices
    assert cluster[chosen].tolist() == [1, 0, 2]
    assert all(np.linalg.norm(np.concatenate(parts)[row] - centres[cluster[row]]) < 0.2 for row in chosen)


def test_typi_clust_goes_round_the_clusters_once_there_are_as_many_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "MAX_CLUSTERS", 4)
    states, cluster = blobs(30, 30, 30, 30)
    chosen = pick(candidates_at(states), "typi_clust", budget=16).indices
    assert all(sorted(cluster[part]) == [0, 1, 2, 3] for part in chosen.reshape(4, 4))


def test_typi_clust_leaves_small_clusters_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "MAX_CLUSTERS", 3)
    states, cluster = blobs(40, 40, 2)
    chosen = pick(candidates_at(states), "typi_clust", budget=82).indices
    assert set(cluster[chosen[-2:]]) == {2}


def test_prob_cover_covers_more_than_random_does() -> None:
    states, _ = blobs(100, 100, 5, 5, 5, 5, spread=2.0)
    candidates = candidates_at(states)
    chosen = pick(candidates, "prob_cover", budget=6).indices
    scaled = (states - states.mean(0)) / states.std(0)
    radius = diversity._pure_radius(scaled, diversity._clusters(scaled, 2, 0))
    distances = np.linalg.norm(scaled[:, None] - scaled, axis=2)

    def share(rows: np.ndarray) -> float:
        return float((distances[:, rows] <= radius).any(axis=1).mean())

    assert share(chosen[:1]) == pytest.approx(max(share(np.array([row])) for row in range(220)))
    others = [share(pick(candidates, "random", budget=6, seed=seed).indices) for seed in range(20)]
    assert share(chosen) > max(others)


def test_the_radius_of_prob_cover_is_the_largest_pure_one() -> None:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(300, 2))
    classes = (states[:, 0] > 0).astype(int)
    radius = diversity._pure_radius(states, classes)
    distances = np.linalg.norm(states[:, None] - states, axis=2)

    def purity(at: float) -> float:
        return 1 - float(((distances <= at) & (classes[:, None] != classes)).any(axis=1).mean())

    assert purity(radius * (1 - 1e-6)) >= 0.95 > purity(radius * (1 + 1e-6))


@pytest.mark.filterwarnings("ignore:The maximum purity")
def test_prob_cover_chooses_as_scikit_activeml_does_at_the_same_radius() -> None:
    from skactiveml.pool import ProbCover

    states = np.random.default_rng(2).normal(size=(200, 3))
    states = (states - states.mean(0)) / states.std(0)
    radius = diversity._pure_radius(states, diversity._clusters(states, 2, 0))
    theirs, gains = ProbCover(deltas=[radius], random_state=0).query(
        states, np.full(200, np.nan), batch_size=20, return_utilities=True
    )
    ours = pick(candidates_at(states), "prob_cover", budget=20).indices
    unique = [row for row in range(20) if (gains[row] == np.nanmax(gains[row])).sum() == 1]
    assert len(unique) >= 1
    assert ours[: unique[0]].tolist() == theirs[: unique[0]].tolist()


def test_badge_asks_where_the_probe_is_undecided_and_spreads_there() -> None:
    states, cluster = blobs(50, 50, 50, 50)
    p_unknown = np.where(np.arange(200) % 2, 0.45, 0.999)  # every other question is doubtful
    doubtful = p_unknown < 0.5
    for seed in range(5):
        chosen = pick(candidates_at(states, p_unknown), "badge", budget=8, seed=seed).indices
        assert set(cluster[chosen[doubtful[chosen]]]) == {0, 1, 2, 3}
        assert doubtful[chosen].sum() >= 7  # one with no gradient to speak of stands for all of those


def test_badge_starts_with_the_longest_gradient() -> None:
    states = np.random.default_rng(0).normal(size=(100, 8))
    p_unknown = np.full(100, 0.9)
    p_unknown[17] = 0.5
    scaled = (states - states.mean(0)) / states.std(0)
    lengths = np.minimum(p_unknown, 1 - p_unknown) * np.linalg.norm(scaled, axis=1)
    assert pick(candidates_at(states, p_unknown), "badge", budget=1).indices[0] == lengths.argmax()
