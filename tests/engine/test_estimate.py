"""Counts of a run are exact before it starts; seconds come from measured rates."""

from __future__ import annotations

from engine.config import load_config
from engine.estimate import ObserveRate, Rates, predict

RATES = Rates(
    tokens_per_prompt=10.0,
    tokens_per_answer=3.0,
    base=ObserveRate(20.0, 0.001),
    adapted=ObserveRate(25.0, 0.002),
    cluster_s=2.0,
    extract_start_s=8.0,
    extract_s_per_question=0.01,
    fit_s=1.0,
    tune_start_s=15.0,
    tune_s_per_step=0.2,
)
COUNTS = {"seed": 400, "candidate": 1500, "eval": 1500}


def test_annotations_are_rounds_times_budget_and_stop_at_the_cap() -> None:
    config = load_config("quickstart")
    assert sum(row.annotations for row in predict(config, COUNTS, RATES, cap=750)) == 750
    assert sum(row.annotations for row in predict(config, COUNTS, RATES, cap=300)) == 300


def test_the_model_is_asked_once_more_than_there_are_rounds() -> None:
    config = load_config("quickstart", ["rounds=2"])
    rows = predict(config, COUNTS, RATES, cap=500)
    assert [row.round_index for row in rows if row.stage == "observe"] == [0, 1, 2]
    assert [row.round_index for row in rows if row.stage == "tune"] == [0, 1]


def test_own_answers_to_rehearse_are_sampled_in_the_first_round_alone() -> None:
    config = load_config("quickstart")
    first, second, *_ = [row for row in predict(config, COUNTS, RATES, 750) if row.stage == "observe"]
    assert first.tokens_generated - second.tokens_generated == 1500 * 10 * 3
    without = predict(load_config("quickstart", ["tuning.rehearsal=0"]), COUNTS, RATES, 750)
    assert without[0].tokens_generated == second.tokens_generated == (400 * 10 + 1500) * 3


def test_every_question_is_extracted_in_every_round_that_selects() -> None:
    rows = predict(load_config("quickstart"), COUNTS, RATES, 750)
    assert [row.forward_passes for row in rows if row.stage == "extract"] == [3400, 3400, 3400]


def test_seconds_are_start_up_plus_work() -> None:
    rows = predict(load_config("quickstart", ["tuning.max_steps=100"]), COUNTS, RATES, 750)
    assert next(row.seconds for row in rows if row.stage == "tune") == 15.0 + 100 * 0.2


def test_an_adapted_model_answers_at_its_own_pace() -> None:
    base, adapted, *_ = [
        row for row in predict(load_config("quickstart"), COUNTS, RATES, 750) if row.stage == "observe"
    ]
    assert base.seconds == 20.0 + base.tokens_generated * 0.001
    assert adapted.seconds == 25.0 + adapted.tokens_generated * 0.002
