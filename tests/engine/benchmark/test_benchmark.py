"""Cells of a benchmark run side by side, fail alone, and go on after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from run_tables import check_same_tables

from engine.store.events import read_events
from engine.store.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.whole]

CELLS = {name: f"{name}--pool--probe--0" for name in ("first", "second", "broken")}


class Ran(NamedTuple):
    """A benchmark that was killed once and then ran to its end."""

    run_dir: Path
    before: list[dict[str, Any]]
    """What had happened before the kill."""
    after: list[dict[str, Any]]
    done: Any
    status: Any


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [dict(event) for event in read_events(RunDirectory(run_dir))]


@pytest.fixture(scope="module")
def ran(finished: Any, ka2l: Any, tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The campaign of `finished`, cut off after its first round; a second model that is only measured, and a third
    that falls over the first question. Killed when the second is complete, which is in the middle of the first."""
    folder = tmp_path_factory.mktemp("benchmark")
    broken = tiny_models("qwen2.5", vocab_size=32)  # its tokenizer has more
    values = finished.files.values
    matrix = {
        "models": {
            "first": {"model": values["model"]},
            "second": {"model": {"path": str(tiny_models("mistral-v0.3")), "dtype": "float32"}, "rounds": 0},
            "broken": {"model": {"path": str(broken), "dtype": "float32"}},
        },
        "common": {key: value for key, value in values.items() if key not in ("name", "ray", "model")}
        | {"budget": {"annotations": 12}},
        "ray": {"address": "local", "num_cpus": 2},
        "retries": 1,
    }
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(matrix))
    run_dir = folder / "run"
    killed = ka2l("benchmark", path, "--run-dir", run_dir, kill={"event": "cell_ended", "cell": CELLS["second"]})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    time.sleep(2)
    before = events_of(run_dir)
    done = ka2l("benchmark", path, "--run-dir", run_dir)
    return Ran(run_dir, before, events_of(run_dir)[len(before) :], done, ka2l("status", run_dir))


def started(events: list[dict[str, Any]]) -> list[str]:
    return [event["cell"] for event in events if event["event"] == "cell_started"]


def test_cells_run_at_the_same_time(ran: Ran) -> None:
    assert ran.before[0]["event"] == "cell_started"
    assert set(started(ran.before[:3])) == set(CELLS.values())


def test_a_cell_comes_to_the_tables_of_the_same_run_alone(ran: Ran, finished: Any) -> None:
    cell = RunDirectory(ran.run_dir / "cells" / CELLS["first"])
    assert {("tune", 0), ("cluster", 1)} <= set(check_same_tables(cell, RunDirectory(finished.run_dir)))


def test_what_was_committed_before_a_kill_is_not_made_again(ran: Ran) -> None:
    assert [event["cell"] for event in ran.before if event.get("status") == "complete"] == [CELLS["second"]]
    assert set(started(ran.after)) == {CELLS["first"], CELLS["broken"]}
    stages = [
        event for event in events_of(ran.run_dir / "cells" / CELLS["first"]) if event["event"] == "stage_committed"
    ]
    made = [(event["stage"], event["round"]) for event in stages]
    assert len(made) == len(set(made))


def test_a_cell_that_fails_is_tried_again_named_and_stops_no_other(ran: Ran) -> None:
    states = {name: json.loads((ran.run_dir / f"states/{cell}.json").read_text()) for name, cell in CELLS.items()}
    assert {name: state["status"] for name, state in states.items()} == {
        "first": "complete", "second": "complete", "broken": "failed",
    }  # fmt: skip
    assert started(ran.after).count(CELLS["broken"]) == 2
    assert states["broken"]["error"]
    assert ran.done.returncode == 1
    assert f"1 of 3 cells have failed: {CELLS['broken']}" in " ".join(ran.done.stderr.split())


def test_status_shows_every_cell_without_a_cluster(ran: Ran) -> None:
    assert ran.status.returncode == 0, ran.status.stderr
    lines = [line for line in ran.status.stdout.splitlines() if "--pool--" in line and "│" in line]
    assert len(lines) == 3
    assert sum("complete" in line for line in lines) == 2
    assert f"{CELLS['broken']}: exit code 1" in ran.status.stdout


def test_the_cells_of_a_killed_benchmark_die_with_it(ran: Ran) -> None:
    for event in ran.before:
        if event["event"] == "cell_started":
            assert not Path(f"/proc/{event['pid']}").exists()


def test_the_report_compares_the_cells(ran: Ran) -> None:
    report = json.loads((ran.run_dir / "benchmark.json").read_text())
    assert {cell["model"]: cell["status"] for cell in report["cells"]} == {
        "first": "complete", "second": "complete", "broken": "failed",
    }  # fmt: skip
    curves = {each["model"]: [point["num_annotated"] for point in each["curve"]] for each in report["combinations"]}
    assert curves == {"first": [0, 12], "second": [0], "broken": []}
    page = (ran.run_dir / "benchmark.html").read_text()
    assert 'id="chart-curve-0"' in page
    assert CELLS["broken"] in page


def test_what_cells_are_forked_from_has_the_libraries_but_no_ray() -> None:
    code = "import json, sys, engine.benchmark.cell_imports; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"ray", "torch", "transformers", "peft"} & set(json.loads(done.stdout)) == {"torch", "transformers", "peft"}
