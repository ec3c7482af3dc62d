"""Every cent and second, counted once: from manifests and from the notes of stages that are not done."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.store.ledger import ledger_table, worked_seconds
from engine.store.run_directory import RunDirectory
from engine.store.shards import write_shard
from engine.store.stage_folder import Stage
from ka2l.schemas import ANNOTATIONS, LEDGER

TEACHER = {"kind": "teacher", "teacher": {"model": "teacher-1"}}
SPENT = {"seconds": 4.0, "cpu_seconds": 7.2, "gpu_seconds": 0.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def begin(stage: Stage, config: dict[str, Any], spent: dict[str, float]) -> None:
    stage.begin("f", config, {})
    stage.note_spent(spent)


def commit(stage: Stage, config: dict[str, Any], cost: dict[str, float], seconds: float) -> None:
    stage.begin("f", config, {})
    stage.commit(wanted="f", config=config, inputs={}, metrics={}, cost=cost, seed=0, seconds=seconds)


def annotations(*rows: tuple[str, str, float]) -> pa.Table:
    made = [
        {
            "question_id": name,
            "question": f"{name}?",
            "answers": ["a"],
            "annotator": annotator,
            "annotated_at": datetime(2026, 1, 1, tzinfo=UTC),
            "prompt_sha256": None,
            "cost": cost,
        }
        for name, annotator, cost in rows
    ]
    return pa.Table.from_pylist(made, schema=ANNOTATIONS)


def sums(run: RunDirectory, *keys: str) -> dict[tuple[Any, ...], float]:
    found: dict[tuple[Any, ...], float] = defaultdict(float)
    for row in ledger_table(run).to_pylist():
        found[tuple(row[key] for key in keys)] += row["quantity"]
    return dict(found)


def test_a_committed_stage_books_wall_clock_seconds_and_not_those_of_its_workers(run: RunDirectory) -> None:
    stage = run.stage("observe", 0)
    write_shard(stage.url, "part-00000.parquet", pa.table({"a": [1]}), {"seconds": 9.0, "tokens_generated": 5.0})
    commit(stage, {}, {"cpu_seconds": 7.2, "gpu_seconds": 0.0}, seconds=4.0)
    assert ledger_table(run).schema.equals(LEDGER)
    assert sums(run, "item") == {
        ("seconds",): 4.0,
        ("cpu_seconds",): 7.2,
        ("gpu_seconds",): 0.0,
        ("tokens_generated",): 5.0,
    }


def test_money_stands_with_the_answers_it_bought_and_the_rest_with_the_teacher(run: RunDirectory) -> None:
    stage = run.stage("annotate", 0)
    rows = annotations(("a", "teacher-1", 0.5), ("b", "teacher-1", 0.25))
    took = {"annotations": 2.0, "money": 1.0, "tokens_prompt": 60.0, "tokens_generated": 30.0}
    write_shard(stage.url, "part-00000.parquet", rows, took)
    commit(stage, TEACHER, {"cpu_seconds": 1.0}, seconds=1.0)
    money = [row for row in ledger_table(run).to_pylist() if row["item"] == "money"]
    assert [(row["question_id"], row["quantity"], row["annotator"]) for row in money] == [
        ("a", 0.5, "teacher-1"),
        ("b", 0.25, "teacher-1"),
        (None, 0.25, "teacher-1"),  # a refused question
    ]
    assert sums(run, "item", "annotator") == {
        ("reveal", "teacher-1"): 2.0,
        ("annotations", "teacher-1"): 2.0,
        ("money", "teacher-1"): 1.0,
        ("tokens_prompt", "teacher-1"): 60.0,
        ("tokens_generated", "teacher-1"): 30.0,
        ("seconds", None): 1.0,
        ("cpu_seconds", None): 1.0,
    }


def test_each_person_is_booked_with_the_answers_they_gave(run: RunDirectory) -> None:
    stage = run.stage("annotate", 0)
    rows = annotations(("a", "ada", 0.0), ("b", "bob", 0.0), ("c", "ada", 0.0))
    write_shard(stage.url, "part-00000.parquet", rows, {"annotations": 3.0, "money": 0.0})
    commit(stage, {"kind": "human", "teacher": None}, {}, seconds=1.0)
    counts = {key: value for key, value in sums(run, "item", "annotator").items() if key[0] == "annotations"}
    assert counts == {("annotations", "ada"): 2.0, ("annotations", "bob"): 1.0}
    assert ("money", None) not in sums(run, "item", "annotator")


def test_an_unfinished_stage_is_booked_with_its_whole_shards_and_the_time_noted(run: RunDirectory) -> None:
    commit(run.stage("select", 0), {}, SPENT, seconds=4.0)
    stage = run.stage("annotate", 0)
    begin(stage, TEACHER, SPENT)
    write_shard(stage.url, "part-00000.parquet", annotations(("a", "teacher-1", 0.5)), {"annotations": 1, "money": 0.5})
    assert sums(run, "stage", "item")["annotate", "money"] == 0.5
    assert sums(run, "stage", "item")["annotate", "seconds"] == 4.0
    assert worked_seconds(run) == 8.0
    stage.commit(wanted="f", config=TEACHER, inputs={}, metrics={}, cost={}, seed=0, seconds=4.0)
    assert sums(run, "stage", "item")["annotate", "money"] == 0.5
    assert worked_seconds(run) == 8.0


def test_what_attempts_have_spent_adds_up_and_goes_with_the_stage(run: RunDirectory) -> None:
    stage = run.stage("tune", 0)
    assert stage.begin("f", {}, {}) == {}
    stage.note_spent(SPENT)
    again = run.stage("tune", 0)
    assert again.begin("f", {}, {}) == SPENT
    assert worked_seconds(run) == 4.0
    again.remove()
    assert worked_seconds(run) == 0.0
    assert again.begin("f", {}, {}) == {}
