"""Query strategies: what they pick, and that nothing but ids, values and the seed decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ka2l.errors import BudgetError, ConfigError
from ka2l.selection import diversity
from ka2l.selection.strategies import (
    STRATEGIES,
    Candidates,
    Selected,
    SelectionConfig,
    Shortlist,
    explored_share,
    num_likely,
    select,
)

KINDS = SelectionConfig.KINDS


def make_candidates(num_candidates: int = 60, seed: int = 0, ties: bool = False) -> Candidates:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=num_candidates)
    return Candidates(
        question_ids=[f"q{index}" for index in range(num_candidates)],
        score=np.round(score) if ties else score,
        p_unknown=1 / (1 + np.exp(-score)),
        entropy=rng.integers(0, 4, size=num_candidates) / 2 if ties else rng.random(num_candidates),
        states=rng.normal(size=(num_candidates, 8)),
        p_wrong=rng.integers(0, 4, size=num_candidates) / 4 if ties else rng.random(num_candidates),
        predictive_entropy=rng.integers(0, 4, size=num_candidates) / 2 if ties else rng.random(num_candidates),
        perplexity=rng.integers(1, 4, size=num_candidates) / 2 if ties else rng.random(num_candidates),
        asked_states=rng.normal(size=(5, 8)),
    )


def shuffled(candidates: Candidates, seed: int) -> Candidates:
    return candidates.take(np.random.default_rng(seed).permutation(len(candidates.question_ids)))


def pick(candidates: Candidates, kind: str, budget: int = 12, seed: int = 0, **config: Any) -> Selected:
    return select(candidates, SelectionConfig(kind=kind, budget=budget, **config), seed)


def ids(candidates: Candidates, selected: Selected) -> list[str]:
    return [candidates.question_ids[index] for index in selected.indices]


def test_every_kind_has_a_strategy() -> None:
    assert tuple(STRATEGIES) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_budget_without_repeats(kind: str) -> None:
    for budget in (1, 2, 12, 60):
        selected = pick(make_candidates(), kind, budget)
        assert len(selected.indices) == len(selected.scores) == len(set(selected.indices.tolist())) == budget


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_candidates_does_not_matter(kind: str, ties: bool) -> None:
    candidates = make_candidates(ties=ties)
    expected = pick(candidates, kind)
    for seed in range(5):
        other = shuffled(candidates, seed)
        selected = pick(other, kind)
        assert ids(other, selected) == ids(candidates, expected)
        np.testing.assert_array_equal(selected.scores, expected.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_picks_the_same(kind: str) -> None:
    candidates = make_candidates(ties=True)
    np.testing.assert_array_equal(pick(candidates, kind, seed=3).indices, pick(candidates, kind, seed=3).indices)


def test_probe_takes_the_highest_scores_best_first() -> None:
    candidates = make_candidates()
    selected = pick(candidates, "probe")
    np.testing.assert_array_equal(selected.scores, np.sort(candidates.score)[::-1][:12])
    np.testing.assert_array_equal(candidates.score[selected.indices], selected.scores)


def test_semantic_entropy_takes_the_highest_entropies_best_first() -> None:
    candidates = make_candidates()
    selected = pick(candidates, "semantic_entropy")
    np.testing.assert_array_equal(selected.scores, np.sort(candidates.entropy)[::-1][:12])


def test_known_is_the_reverse_of_probe() -> None:
    candidates = make_candidates()
    known, probed = (pick(candidates, kind, budget=60) for kind in ("known", "probe"))
    np.testing.assert_array_equal(known.indices, probed.indices[::-1])
    np.testing.assert_array_equal(known.scores, np.sort(candidates.score))


@pytest.mark.parametrize("kind", ["entropy", "perplexity"])
def test_takes_the_highest_of_what_it_is_named_after(kind: str) -> None:
    candidates = make_candidates()
    values = candidates.perplexity if kind == "perplexity" else candidates.predictive_entropy
    assert values is not None
    selected = pick(candidates, kind)
    assert selected.indices.tolist() == np.argsort(-values)[:12].tolist()
    np.testing.assert_array_equal(selected.scores, values[selected.indices])


def test_ties_are_settled_by_the_seed_and_only_ties() -> None:
    candidates = make_candidates(ties=True)
    picks = [pick(candidates, "probe", seed=seed) for seed in range(6)]
    assert len({tuple(ids(candidates, selected)) for selected in picks}) > 1
    for selected in picks:
        np.testing.assert_array_equal(selected.scores, picks[0].scores)


def test_random_is_uniform_over_seeds() -> None:
    candidates = make_candidates(20)
    counts = np.zeros(20)
    for seed in range(2000):
        counts[pick(candidates, "random", budget=5, seed=seed).indices] += 1
    # Each count is binomial(2000, 1/4) with standard deviation 19.4.
    assert np.abs(counts - 500).max() < 4.5 * 19.4


def test_random_does_not_look_at_the_scores() -> None:
    candidates = make_candidates()
    other = candidates._replace(score=-candidates.score, entropy=None, states=None)
    np.testing.assert_array_equal(pick(candidates, "random").indices, pick(other, "random").indices)


def test_two_axis_takes_what_is_most_likely_wrong_however_sure_the_model_is() -> None:
    candidates = make_candidates()
    selected = pick(candidates, "two_axis", 10, explore=0)
    assert candidates.p_wrong is not None
    assert selected.indices.tolist() == np.argsort(-candidates.p_wrong)[:10].tolist()
    np.testing.assert_array_equal(selected.scores, np.sort(candidates.p_wrong)[::-1][:10])


def test_two_axis_starts_with_the_evidence_for_unknown_where_nothing_is_annotated_yet() -> None:
    candidates = make_candidates()._replace(p_wrong=None)
    np.testing.assert_array_equal(
        pick(candidates, "two_axis", 10, explore=0).indices, pick(candidates, "probe", 10).indices
    )


def test_two_axis_explores_a_share_of_what_looks_known_spread_over_the_ranks() -> None:
    score = np.concatenate([np.full(100, 50.0), np.full(100, -5.0), np.full(100, 2.0)])
    p_wrong = np.concatenate([np.full(100, 0.9), np.full(200, 0.1)])
    candidates = make_candidates(300)._replace(score=score, p_wrong=p_wrong)
    known = np.zeros(300, dtype=bool)
    known[100:200] = True
    seen = set()
    for seed in range(5):
        chosen = pick(candidates, "two_axis", 50, seed=seed, explore=0.2).indices
        assert known[chosen].sum() + (score[chosen] == 2.0).sum() == 10
        assert all(np.isin(part, np.flatnonzero(p_wrong < 0.5)).sum() == 2 for part in chosen.reshape(5, 10))
        seen.update(chosen[known[chosen]].tolist())
    assert len(seen) > 30  # of 50 drawn: mostly known ones, and others each time


def test_two_axis_explores_most_where_known_mistakes_are_like() -> None:
    score = np.concatenate([np.full(100, 5.0), np.full(200, -5.0)])
    p_wrong = np.concatenate([np.full(100, 0.95), np.full(20, 0.4), np.full(180, 0.02)])
    candidates = make_candidates(300)._replace(score=score, p_wrong=p_wrong)
    likely = np.zeros(300, dtype=bool)
    likely[100:120] = True
    chosen = [pick(candidates, "two_axis", 50, seed=seed, explore=0.2).indices for seed in range(10)]
    explored = np.concatenate([indices[score[indices] < 0] for indices in chosen])
    assert len(explored) > 90  # the others were unknown all the same
    assert likely[explored].mean() > 0.4  # a tenth of what could be drawn
    assert not likely[explored].all()


@pytest.mark.parametrize(
    ("num_left", "num_likely", "share"),
    [
        (300, 400, 0.0),  # more that look unknown than all rounds reach: exploring would cost one of them
        (300, 290, 0.1),  # what is left over
        (300, 100, 0.2),  # as much as the config allows
    ],
)
def test_rounds_explore_with_what_the_likely_unknown_leave_over(num_left: int, num_likely: int, share: float) -> None:
    config = SelectionConfig(kind="two_axis", budget=100, explore=0.2)
    assert explored_share(config, num_left, num_likely) == pytest.approx(share)


def test_likely_are_the_unknown_and_after_the_first_annotations_the_wrong() -> None:
    candidates = make_candidates(50)
    assert candidates.p_wrong is not None
    shortlist = Shortlist(SelectionConfig(kind="two_axis", budget=5), 0)
    for rows in np.array_split(np.arange(50), 3):
        shortlist.add(candidates.take(rows))
    assert shortlist.num_likely == num_likely(candidates) == (candidates.p_wrong >= 0.5).sum()
    assert num_likely(candidates._replace(p_wrong=None)) == (candidates.score >= 0).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_parts", [1, 3, 20])
def test_a_shortlist_of_parts_comes_to_what_is_chosen_from_all_at_once(
    kind: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "MAX_COMPARED", 30)
    whole = make_candidates(6000)
    config = SelectionConfig(kind=kind, budget=12, explore=0.25)
    shortlist = Shortlist(config, 5)
    for rows in np.array_split(np.random.default_rng(0).permutation(6000), num_parts):
        shortlist.add(whole.take(rows))
    kept = shortlist.candidates()
    assert shortlist.num_seen == 6000
    assert len(kept.question_ids) <= (30 if kind in SelectionConfig.COMPARED else 3 * 12)
    chosen, expected = (select(candidates, config, 5) for candidates in (kept, whole))
    assert [kept.question_ids[row] for row in chosen.indices] == [whole.question_ids[row] for row in expected.indices]
    np.testing.assert_array_equal(chosen.scores, expected.scores)


def test_a_shortlist_keeps_all_rows_for_a_strategy_of_your_own() -> None:
    shortlist = Shortlist(SelectionConfig(kind="mine:strategy", budget=2), 0)
    for rows in np.array_split(np.arange(60), 4):
        shortlist.add(make_candidates().take(rows))
    assert len(shortlist.candidates().question_ids) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_above_the_candidates_is_a_budget_error(kind: str) -> None:
    with pytest.raises(BudgetError, match="asks for 61 questions, but 60 candidates"):
        pick(make_candidates(), kind, budget=61)


@pytest.mark.parametrize(
    ("kind", "column"),
    [("semantic_entropy", "entropy"), ("entropy", "predictive_entropy"), ("perplexity", "perplexity")],
)
def test_a_strategy_without_what_it_ranks_by_is_a_config_error(kind: str, column: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} needs .* of all candidates"):
        pick(make_candidates()._replace(**{column: None}), kind)


@pytest.mark.parametrize("kind", ["probe_diverse", *SelectionConfig.COMPARED])
def test_a_strategy_that_spreads_without_states_is_a_config_error(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} needs the hidden states"):
        pick(make_candidates()._replace(states=None), kind)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="bald"):
        SelectionConfig(kind="bald")
    with pytest.raises(ConfigError, match="my_package:MyStrategy"):
        pick(make_candidates(), "my_package:MyStrategy")


@pytest.mark.parametrize(
    "kind", ["probe", "known", "probe_diverse", "semantic_entropy", "entropy", "perplexity", "badge"]
)
def test_a_value_that_is_not_finite_names_the_question(kind: str) -> None:
    candidates = make_candidates()
    columns = (candidates.score, candidates.p_unknown, candidates.entropy, candidates.predictive_entropy)
    for column in (*columns, candidates.perplexity):
        assert column is not None
        column[7] = np.nan
    with pytest.raises(ValueError, match="q7"):
        pick(candidates, kind)


def test_a_repeated_id_is_refused() -> None:
    candidates = make_candidates()
    candidates.question_ids[3] = "q4"
    with pytest.raises(ValueError, match="twice"):
        pick(candidates, "probe")


def worst_first(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """A strategy of a user's own."""
    indices = np.argsort(candidates.score)[:budget]
    return Selected(indices, -candidates.score[indices])


def test_a_strategy_of_ones_own_chooses() -> None:
    candidates = make_candidates()
    config = SelectionConfig(kind="my_package:worst_first", budget=3)
    chosen = select(candidates, config, 0, worst_first)
    assert chosen.indices.tolist() == np.argsort(candidates.score)[:3].tolist()


def test_a_strategy_of_ones_own_that_repeats_itself_is_refused() -> None:
    def repeats(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
        return Selected(np.zeros(budget, int), np.zeros(budget))

    with pytest.raises(ConfigError, match="chose 1 questions, and not 3"):
        select(make_candidates(), SelectionConfig(kind="my_package:repeats", budget=3), 0, repeats)
