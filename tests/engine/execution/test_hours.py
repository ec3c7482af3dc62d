"""The cap on hours: what would not fit is not begun, what was not foreseen is stopped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stage_making import commit_stage

from engine import stages
from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.execution.hours import TEARDOWN_S, Hours, needed_seconds
from engine.stages.kind import Outcome
from engine.store.events import Events
from engine.store.ledger import worked_seconds
from engine.store.run_directory import RunDirectory
from engine.store.stage_folder import Stage
from ka2l.errors import HoursUsedUp
from ka2l.model.loading import ModelConfig

#: Seconds of the first round's stages.
FIRST_ROUND = {
    "observe": 60.0,
    "cluster": 2.0,
    "label": 1.0,
    "extract": 10.0,
    "probe": 2.0,
    "knowledge": 1.0,
    "select": 1.0,
    "annotate": 3.0,
    "tune": 40.0,
}
METRICS = {
    "observe": {"num_samples": 2000},
    "annotate": {"num_annotated": 12, "stopped": None},
    "tune": {"training_seconds": 30.0},
}


def commit(stage: Stage, seconds: float, metrics: dict[str, Any], cost: dict[str, float]) -> None:
    stage.begin("f", {}, {})
    stage.commit(wanted="f", config={}, inputs={}, metrics=metrics, cost=cost, seed=0, seconds=seconds)


def make(folder: Path, hours: float | None = None, **budget: Any) -> Campaign:
    """A campaign with its first round done in 120 s."""
    run = RunDirectory(folder / "run")
    Path(run.path).mkdir()
    commit(run.stage("questions"), 0.0, {"seed": 40, "candidate": 150, "eval": 100}, {})
    for name, seconds in FIRST_ROUND.items():
        cost = {"generate_seconds": 50.0} if name == "observe" else {}
        commit(run.stage(name, 0), seconds, METRICS.get(name, {}), cost)
    values = {"rounds": 3, "selection": {"budget": 12}, "budget": budget | {"hours": hours}}
    config = RunConfig.model_validate(values)
    campaign = Campaign(config, run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")
    campaign._model_id = "model"
    return campaign


def hours_for(seconds: float) -> float:
    """A cap that leaves so many seconds after the first round."""
    return (sum(FIRST_ROUND.values()) + seconds + TEARDOWN_S) / 3600


def test_measuring_the_next_state_takes_what_is_left_of_the_first_observation_without_rehearsal(tmp_path: Path) -> None:
    # 40 x 10 + 100 of 2,000 samples are drawn again; starting takes the same 10 s.
    assert needed_seconds(make(tmp_path), stages.observe, 1) == 10 + 50 * 500 / 2000 + 2


def test_a_round_takes_what_the_last_took_more_tuning_and_the_closing_observation(tmp_path: Path) -> None:
    campaign = make(tmp_path)
    closing = 10 + 50 * 500 / 2000 + 2
    tuning = 10 + 30 * 24 / 12
    assert needed_seconds(campaign, stages.label, 1) == 1 + 10 + 2 + 1 + 1 + 3 + tuning + closing
    assert needed_seconds(campaign, stages.tune, 1) == tuning + closing


def test_a_fixed_number_of_steps_does_not_grow(tmp_path: Path) -> None:
    campaign = make(tmp_path)
    tuning = campaign.config.tuning.model_copy(update={"max_steps": 100})
    campaign.config = campaign.config.model_copy(update={"tuning": tuning})
    closing = 10 + 50 * 500 / 2000 + 2
    assert needed_seconds(campaign, stages.tune, 1) == 40 + closing


def test_in_a_first_round_only_what_has_been_measured_counts(tmp_path: Path) -> None:
    campaign = make(tmp_path)
    closing = 10 + 50 * 500 / 2000 + 2
    assert needed_seconds(campaign, stages.extract, 0) == closing
    assert needed_seconds(campaign, stages.observe, 0) == 0
    assert needed_seconds(campaign, stages.pool, None) == 0


def test_a_stage_that_fits_is_made_and_one_that_does_not_is_not_begun(tmp_path: Path) -> None:
    made = []

    def work(stage: Stage) -> Outcome:
        made.append(stage.label)
        return {}, {}

    campaign = make(tmp_path, hours_for(60))
    commit_stage(campaign, "observe", 1, config={}, inputs=[], work=work)
    commit_stage(campaign, "cluster", 1, config={}, inputs=[], work=work)
    with pytest.raises(HoursUsedUp, match=r"round-001/label and what must follow it take about \d+ s more"):
        commit_stage(campaign, "label", 1, config={}, inputs=[], work=work)
    assert made == ["round-001/observe", "round-001/cluster"]
    assert campaign.run.read_bytes(f"{campaign.stage('label', 1).path}/plan.json") is None


def test_what_is_committed_is_skipped_even_when_no_time_is_left(tmp_path: Path) -> None:
    campaign = make(tmp_path)
    commit_stage(campaign, "label", 1, config={}, inputs=[], work=lambda _: ({}, {}))
    campaign.hours = Hours(campaign.run, 1e-6)
    commit_stage(campaign, "label", 1, config={}, inputs=[], work=lambda _: pytest.fail("made again"))
    with pytest.raises(HoursUsedUp, match="used up but for 0 s"):
        commit_stage(campaign, "extract", 1, config={}, inputs=[], work=lambda _: pytest.fail("begun"))


def test_hours_are_those_of_all_attempts_and_of_the_process_at_work(tmp_path: Path) -> None:
    campaign = make(tmp_path)
    stage = campaign.stage("observe", 1)
    stage.begin("f", {}, {})
    stage.note_spent({"seconds": 30.0})
    now = [1000.0]
    hours = Hours(campaign.run, 0.1, clock=lambda: now[0])
    now[0] += 50
    assert hours.left_s == pytest.approx(360 - 120 - 30 - 50 - TEARDOWN_S)
    assert Hours(campaign.run, None).left_s == float("inf")


def test_what_outlasts_the_cap_is_interrupted(tmp_path: Path) -> None:
    hours = Hours(RunDirectory(tmp_path), (TEARDOWN_S + 0.2) / 3600)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(HoursUsedUp, match="what was at work was stopped"), hours.deadline():
        time.sleep(60)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_process_that_ignores_interrupts_is_interrupted_all_the_same(tmp_path: Path) -> None:
    hours = Hours(RunDirectory(tmp_path), (TEARDOWN_S + 0.2) / 3600)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(HoursUsedUp), hours.deadline():
            time.sleep(60)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_person_who_interrupts_is_not_taken_for_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Hours(RunDirectory(tmp_path), 1.0).deadline():
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.whole
def test_a_run_whose_hours_end_in_the_middle_of_tuning_is_complete_within_them_and_goes_on_with_more(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    """The tuning would go on for days."""
    run_dir = tmp_path / "run"
    later = ("tune", "round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(finished.run_dir, run_dir, ignore=shutil.ignore_patterns(*later))
    run = RunDirectory(run_dir)
    cap = (worked_seconds(run) + 16 + TEARDOWN_S) / 3600
    options = ["--set", f"budget.hours={cap}", "--set", "tuning.max_steps=1000000"]
    ended = ka2l("resume", run_dir, *options, *on_cluster)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert f"The budget of {cap:g} hours is used up" in summary["reason"]
    assert summary["total_seconds"] <= worked_seconds(run) <= 3600 * cap
    assert run.stage("tune", 0).manifest() is None
    assert not (run_dir / "scratch").exists()
    more = ["--redo-from", "tune", "--set", "budget.hours=9", "--set", "tuning.max_steps=4"]
    ended = ka2l("resume", run_dir, *more, *on_cluster, kill={"event": "stage_committed", "stage": "tune"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert run.stage("tune", 0).manifest() is not None
