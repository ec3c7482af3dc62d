"""Long work says how far it is: counts, rate and time left, also where there is no terminal."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from engine import progress
from engine.progress import Progress, duration, every, rate


@pytest.mark.parametrize(
    ("count", "seconds", "said"),
    [(1200, 60, "20 questions/s"), (8, 633, "79.1 s each"), (90, 60, "1.5 questions/s"), (1, 2000, "2,000.0 s each")],
)
def test_what_takes_longer_than_a_second_is_told_in_seconds_each(count: int, seconds: float, said: str) -> None:
    assert rate(count, seconds, "questions") == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3540, "59 min"), (11_100, "3 h 05 min")]
)
def test_durations_are_told_as_people_tell_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def clock(*readings: float) -> Callable[[], float]:
    left = list(readings)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_a_line_tells_counts_rate_and_time_left() -> None:
    made = Progress(Console(file=io.StringIO()), "round-000/observe", 400, "steps", clock(0.0, 100.0))
    assert made.line() == "round-000/observe      0 of 400 steps, 2 min so far"
    made.advance(50, "loss 0.5")
    assert made.line() == "round-000/observe      50 of 400 steps, 2.0 s each, about 12 min left · loss 0.5"


def test_what_was_there_before_does_not_count_as_speed() -> None:
    made = Progress(Console(file=io.StringIO()), "extract", 400, "questions", clock(0.0, 100.0))
    made.skip(300, "3 shards were there")
    made.advance(50)
    assert "350 of 400 questions, 2.0 s each, about 2 min left" in made.line()
    assert made.summary().startswith("extract                    350 questions in  100.0 s, 2.0 s each")


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    said = io.StringIO()
    with Progress(Console(file=said), "tune", 8, "steps") as made:
        made.advance(3)
        waited = threading.Event()
        while said.getvalue().count("3 of 8 steps") < 2:
            waited.wait(0.01)


def test_lines_end_with_the_work() -> None:
    calls: list[int] = []
    called = threading.Event()

    def act() -> None:
        calls.append(1)
        called.set()

    with every(0.01, act):
        assert called.wait(60)
    count = len(calls)
    threading.Event().wait(0.05)
    assert len(calls) == count
