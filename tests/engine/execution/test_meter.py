"""Seconds of work, and of the CPUs and GPUs that are held meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from engine.config import load_config
from engine.execution.meter import Meter
from engine.stages import room_of


class Clock:
    """Goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Notes:
    """Keeps what a meter saves."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, spent: Mapping[str, float]) -> None:
        self.last = dict(spent)


def test_workers_count_with_all_that_they_hold_and_the_driver_alone_with_one_cpu() -> None:
    clock, notes = Clock(), Notes()
    meter = Meter(clock)
    with meter.measure({}, notes):
        clock.now += 3
        with meter.hold(4.0, 2.0):
            clock.now += 10
        clock.now += 1
    clock.now += 50
    assert meter.spent() == {"seconds": 14.0, "cpu_seconds": 3 + 4 * 10 + 1, "gpu_seconds": 20.0}
    assert notes.last == meter.spent()


def test_workers_that_hold_a_gpu_alone_take_the_place_of_the_driver() -> None:
    clock = Clock()
    meter = Meter(clock)
    with meter.measure({}, Notes()), meter.hold(0.0, 1.0):
        clock.now += 5
    assert meter.spent() == {"seconds": 5.0, "cpu_seconds": 0.0, "gpu_seconds": 5.0}


def test_what_fails_is_counted_too_and_the_next_attempt_adds_to_it() -> None:
    clock, notes = Clock(), Notes()
    meter = Meter(clock)

    def fail() -> None:
        clock.now += 7
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), meter.measure({}, notes), meter.hold(2.0, 0.0):
        fail()
    with meter.measure(notes.last, notes):
        clock.now += 1
    assert notes.last == {"seconds": 8.0, "cpu_seconds": 15.0, "gpu_seconds": 0.0}


def test_what_compares_answers_holds_the_gpus_that_the_config_gives_it() -> None:
    config = load_config("quickstart", ["equivalence.gpus=0.5"])
    assert {stage: room_of(stage, config) for stage in ("cluster", "feedback", "label")} == {
        "cluster": (1.0, 0.5),
        "feedback": (1.0, 0.5),
        "label": (1.0, 0.0),
    }


def test_one_stage_does_not_count_for_the_next() -> None:
    clock = Clock()
    meter = Meter(clock)
    with meter.measure({}, Notes()):
        clock.now += 7
    with meter.measure({}, Notes()):
        clock.now += 2
    assert meter.spent()["seconds"] == 2.0


def test_a_disk_that_is_full_does_not_hide_how_the_work_ended() -> None:
    def full(spent: Mapping[str, float]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="broken"), Meter().measure({}, full):
        raise ValueError("broken")
