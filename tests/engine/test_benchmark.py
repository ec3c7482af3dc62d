"""Cells of a benchmark run side by side, fail alone, and go on after a kill."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.artifacts import RunDirectory
from engine.events import read_events
from engine.ledger import committed_stages

pytestmark = pytest.mark.slow


def write_matrix(folder: Path, values: dict[str, Any], **more: Any) -> Path:
    """A benchmark of small campaigns like that of `finished`; two stages of one core fit at a time."""
    common = {key: value for key, value in values.items() if key not in ("name", "ray", "model")}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"common": common, "ray": {"address": "local", "num_cpus": 2}} | more))
    return path


def same_tables(one: Path, other: Path) -> None:
    first, second = RunDirectory(one), RunDirectory(other)
    stages = [(stage.name, stage.round_index) for stage in committed_stages(first)]
    assert [(stage.name, stage.round_index) for stage in committed_stages(second)] == stages
    for name, index in stages:
        tables = []
        for run in (first, second):
            stage = run.stage(name, index)
            if stage.shard_names():
                table = stage.table()
                keys = [key for key in ("question_id", "purpose", "sample_index") if key in table.column_names]
                tables.append(table.sort_by([(key, "ascending") for key in keys]) if keys else table)
        assert len(tables) in (0, 2)
        if tables:
            assert tables[0].equals(tables[1]), f"{name} of round {index} differs"


@pytest.fixture(scope="module")
def ran(finished: Any, ka2l: Any, tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two models and two strategies, killed once in the middle; a third model cannot be loaded."""
    folder = tmp_path_factory.mktemp("benchmark")
    broken = folder / "broken"
    broken.mkdir()
    for file in tiny_models("qwen2.5").iterdir():
        (broken / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    values = finished.files.values
    models = {
        "first": {"model": values["model"]},
        "second": {"model": {"path": str(tiny_models("mistral-v0.3")), "dtype": "float32"}},
        "broken": {"model": {"path": str(broken), "dtype": "float32"}},
    }
    strategies = {"two_axis": {}, "random": {"selection": {"kind": "random"}}}
    matrix = write_matrix(folder, values, models=models, strategies=strategies, retries=1)
    run_dir = folder / "run"
    kill = {"event": "cell_ended"}
    ended = ka2l("benchmark", matrix, "--run-dir", run_dir, kill=kill, timeout=900)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    time.sleep(2)
    done = ka2l("benchmark", matrix, "--run-dir", run_dir, timeout=900)
    return run_dir, done, ka2l("status", run_dir)


def test_a_cell_comes_to_the_tables_of_the_same_run_alone(ran: Any, finished: Any) -> None:
    run_dir, _, _ = ran
    same_tables(finished.run_dir, run_dir / "cells" / "first--pool--two_axis--0")


def test_cells_run_at_the_same_time(ran: Any) -> None:
    run_dir, _, _ = ran
    running = most = 0
    for event in read_events(RunDirectory(run_dir)):
        running += {"cell_started": 1, "cell_ended": -1}.get(str(event["event"]), 0)
        most = max(most, running)
    assert most >= 4


def test_a_cell_that_fails_is_tried_again_named_and_stops_no_other(ran: Any) -> None:
    run_dir, done, _ = ran
    states = {path.stem: json.loads(path.read_text()) for path in (run_dir / "states").glob("*.json")}
    assert {name.split("--")[0]: state["status"] for name, state in states.items()} == {
        "first": "complete", "second": "complete", "broken": "failed",
    }  # fmt: skip
    assert done.returncode != 0
    assert "2 of 6 cells have failed: broken--pool--" in " ".join(done.stderr.split())
    assert all(state["attempts"] >= 1 and state["error"] for name, state in states.items() if "broken" in name)


def test_status_shows_every_cell_without_a_cluster(ran: Any) -> None:
    _, _, status = ran
    assert status.returncode == 0, status.stderr
    lines = [line for line in status.stdout.splitlines() if "--pool--" in line]
    assert len(lines) == 6
    assert sum("complete" in line for line in lines) == 4


def test_the_cells_of_a_killed_benchmark_die_with_it(ran: Any) -> None:
    run_dir, _, _ = ran
    started = [event["pid"] for event in read_events(RunDirectory(run_dir)) if event["event"] == "cell_started"]
    assert len(started) > 6
    for pid in started:
        command = Path(f"/proc/{pid}/cmdline")
        assert not command.exists() or b"engine.cli" not in command.read_bytes()
