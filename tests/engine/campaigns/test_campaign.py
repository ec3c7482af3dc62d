"""A whole campaign through the command line, and what can be done with it afterwards."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from engine.stages import round_folders
from engine.store.events import read_events
from engine.store.ledger import committed_stages
from engine.store.run_directory import RunDirectory
from ka2l import schemas
from ka2l.knowledge.wrongness import QUADRANTS
from ka2l.pool.rows import normalise_question

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(finished: Any) -> RunDirectory:
    return RunDirectory(finished.run_dir)


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Path:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return tmp_path / "run"


def ids(run: RunDirectory, stage: str, round_index: int | None) -> list[str]:
    return run.stage(stage, round_index).table(["question_id"])["question_id"].to_pylist()


def committed(run_dir: Path) -> dict[str, bytes]:
    """Every file of every committed stage."""
    folders = [Path(stage.path) for stage in committed_stages(RunDirectory(run_dir))]
    return {str(p.relative_to(run_dir)): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}


# -- what a campaign commits -------------------------------------------------------------------------------------------


def test_every_stage_of_every_round_is_committed(run: RunDirectory) -> None:
    places = [(stage.name, stage.round_index) for stage in committed_stages(run)]
    of_others = ("corpus_states", "decoder", "decode", "facts", "difficulty", "augment", "compare", "perplexity")
    stages = [name for name in round_folders() if name not in of_others]
    assert places == [
        ("questions", None),
        ("references", None),
        *((name, round_index) for round_index in (0, 1) for name in stages),
        ("observe", 2),
        ("cluster", 2),
        ("feedback", 2),  # what the last annotations have shown
        ("evaluate", 2),
    ]


@pytest.mark.parametrize(
    ("stage", "schema"),
    [
        ("observe", schemas.SAMPLES),
        ("cluster", schemas.CLUSTERS),
        ("label", schemas.LABELS),
        ("knowledge", schemas.KNOWLEDGE),
        ("select", schemas.SELECTION),
        ("annotate", schemas.ANNOTATIONS),
        ("evaluate", schemas.EVALUATED),
    ],
)
def test_tables_have_the_schema_they_are_documented_with(run: RunDirectory, stage: str, schema: Any) -> None:
    for index in range(2):
        table = run.stage(stage, index).table()
        assert table.schema.equals(schema)
        table.validate(full=True)


def test_seed_candidates_and_eval_are_disjoint_and_share_no_group(run: RunDirectory) -> None:
    rows = run.stage("questions").table().to_pylist()
    assert Counter(row["split"] for row in rows) == {"seed": 24, "candidate": 60, "eval": 24}
    assert len({row["question_id"] for row in rows}) == 108
    for key in ("question", "group"):
        used: dict[str, set[str]] = {"seed": set(), "candidate": set(), "eval": set()}
        for row in rows:
            used[row["split"]].add(normalise_question(row[key]))
        assert not used["eval"] & (used["seed"] | used["candidate"])
        if key == "question":
            assert not used["seed"] & used["candidate"]


def test_unusable_rows_are_quarantined_with_their_reason(run: RunDirectory) -> None:
    rows = pq.read_table(f"{run.path}/quarantine.parquet").to_pylist()
    assert [(row["row"], row["reason"].split(":")[0]) for row in rows] == [
        (50, "empty"),
        (51, "malformed"),
        (52, "duplicate"),
    ]
    assert run.stage("questions").require().metrics["quarantined"] == 3


def test_only_what_was_selected_is_annotated_and_nothing_twice(run: RunDirectory, finished: Any) -> None:
    candidates = {
        row["question_id"] for row in run.stage("questions").table().to_pylist() if row["split"] == "candidate"
    }
    selected = [ids(run, "select", index) for index in range(2)]
    assert [len(chosen) for chosen in selected] == [12, 12]
    assert set(selected[0] + selected[1]) <= candidates
    assert len(set(selected[0] + selected[1])) == 24
    assert [sorted(ids(run, "annotate", index)) for index in range(2)] == [sorted(chosen) for chosen in selected]
    assert finished.asked == selected[0] + selected[1]
    ledger = pq.read_table(f"{run.path}/ledger.parquet")
    revealed = ledger.filter(pc.equal(ledger["item"], "reveal"))
    assert sorted(revealed["question_id"].to_pylist()) == sorted(finished.asked)
    assert revealed["round"].to_pylist() == [0] * 12 + [1] * 12


def test_the_ledger_adds_up_to_what_the_stages_took(run: RunDirectory) -> None:
    ledger = pq.read_table(f"{run.path}/ledger.parquet")
    assert ledger.schema.equals(schemas.LEDGER)

    def booked(item: str) -> float:
        return float(pc.sum(ledger.filter(pc.equal(ledger["item"], item))["quantity"]).as_py())

    summary = json.loads(run.read_text("summary.json") or "")
    assert booked("seconds") == pytest.approx(summary["total_seconds"])
    assert booked("annotations") == 24
    manifests = [stage.require() for stage in committed_stages(run)]
    for item in ("cpu_seconds", "gpu_seconds", "tokens_prompt", "tokens_generated", "forward_passes"):
        assert booked(item) == pytest.approx(sum(manifest.cost.get(item, 0.0) for manifest in manifests)), item
    for manifest in manifests:  # every worker of this campaign holds one CPU, as the driver does
        assert manifest.cost["cpu_seconds"] == pytest.approx(manifest.seconds), manifest.stage
        assert manifest.cost["gpu_seconds"] == 0
    asked = [manifest.cost["forward_passes"] for manifest in manifests if manifest.stage == "observe"]
    assert asked == [132, 72, 72]  # eval questions are asked twice: for one greedy answer and for three samples


def test_only_eval_answers_are_graded(run: RunDirectory) -> None:
    for index in range(3):
        for row in run.stage("cluster", index).table().to_pylist():
            assert (row["correct"] is not None) == (row["purpose"] == "eval")


def test_from_the_first_annotations_on_knowledge_has_a_second_axis(run: RunDirectory) -> None:
    first, second = (run.stage("knowledge", index).table() for index in range(2))
    assert first["p_wrong"].null_count == first["quadrant"].null_count == first.num_rows
    assert second["p_wrong"].null_count == 0
    assert all(0 <= value <= 1 for value in second["p_wrong"].to_pylist())
    assert set(second["quadrant"].to_pylist()) <= set(QUADRANTS)
    left = run.stage("knowledge", 1).require().metrics["quadrants"]
    assert sum(left.values()) == 60 - 12
    revealed = [run.stage("feedback", index).require().metrics["revealed"] for index in (1, 2)]
    assert [sum(counts.values()) for counts in revealed] == [12, 24]
    assert revealed[1]["known"] == revealed[1]["lucky"] == 0  # random weights answer nothing right
    summary = json.loads((Path(run.path) / "summary.json").read_text())
    assert [row["quadrants"] for row in summary["rounds"]] == [
        None,
        {"revealed": revealed[0], "left": left},
        {"revealed": revealed[1], "left": None},
    ]


def test_each_round_asks_another_model_state(run: RunDirectory) -> None:
    states = [run.stage("extract", index).table() for index in range(2)]
    assert states[0]["question_id"].equals(states[1]["question_id"])
    difference = [np.stack(table["states"].to_numpy(zero_copy_only=False)) for table in states]
    assert np.abs(difference[0] - difference[1]).max() > 1e-3
    for index in (1, 2):
        manifest = run.stage("observe", index).require()
        assert f"round-{index - 1:03d}/tune" in manifest.inputs
        assert manifest.metrics["canary_agrees"] is True
    tuned = [run.stage("tune", index).require().metrics for index in range(2)]
    assert [metrics["num_annotation"] for metrics in tuned] == [12, 24]


def test_the_summary_has_its_documented_shape(run: RunDirectory) -> None:
    summary = json.loads(run.read_text("summary.json") or "")
    assert summary["schema_version"] == 1
    assert summary["status"] == "complete"
    assert summary["total_seconds"] > 0
    assert {"model", "rounds", "report"} <= summary.keys()
    assert [row["round"] for row in summary["rounds"]] == [0, 1, 2]
    assert [row["num_annotated"] for row in summary["rounds"]] == [0, 12, 24]
    for row in summary["rounds"]:
        assert row["num_candidates"] == 60
        low, high = row["accuracy_ci"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert {"annotation", "tokens_generated", "seconds"} <= row["cost"].keys()
        assert row["cost"]["tokens_generated"] > 0
        assert "forgetting" in row
    for row in summary["rounds"][:2]:
        assert {"layer", "auroc", "auroc_ci"} <= row["probe"].keys()
        assert 0 <= row["unknown_fraction"] <= 1
    assert (Path(run.path) / "report.html").stat().st_size > 10_000


def test_the_command_ends_with_a_table_and_the_report(finished: Any) -> None:
    for word in ("round", "annotated", "accuracy", "kept", "probe AUROC", "seconds"):
        assert word in finished.ended.stdout
    assert finished.ended.stdout.splitlines()[-1] == f"report: {finished.run_dir}/report.html"
    assert "Traceback" not in finished.ended.stderr


def test_the_config_in_the_run_directory_is_the_resolved_one(run: RunDirectory, finished: Any) -> None:
    from engine.config import load_config, parse_config

    overrides = [word for word in finished.options if word != "--set"]
    assert parse_config(run.read_text("config.yaml") or "") == load_config(str(finished.files.config), overrides)


# -- what can be done with it ------------------------------------------------------------------------------------------


def test_status_and_report_read_files_only(copy: Path, ka2l: Any) -> None:
    (copy / "report.html").unlink()
    status = ka2l("status", copy)
    assert status.returncode == 0, status.stderr
    assert all(name in status.stdout for name in ("observe", "tune", "complete"))
    report = ka2l("report", copy)
    assert report.returncode == 0, report.stderr
    assert (copy / "report.html").is_file()
    assert json.loads((copy / "summary.json").read_text())["status"] == "complete"
    assert not (copy / "session").exists()


def test_a_finished_run_makes_nothing_again_wherever_it_lies_and_however_many_workers_there_are(
    copy: Path, finished: Any, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    """Its pool may even be gone, and its model have moved."""
    before = committed(copy)
    model = tmp_path / "moved-model"
    shutil.copytree(finished.files.model, model)
    changes = {
        "model.path": model,
        "pool.path": "/gone/pool.jsonl",
        "sampler.replicas": 2,
        "sampler.cpus_per_replica": 0.5,
        "extraction.batch_size": 5,
        "extraction.replicas": 2,
        "tuning.workers": 2,
        "probe.device": "cpu",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    ended = ka2l("resume", copy, *sets, *on_cluster)
    assert ended.returncode == 0, ended.stderr
    assert committed(copy) == before
    events = [event["event"] for event in read_events(RunDirectory(copy))]
    assert events[-2:] == ["run_started", "run_complete"]
    assert yaml.safe_load((copy / "config.yaml").read_text())["sampler"]["replicas"] == 2


def test_a_change_that_would_change_results_is_refused_with_the_difference(
    copy: Path, ka2l: Any, on_cluster: list[str]
) -> None:
    before, config = committed(copy), (copy / "config.yaml").read_text()
    ended = ka2l("resume", copy, "--set", "probe.kind=mlp", *on_cluster)
    assert ended.returncode == 2
    message = " ".join(ended.stderr.split())
    assert "round-000/probe" in message
    assert "kind was 'linear', now 'mlp'" in message
    assert "--redo-from probe --round 0" in message
    assert "Traceback" not in ended.stderr
    assert committed(copy) == before
    assert (copy / "config.yaml").read_text() == config


def test_another_seed_or_model_precision_is_refused_from_the_first_stage_on(
    copy: Path, ka2l: Any, on_cluster: list[str]
) -> None:
    ended = ka2l("resume", copy, "--set", "seed=1", "--set", "model.dtype=bfloat16", *on_cluster)
    assert ended.returncode == 2
    message = " ".join(ended.stderr.split())
    assert "run.seed was 0, now 1" in message
    assert "run.model.dtype was 'float32', now 'bfloat16'" in message


@pytest.mark.timeout(900)
def test_a_stage_and_all_after_it_can_be_made_again(copy: Path, ka2l: Any, on_cluster: list[str]) -> None:
    before = committed(copy)
    ended = ka2l("resume", copy, "--redo-from", "observe", "--round", "2", *on_cluster)
    assert ended.returncode == 0, ended.stderr
    after = committed(copy)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    remade = {f"round-002/{name}" for name in ("observe", "cluster", "feedback", "evaluate")}
    assert {name.removesuffix("/manifest.json") for name in changed if name.endswith(".json")} >= remade
    assert {"/".join(name.split("/")[:2]) for name in changed} == remade
    for stage in ("observe", "cluster"):
        old, new = (read_rows(files, f"round-002/{stage}/") for files in (before, after))
        assert new.equals(old)


def read_rows(files: dict[str, bytes], prefix: str) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(pa.BufferReader(files[name])) for name in sorted(files) if name.startswith(f"{prefix}part-")]
    )


@pytest.mark.timeout(900)
def test_a_probe_run_maps_the_pool_and_annotates_nothing(
    finished: Any, run: RunDirectory, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    probed = tmp_path / "probe"
    ended = ka2l("probe", finished.files.config, "--run-dir", probed, *on_cluster, log=tmp_path / "asked")
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "asked").exists()
    made = RunDirectory(probed)
    assert [stage.name for stage in committed_stages(made)] == [
        "questions",
        "references",
        "observe",
        "cluster",
        "label",
        "extract",
        "probe",
        "knowledge",
        "evaluate",
    ]
    # A campaign samples candidates for rehearsal, and ranks by those answers, too.
    maps = [found.stage("knowledge", 0).table().drop_columns("score") for found in (made, run)]
    assert maps[0].equals(maps[1])
    ledger = pq.read_table(probed / "ledger.parquet")
    assert "reveal" not in ledger["item"].to_pylist()
    assert (probed / "report.html").is_file()
    assert json.loads((probed / "summary.json").read_text())["status"] == "complete"


@pytest.mark.timeout(900)
def test_answers_of_questions_that_were_not_selected_change_nothing(
    finished: Any, run: RunDirectory, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    """The same campaign on a pool in which every answer that it may not look at is poison."""
    splits = {row["question_id"]: row["split"] for row in run.stage("questions").table().to_pylist()}
    open_to_it = {name for name, split in splits.items() if split == "eval"} | set(finished.asked)
    lines = []
    for line in finished.files.pool.read_text().splitlines():
        row = json.loads(line)
        if row["id"] in splits and row["id"] not in open_to_it:
            row["answers"] = ["poison"]
        lines.append(json.dumps(row) + "\n")
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(lines))
    at_end = {"event": "stage_committed", "stage": "tune", "round": 0}
    words = ["run", finished.files.config, "--set", f"pool.path={pool}", "--run-dir", tmp_path / "run"]
    ended = ka2l(*words, *on_cluster, kill=at_end)
    assert ended.returncode < 0, ended.stderr
    poisoned = RunDirectory(tmp_path / "run")
    for name in ("observe", "cluster", "label", "extract", "knowledge", "select"):
        assert poisoned.stage(name, 0).table().equals(run.stage(name, 0).table()), name
    answers = poisoned.stage("annotate", 0).table(["question_id", "answers"])
    assert answers.equals(run.stage("annotate", 0).table(["question_id", "answers"]))
    adapters = [
        (Path(item.stage("tune", 0).path) / "adapter" / "adapter_model.safetensors").read_bytes()
        for item in (poisoned, run)
    ]
    assert adapters[0] == adapters[1]
