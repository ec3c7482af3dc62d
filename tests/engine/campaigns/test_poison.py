"""Questions that break a stage's work are set aside, named and counted; too many of them end the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engine.store.events import read_events
from engine.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow


def test_questions_that_break_the_work_are_set_aside_and_too_many_end_the_run(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    questions = RunDirectory(finished.run_dir).stage("questions").table(["question_id", "split"])
    split_of = {row["question_id"]: row["split"] for row in questions.to_pylist()}
    bad = [next(name for name, split in split_of.items() if split == wanted) for wanted in ("seed", "candidate")]
    run_dir, kill = tmp_path / "run", {"poison": bad}
    ended = ka2l("probe", finished.files.config, "--run-dir", run_dir, *on_cluster, kill=kill)
    assert ended.returncode == 0, ended.stderr
    run = RunDirectory(run_dir)
    for name in ("observe", "cluster", "extract"):
        stage = run.stage(name, 0)
        assert sorted((failure.question_id, failure.reason) for failure in stage.failures()) == sorted(
            (question_id, "ValueError: poison") for question_id in bad
        )
        assert stage.require().cost["num_failed"] == 2
    knows = run.stage("knowledge", 0).table(["question_id"])["question_id"].to_pylist()
    assert set(split_of) - set(knows) == set(bad)
    assert bad[0] not in run.stage("label", 0).table(["question_id"])["question_id"].to_pylist()
    failed = [event["num"] for event in read_events(run) if event["event"] == "questions_failed"]
    assert sum(failed) == 6
    page = (run_dir / "report.html").read_text()
    assert "failed in round-000/observe: ValueError: poison" in page
    assert not list(run_dir.rglob("attempts"))

    words = ["--redo-from", "observe", "--set", "faults.max_failed_share=0.0", *on_cluster]
    ended = ka2l("resume", run_dir, *words, kill=kill)
    assert ended.returncode == 1
    assert re.search(r"round-000/observe: [12] questions failed, 0 may", ended.stderr)
    assert "ValueError: poison" in ended.stderr
    assert "faults.max_failed_share" in ended.stderr
    assert "Traceback" not in ended.stderr
