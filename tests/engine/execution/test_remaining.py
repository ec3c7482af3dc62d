"""The work that a run has left falls from round to round, and grows with what makes it slow."""

from __future__ import annotations

from engine.execution.remaining import RunSize, work_left

SIZE = RunSize(billions=7.0, num_questions=10_000, num_sampled=1_500, num_rehearsed=8_500, budget=500, rounds=3)


def test_less_is_left_in_each_round_and_the_last_only_measures() -> None:
    left = [work_left(SIZE, index) for index in range(5)]
    assert left == sorted(left, reverse=True)
    assert left[3] == 0.20 * 1_500
    assert left[4] == 0.0


def test_twice_the_model_is_twice_the_work() -> None:
    assert work_left(SIZE._replace(billions=14.0), 0) == 2 * work_left(SIZE, 0)


def test_a_run_that_only_probes_has_no_tuning_to_do() -> None:
    only_probed = SIZE._replace(rounds=0, num_rehearsed=0)
    assert work_left(only_probed, 0) == 0.20 * 1_500
