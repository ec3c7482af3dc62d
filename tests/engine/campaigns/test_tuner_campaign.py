"""Rounds with each way of handing a trained state on: a whole model, a merged one, virtual tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.store.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.whole]


@pytest.mark.parametrize(
    ("kind", "learning_rate", "rounds", "folders"),
    [
        ("full", 2e-3, 2, {"model"}),
        ("dora", 1e-2, 1, {"adapter", "model"}),
        ("p_tuning", 2e-2, 2, {"adapter"}),
    ],
)
def test_a_campaign_goes_on_from_what_it_has_trained(
    kind: str,
    learning_rate: float,
    rounds: int,
    folders: set[str],
    finished: Any,
    ka2l: Any,
    on_cluster: list[str],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    later = ("tune", "round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(finished.run_dir, run_dir, ignore=shutil.ignore_patterns(*later))
    values = {"tuning.adapter": {"kind": kind}, "tuning.learning_rate": learning_rate, "rounds": rounds}
    options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    ended = ka2l("resume", run_dir, *on_cluster, *options)
    assert ended.returncode == 0, ended.stderr
    assert f"{kind}" in ended.stderr.split("round-000")[0]  # the run says first how its states are served
    run = RunDirectory(run_dir)
    for index in range(rounds):
        tuned = run.stage("tune", index).verify()
        assert {entry.path.split("/")[0] for entry in tuned.files} == folders
        assert tuned.metrics["canary"]["max_logit_difference"] > 1e-3
        assert run.stage("observe", index + 1).verify().metrics["canary_agrees"] is True
    if rounds == 2:
        states = [run.stage("extract", index).table(["question_id", "states"]) for index in (0, 1)]
        assert not states[0].equals(states[1])
        assert states[0].num_rows == states[1].num_rows


def test_virtual_tokens_with_vllm_are_refused_before_anything_is_written(
    ka2l: Any, campaign_files: Any, tmp_path: Path
) -> None:
    options = ("--set", "tuning.adapter.kind=prefix", "--set", "sampler.kind=vllm")
    ended = ka2l("run", campaign_files.config, "--run-dir", tmp_path / "run", *options)
    assert ended.returncode == 2
    assert "sampler.kind=transformers" in ended.stderr
    assert not (tmp_path / "run").exists()
