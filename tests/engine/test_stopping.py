"""Rounds that are not worth their annotations are not begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.stopping import enough
from engine.store.events import Events
from engine.store.run_directory import RunDirectory
from ka2l.model.loading import ModelConfig


def campaign(
    folder: Path,
    accuracy: tuple[float, float] = (0.5, 0.6),
    predicted: float | None = 0.2,
    wrong: float | None = None,
    **stopping: float,
) -> Campaign:
    """A campaign whose second state has been measured."""
    run = RunDirectory(folder / "run")
    Path(run.path).mkdir()
    for index, value in enumerate(accuracy):
        known = {"predicted_unknown": predicted, "predicted_wrong": wrong}
        for name, metrics in (("cluster", {"accuracy": value}), ("knowledge", known)):
            stage = run.stage(name, index)
            stage.begin("f", {}, {})
            stage.commit(wanted="f", config={}, inputs={}, metrics=metrics, cost={}, seed=0, seconds=1.0)
    config = RunConfig.model_validate({"stopping": stopping})
    return Campaign(config, run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")


def test_no_rule_ends_a_run_unless_it_is_given(tmp_path: Path) -> None:
    assert enough(campaign(tmp_path, accuracy=(0.9, 0.1), predicted=0.0), 1) is None


@pytest.mark.parametrize(("share", "ends"), [(0.19, False), (0.21, True)])
def test_it_is_enough_where_little_of_the_rest_is_predicted_unknown(tmp_path: Path, share: float, ends: bool) -> None:
    reason = enough(campaign(tmp_path, unknown_share=share), 1)
    assert (reason is not None) == ends
    assert reason is None or "20.0% of the candidates left is predicted unknown" in reason


@pytest.mark.parametrize(("share", "ends"), [(0.29, False), (0.31, True)])
def test_it_is_not_enough_where_annotation_has_shown_that_more_is_wrong(
    tmp_path: Path, share: float, ends: bool
) -> None:
    reason = enough(campaign(tmp_path, wrong=0.3, unknown_share=share), 1)
    assert (reason is not None) == ends
    assert reason is None or "30.0% of the candidates left is predicted wrong" in reason


@pytest.mark.parametrize(("gain", "ends"), [(0.09, False), (0.11, True)])
def test_it_is_enough_where_a_round_has_gained_little(tmp_path: Path, gain: float, ends: bool) -> None:
    reason = enough(campaign(tmp_path, gain=gain), 1)
    assert (reason is not None) == ends
    assert reason is None or "Round 0 has raised accuracy by +0.100" in reason


def test_the_base_model_is_never_enough(tmp_path: Path) -> None:
    assert enough(campaign(tmp_path, predicted=0.0, unknown_share=0.5, gain=0.5), 0) is None


def test_a_pool_that_is_used_up_or_has_no_eval_questions_meets_no_rule(tmp_path: Path) -> None:
    made = campaign(tmp_path, predicted=None, unknown_share=0.5, gain=0.5)
    stage = made.stage("cluster", 1)
    shutil.rmtree(stage.path)
    stage.begin("f", {}, {})
    stage.commit(wanted="f", config={}, inputs={}, metrics={}, cost={}, seed=0, seconds=1.0)
    assert enough(made, 1) is None


@pytest.mark.slow
def test_a_run_that_has_enough_is_complete_with_its_last_state_measured(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    later = ("round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    run_dir = Path(shutil.copytree(finished.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns(*later)))
    for name in ("select", "annotate", "tune"):
        shutil.rmtree(run_dir / "round-001" / name)
    known = RunDirectory(run_dir).stage("knowledge", 1).require().metrics
    assert 0 < known["predicted_unknown"] < 1
    ended = ka2l("resume", run_dir, *on_cluster, "--set", "stopping.unknown_share=0.9999")
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert 0 < known["predicted_wrong"] < 1
    assert ", less than stopping.unknown_share" in summary["reason"]
    assert [row["num_annotated"] for row in summary["rounds"]] == [0, 12]
    assert summary["rounds"][-1]["accuracy"] is not None
    assert not (run_dir / "round-001" / "select").exists()
