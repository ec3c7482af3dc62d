"""What a result of several worlds and seeds says of itself."""

from __future__ import annotations

import sys

import pytest
from machine import REPOSITORY
from worlds import command_for


def test_the_command_measures_all_that_the_result_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(REPOSITORY / "benchmarks" / "bench_rounds.py")
    monkeypatch.setattr(sys, "argv", [script, "--worlds", "people", "--seeds", "2", "--again", "--work", "/somewhere"])
    even = {"people": {"2": {}, "0": {}}, "popqa": {"0": {}, "2": {}}}
    assert command_for(even) == "python benchmarks/bench_rounds.py --worlds people popqa --seeds 0 2"
    assert command_for(even | {"mixed": {"0": {}}, "sets_misled": {}}) == (
        "python benchmarks/bench_rounds.py --worlds people popqa --seeds 0 2 && "
        "python benchmarks/bench_rounds.py --worlds mixed --seeds 0"
    )
