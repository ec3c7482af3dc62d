"""A campaign that a teacher annotates: paid once, capped, refusals counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.artifacts import RunDirectory

pytestmark = pytest.mark.slow
TEACHER = {
    "model": "teacher-1",
    "api_key_env": None,
    "max_tokens": 32,
    "concurrency": 4,
    "backoff_base_s": 0.01,
    "prices": {"input_per_million": 0.0, "output_per_million": 1_000_000.0},
}


def options(server: Any, **more: Any) -> list[str]:
    values = {"rounds": 1, "annotator.kind": "teacher", "annotator.teacher": TEACHER | {"base_url": server.url}}
    return [word for key, value in (values | more).items() for word in ("--set", f"{key}={json.dumps(value)}")]


def annotations(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = RunDirectory(run_dir).stage("annotate", 0).table().to_pylist()
    return rows


def test_a_teacher_annotates_what_was_selected_and_each_answer_is_paid_once(
    campaign_files: Any, ka2l: Any, on_cluster: list[str], teacher_server: Any, tmp_path: Path
) -> None:
    server = teacher_server({2: "500", 5: "429"})
    run_dir = tmp_path / "run"
    kill = {"event": "stage_committed", "stage": "annotate"}
    ka2l("run", campaign_files.config, "--run-dir", run_dir, *options(server), *on_cluster, kill=kill)
    rows = annotations(run_dir)
    resumed = ka2l("resume", run_dir, "--redo-from", "annotate", *on_cluster)
    assert resumed.returncode == 0, resumed.stderr
    assert annotations(run_dir) == rows
    assert len(rows) == 12
    assert {row["annotator"] for row in rows} == {"teacher-1"}
    assert all(row["answers"] == [f"answer to {row['question']}"] for row in rows)
    assert sum(row["cost"] for row in rows) == pytest.approx(sum(server.billed.values()) * rows[0]["cost"])
    assert set(server.billed.values()) == {1}
    ledger = RunDirectory(run_dir).stage("annotate", 0).require()
    assert ledger.cost["money"] == pytest.approx(sum(row["cost"] for row in rows))


def test_a_cap_of_half_the_money_ends_the_run_within_it_and_says_so(
    campaign_files: Any, ka2l: Any, on_cluster: list[str], teacher_server: Any, tmp_path: Path
) -> None:
    server = teacher_server()
    run_dir = tmp_path / "run"
    cap = 12 * 10 / 2  # half of what twelve answers of ten tokens cost
    ended = ka2l(
        "run", campaign_files.config, "--run-dir", run_dir, *options(server, **{"budget.money": cap}), *on_cluster
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert f"The budget of {cap:g} for annotation is used up" in summary["reason"]
    spent = sum(row["cost"] for row in annotations(run_dir))
    assert 0 < spent <= cap
    assert 0 < summary["num_annotated"] < 12
    metrics = RunDirectory(run_dir).stage("annotate", 0).require().metrics
    assert metrics["num_not_asked"] == 12 - summary["num_annotated"]
    assert metrics["num_refused"] == 0


def test_questions_that_the_teacher_cannot_answer_are_refused_and_counted(
    campaign_files: Any, ka2l: Any, on_cluster: list[str], teacher_server: Any, tmp_path: Path
) -> None:
    def abstains_from_colours(question: str, body: Any) -> str:
        return json.dumps({"answers": [] if "colour" in question else ["blue"], "abstain": "colour" in question})

    server = teacher_server(content=abstains_from_colours)
    run_dir = tmp_path / "run"
    ended = ka2l("run", campaign_files.config, "--run-dir", run_dir, *options(server), *on_cluster)
    assert ended.returncode == 0, ended.stderr
    metrics = RunDirectory(run_dir).stage("annotate", 0).require().metrics
    assert metrics["num_refused"] == 12 - metrics["num_annotated"]
    assert metrics["refused"] == {"the teacher abstained": metrics["num_refused"]}
    assert metrics["num_refused"] > 0
    assert not any("colour" in row["question"] for row in annotations(run_dir))
