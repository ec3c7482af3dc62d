from __future__ import annotations

import pytest

from ka2l.evaluation.facts import (
    FactCounts,
    compare_facts,
    counts_by_match,
    counts_by_testbed,
    counts_of,
    fact_metrics,
    win_rates,
)
from ka2l.testbed.build import TestbedConfig, build_world
from ka2l.testbed.lives import sentences

LIFE = build_world(TestbedConfig(lives=True, num_people=20, num_seed_people=4, num_steps=20)).facts[0].answers[0]


def test_facts_that_say_the_same_count_once_and_what_no_reference_states_is_incorrect() -> None:
    assert counts_by_match([2, 2, None, 0], num_reference=4) == FactCounts(2, 1, 2, 0.0)
    assert counts_by_match([0, 1, 2], num_reference=3) == FactCounts(3, 0, 0, 1.0)
    assert counts_by_match([], num_reference=3) == FactCounts(0, 0, 3, None)


def test_the_testbed_counts_a_life_against_its_truth() -> None:
    told = sentences(LIFE)
    answer = " ".join([told[3], told[1], "Nothing can be read here."])
    assert counts_by_testbed(answer, LIFE) == FactCounts(2, 1, 3, 0.0)


def test_an_answer_whose_truth_is_no_life_is_not_counted() -> None:
    assert counts_by_testbed("Paris.", "Paris") is None
    assert counts_by_testbed(LIFE, "") is None


def test_shares_are_of_all_facts_of_all_answers() -> None:
    made = fact_metrics([FactCounts(4, 0, 1, 1.0), FactCounts(0, 2, 5, None)], seed=0)
    assert made["num_answers"] == 2
    assert [made[name][0] for name in ("correct", "incorrect", "missing")] == [2.0, 1.0, 3.0]
    assert made["share_correct"][0] == pytest.approx(4 / 6)
    assert made["completeness"][0] == pytest.approx(4 / 10)
    assert made["order"] == [1.0, 1.0, 1.0]
    assert made["share_correct"][1] <= 4 / 6 <= made["share_correct"][2]


def test_figures_of_nothing_are_none() -> None:
    made = fact_metrics([FactCounts(0, 0, 2, None)], seed=0)
    assert made["share_correct"] is made["order"] is None
    assert made["completeness"][0] == 0


def test_counts_are_found_again_in_the_rows_of_a_table() -> None:
    counts = FactCounts(1, 2, 3, 0.1)
    rows = [{"question_id": "a"} | counts._asdict(), {"question_id": "b", "num_correct": None}]
    assert counts_of(rows) == {"a": counts}


def test_each_aspect_has_its_own_winner() -> None:
    left, right = FactCounts(3, 3, 2, 1.0), FactCounts(2, 0, 3, 0.0)
    assert compare_facts(left, right) == {"completeness": 1, "factuality": -1, "logicality": 1}
    assert compare_facts(left, left) == {"completeness": 0, "factuality": 0, "logicality": 0}


def test_an_answer_that_states_nothing_is_compared_in_completeness_alone() -> None:
    silent = FactCounts(0, 0, 5, None)
    assert compare_facts(silent, FactCounts(0, 4, 5, None)) == {
        "completeness": 0,
        "factuality": None,
        "logicality": None,
    }


def test_wins_ties_and_losses_are_shares_of_the_pairs_that_have_an_outcome() -> None:
    made = win_rates([{"completeness": 1}, {"completeness": 1}, {"completeness": -1}, {"factuality": None}], seed=0)
    assert made.keys() == {"completeness"}
    rates = made["completeness"]
    assert (rates["num_pairs"], rates["win"], rates["tie"], rates["lose"]) == (3, 2 / 3, 0, 1 / 3)
    assert rates["net"][0] == pytest.approx(1 / 3)
    assert rates["net"][1] < 1 / 3 < rates["net"][2]
