"""What a campaign hands to Ray's metrics, and under which tags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console
from stage_making import commit_stage

from actors import metrics
from actors.metrics import Tags
from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.execution.jobs import HostJob, ShardInput
from engine.store.events import Events, read_events
from engine.store.run_directory import RunDirectory
from engine.store.shards import write_shard
from ka2l.model.loading import ModelConfig


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tags, float]]:
    """What is handed to Ray, in order."""
    calls: list[tuple[str, Tags, float]] = []
    monkeypatch.setattr(metrics, "_record", lambda *call: calls.append(call))
    return calls


def campaign(folder: Path) -> Campaign:
    run = RunDirectory(folder)
    Path(run.path).mkdir(parents=True)
    made = Campaign(RunConfig(), run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")
    made._model_id = "model"
    return made


def test_a_run_goes_by_its_folder_and_a_cell_by_its_benchmarks(tmp_path: Path) -> None:
    own, cell = campaign(tmp_path / "runs" / "mine"), campaign(tmp_path / "nine" / "cells" / "llama--pool--probe--0")
    cell.leases = SimpleNamespace(cell="llama--pool--probe--0")  # type: ignore[assignment]
    assert own.tags(own.stage("observe", 2)) == Tags("mine", "", "2", "observe")
    assert own.tags(own.stage("questions")) == Tags("mine", "", "", "questions")
    assert cell.tags(cell.stage("observe", 0)) == Tags("nine", "llama--pool--probe--0", "0", "observe")


def test_a_written_shard_is_an_event_and_is_counted(tmp_path: Path, recorded: list[Any]) -> None:
    made = campaign(tmp_path / "mine")
    stage = made.stage("observe", 1)
    made.note_shard(stage, "part-00003.parquet", 20, {"tokens_generated": 7.0})
    (event,) = read_events(made.run)
    assert {
        "event": "shard_written",
        "stage": "observe",
        "round": 1,
        "shard": "part-00003.parquet",
    }.items() <= event.items()
    tags = Tags("mine", "", "1", "observe")
    assert recorded == [(metrics.ROWS, tags, 20), (metrics.SHARDS, tags, 1), (metrics.TOKENS_GENERATED, tags, 7)]


def test_cost_that_is_in_no_shard_is_counted_when_the_work_is_done_and_not_again(
    tmp_path: Path, recorded: list[Any]
) -> None:
    made = campaign(tmp_path / "mine")
    for _ in range(2):  # the second time the stage is committed
        commit_stage(made, "tune", 0, config={}, inputs=[], work=lambda stage: ({}, {"tokens_trained": 640.0}))
    assert recorded == [(metrics.TOKENS_TRAINED, Tags("mine", "", "0", "tune"), 640)]


def test_a_worker_says_what_its_gpus_hold_after_each_shard(
    tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Echo:
        def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, dict[str, float]]:
            return tables["questions"], {}

    monkeypatch.setattr(metrics, "gpu_memory_bytes", lambda: 2**30)
    source = str(tmp_path / "questions")
    write_shard(source, "part-00000.parquet", pa.table({"question_id": ["q"]}), {})
    tags = Tags("mine", "", "0", "extract")
    job = HostJob(Echo, {"questions": ShardInput(source)}, str(tmp_path / "out"), tags=tags)
    job.open()
    job.run("part-00000.parquet")
    assert recorded == [(metrics.GPU_MEMORY, tags, 2**30)]
