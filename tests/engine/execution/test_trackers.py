"""Experiment trackers: what they are told, once, and that none of them can end a run."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import GeneralTracker
from rich.console import Console
from tensorboard_files import scalars

from engine import loop
from engine.config import RunConfig
from engine.execution import trackers
from engine.execution.campaign import Campaign
from engine.execution.trackers import PACKAGES, Trackers, check_trackers, open_trackers
from engine.store.events import Events, read_events
from engine.store.run_directory import RunDirectory
from engine.store.stage_folder import Stage
from ka2l.errors import ConfigError
from ka2l.model.loading import ModelConfig

REPOSITORY = Path(__file__).resolve().parents[3]


class Fake(GeneralTracker):
    """Takes note of what it is told; an entry in ``broken`` names a method that fails."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.run_ids: list[str | None] = []
        self.configs: list[dict[str, Any]] = []
        self.told: list[tuple[int | None, dict[str, float]]] = []
        self.options: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        self.num_finished = 0

    @property
    def tracker(self) -> Any:
        return self

    @property
    def info(self) -> Any:  # where MLflow's run has its id
        return self

    run_id = "id-on-the-server"

    def define_metric(self, *_: Any, **__: Any) -> None:
        """As W&B's run."""

    def start(self) -> None:
        self._fail_if_broken("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configs.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self._fail_if_broken("log")
        self.told.append((step, values))
        self.options.append(options)

    def finish(self) -> None:
        self._fail_if_broken("finish")
        self.num_finished += 1

    def _fail_if_broken(self, method: str) -> None:
        if method in self.broken:
            raise ConnectionError(f"{method}: nobody answers\nand more")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Stands for every tracker."""
    made = Fake()

    def make(run: RunDirectory, folder: Path, run_id: str | None) -> Fake:
        folder.mkdir(parents=True, exist_ok=True)
        made.run_ids.append(run_id)
        return made

    for name in PACKAGES:
        monkeypatch.setitem(trackers._MAKE, name, make)
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    return made


class Opened:
    """A run directory, and how to open its trackers as a run does when it starts."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory(folder / "mine")
        Path(self.run.path).mkdir()
        self.console = Console(record=True, width=200, file=StringIO())
        self.events = Events(self.run, self.console)

    def __call__(self, *names: str, **values: Any) -> Trackers:
        config = RunConfig.model_validate({"trackers": list(names)} | values)
        return open_trackers(config, self.run, self.events)

    def failures(self) -> list[str]:
        return [event["tracker"] for event in read_events(self.run) if event["event"] == "tracker_failed"]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(tmp_path)


def summary_round(index: int, accuracy: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    """A round as it stands in summary.json."""
    cost = {"annotation": 12, "money": 0.0, "tokens_generated": 300, "seconds": 9.5, "gpu_seconds": 0.0}
    row = {"round": index, "num_annotated": 12 * index, "accuracy": accuracy, "forgetting": None}
    return row | {"unknown_fraction": 0.4, "probe": {"auroc": 0.9, "auroc_wrong": None}, "cost": cost} | changes


def tuning(run: RunDirectory, index: int, fingerprint: str = "f") -> Stage:
    """A tune stage at work."""
    stage = run.stage("tune", index)
    stage.begin(fingerprint, {}, {})
    return stage


def commit(stage: Stage, num_steps: int) -> None:
    stage.commit(
        wanted="f", config={}, inputs={}, metrics={"num_steps": num_steps}, cost={}, seed=0, seconds=1.0
    )  # fmt: skip


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": number, "num_steps": 4, "loss": loss, "learning_rate": 0.1, "seconds": 0.2}


# -- what they are told ------------------------------------------------------------------------------------------------


def test_a_round_is_told_with_accuracy_auroc_annotations_and_cost(fake: Fake, opened: Opened) -> None:
    opened("tensorboard").log_rounds([summary_round(1)])
    assert fake.told == [
        (
            1,
            {
                "round/accuracy": 0.5,
                "round/num_annotated": 12.0,
                "round/unknown_fraction": 0.4,
                "round/auroc": 0.9,
                "round/cost_annotations": 12.0,
                "round/cost_money": 0.0,
                "round/cost_tokens_generated": 300.0,
                "round/cost_seconds": 9.5,
                "round/cost_gpu_seconds": 0.0,
            },
        )
    ]


def test_a_round_of_which_nothing_is_measured_is_not_told(fake: Fake, opened: Opened) -> None:
    opened("tensorboard").log_rounds([summary_round(0), summary_round(1, None, unknown_fraction=None)])
    assert [index for index, _ in fake.told] == [0]


def test_training_steps_count_on_over_the_rounds(fake: Fake, opened: Opened) -> None:
    made = opened("tensorboard")
    for index in range(2):
        stage = tuning(opened.run, index)
        for number in (2, 4):
            made.log_step(stage, step(number, loss=1 / number))
        commit(stage, num_steps=4)
    assert [where for where, _ in fake.told] == [2, 4, 6, 8]
    assert fake.told[0][1] == {"training/loss": 0.5, "training/learning_rate": 0.1}


def test_wandb_gets_rounds_and_steps_as_axes_since_its_own_step_may_not_go_back(fake: Fake, opened: Opened) -> None:
    made = opened("wandb")
    made.log_step(tuning(opened.run, 0), step(2))
    made.log_rounds([summary_round(0)])
    assert [where for where, _ in fake.told] == [None, None]
    assert fake.told[0][1]["training"] == 2
    assert fake.told[1][1]["round"] == 0


def test_mlflow_is_told_which_run_it_is_since_threads_have_none(fake: Fake, opened: Opened) -> None:
    opened("mlflow").log_step(tuning(opened.run, 0), step(2))
    assert fake.options == [{"run_id": "id-on-the-server"}]


def test_the_config_is_told_once_flat_and_without_secrets(
    fake: Fake, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"annotator": {"kind": "teacher", "teacher": {"model": "m", "base_url": "http://me:hush@host/v1"}}}
    opened("tensorboard", **values).finish()
    opened("tensorboard", **values)
    (config,) = fake.configs
    assert config["selection.budget"] == RunConfig().selection.budget
    assert config["annotator.teacher.base_url"] == "http://***@host/v1"
    assert config["trackers"] == '["tensorboard"]'
    assert "hush" not in str(config)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())


def test_a_paused_run_has_no_finished_round_to_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "write_ledger", lambda run: None)
    monkeypatch.setattr(loop, "write_report", lambda run, status, reason: {"rounds": [summary_round(0)]})
    run = RunDirectory(tmp_path)
    campaign = Campaign(RunConfig(), run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")
    told: list[Any] = []
    monkeypatch.setattr(campaign.trackers, "log_rounds", told.append)
    loop.publish(campaign, "paused")
    assert told == []
    loop.publish(campaign, "running")
    assert told == [[summary_round(0)]]


# -- once --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_resumed_run_goes_on_in_the_trackers_run_and_tells_no_round_twice(
    name: str, fake: Fake, opened: Opened
) -> None:
    made = opened(name)
    made.log_rounds([summary_round(0)])
    made.finish()
    opened(name).log_rounds([summary_round(0), summary_round(1)])
    figures = [values["round/num_annotated"] for _, values in fake.told]
    assert figures == [0.0, 12.0]
    first, second = fake.run_ids
    if name == "mlflow":  # the server names the run
        assert (first, second) == (None, "id-on-the-server")
    elif name == "wandb":
        assert first == second is not None


def test_a_round_whose_figures_have_changed_is_told_again(fake: Fake, opened: Opened) -> None:
    opened("tensorboard").log_rounds([summary_round(0, 0.5)])
    opened("tensorboard").log_rounds([summary_round(0, 0.6)])  # after --redo-from
    assert [values["round/accuracy"] for _, values in fake.told] == [0.5, 0.6]


def test_steps_of_a_training_that_begins_again_are_told_from_where_it_was_killed(fake: Fake, opened: Opened) -> None:
    made = opened("tensorboard")
    for number in (1, 2):
        made.log_step(tuning(opened.run, 0), step(number))
    made = opened("tensorboard")
    for number in (1, 2, 3):
        made.log_step(tuning(opened.run, 0), step(number))
    assert [where for where, _ in fake.told] == [1, 2, 3]
    opened("tensorboard").log_step(tuning(opened.run, 0, "another config"), step(1))
    assert [where for where, _ in fake.told] == [1, 2, 3, 1]


def test_a_tracker_that_is_added_later_is_told_all_rounds(fake: Fake, opened: Opened) -> None:
    opened("wandb").log_rounds([summary_round(0)])
    opened("wandb", "mlflow").log_rounds([summary_round(0), summary_round(1)])
    assert Counter(values["round/num_annotated"] for _, values in fake.told) == {0.0: 2, 12.0: 2}


def test_where_tensorboards_folder_is_gone_it_is_told_everything_again(fake: Fake, opened: Opened) -> None:
    opened("tensorboard").log_rounds([summary_round(0)])
    shutil.rmtree(trackers.tensorboard_folder(opened.run))
    opened("tensorboard").log_rounds([summary_round(0)])
    assert len(fake.told) == 2


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match="wandb, mlflow") as raised:
        check_trackers(["wandb", "tensorboard", "mlflow"])
    assert raised.value.hint is not None
    assert f'pip install "{PACKAGES["wandb"]}" "{PACKAGES["mlflow"]}"' in raised.value.hint


def test_the_command_line_says_so_before_anything_is_written(
    campaign_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.cli import main

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    values = campaign_files.values | {"trackers": ["wandb"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="not installed"):
        main.run(str(tmp_path / "config.yaml"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_extra_installs_what_the_hint_says() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["trackers"] == list(PACKAGES.values())


def test_an_unknown_tracker_is_a_wrong_config() -> None:
    with pytest.raises(ValueError, match="trackers"):
        RunConfig.model_validate({"trackers": ["notebook"]})


def test_a_tracker_that_fails_at_work_is_reported_once_and_others_go_on(fake: Fake, opened: Opened) -> None:
    healthy = Fake()
    trackers._MAKE["wandb"] = lambda *_: healthy  # the fixture puts it back
    made = opened("tensorboard", "wandb")
    fake.broken.add("log")
    made.log_rounds([summary_round(0), summary_round(1)])
    made.log_step(tuning(opened.run, 0), step(1))
    made.finish()
    assert opened.failures() == ["tensorboard"]
    said = opened.console.export_text()
    assert said.count("tracker tensorboard fails and is switched off: log: nobody answers") == 1
    assert "and more" not in said
    assert len(healthy.told) == 3
    assert healthy.num_finished == 1


def test_what_a_tracker_did_not_take_is_told_when_the_run_is_resumed(fake: Fake, opened: Opened) -> None:
    made = opened("tensorboard")
    fake.broken.add("log")
    made.log_rounds([summary_round(0)])
    fake.broken.clear()
    opened("tensorboard").log_rounds([summary_round(0)])
    assert [where for where, _ in fake.told] == [0]


def test_a_tracker_that_cannot_begin_is_the_users_to_change_and_one_that_cannot_go_on_is_not(
    fake: Fake, opened: Opened
) -> None:
    fake.broken.add("start")
    with pytest.raises(ConfigError, match="wandb cannot be started: start: nobody answers"):
        opened("wandb")
    fake.broken.clear()
    opened("wandb").finish()
    fake.broken.add("start")
    opened("wandb").log_rounds([summary_round(0)])
    assert opened.failures() == ["wandb"]
    assert fake.told == []


def test_failing_to_close_is_no_error(fake: Fake, opened: Opened) -> None:
    fake.broken.add("finish")
    opened("mlflow").finish()
    assert opened.failures() == ["mlflow"]


def test_without_trackers_there_is_no_file_and_nothing_to_do(opened: Opened) -> None:
    made = opened()
    made.log_rounds([summary_round(0)])
    made.finish()
    assert list(Path(opened.run.path).iterdir()) == []


# -- the real ones -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_each_round_and_step_of_a_run_once(opened: Opened) -> None:
    made = opened("tensorboard")
    made.log_step(tuning(opened.run, 0), step(2, loss=0.25))
    made.log_rounds([summary_round(0)])
    made.finish()
    made = opened("tensorboard")
    made.log_rounds([summary_round(0), summary_round(1, 0.75)])
    made.finish()
    folder = Path(opened.run.path) / "tensorboard"
    found = sorted(scalars(folder))
    assert [row for row in found if row[0] == "round/accuracy"] == [
        ("round/accuracy", 0, 0.5),
        ("round/accuracy", 1, 0.75),
    ]
    assert [row for row in found if row[0] == "training/loss"] == [("training/loss", 2, 0.25)]
    (config,) = folder.rglob("hparams.yml")
    assert yaml.safe_load(config.read_text())["selection.budget"] == RunConfig().selection.budget


def test_a_run_behind_a_url_has_tensorboards_folder_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = RunDirectory("memory://bucket/runs/mine")
    console = Console(record=True, width=300, file=StringIO())
    made = open_trackers(RunConfig(trackers=["tensorboard"]), run, Events(run, console))
    made.log_rounds([summary_round(0)])
    made.finish()
    folder = trackers.tensorboard_folder(run)
    assert folder.is_relative_to(tmp_path)
    assert re.fullmatch(r"mine-[0-9a-f]{8}", folder.name)
    assert ("round/accuracy", 0, 0.5) in list(scalars(folder))
    assert f"tensorboard --logdir {folder}" in console.export_text()
    assert json.loads(run.read_text("trackers.json") or "")["tensorboard"]["rounds"].keys() == {"0"}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_real_tracker_goes_on_with_its_run(name: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (Path(opened.run.path) / "mlruns").as_uri())
    monkeypatch.chdir(opened.run.path)
    for rounds in (1, 2):
        made = opened(name)
        made.log_step(tuning(opened.run, rounds - 1), step(2))
        made.log_rounds([summary_round(index) for index in range(rounds)])
        made.finish()
    assert opened.failures() == []
    assert json.loads(opened.run.read_text("trackers.json") or "")[name]["rounds"].keys() == {"0", "1"}
    if name == "mlflow":
        (run,) = pytest.importorskip("mlflow").search_runs(search_all_experiments=True, output_format="list")
        assert run.data.metrics["round/accuracy"] == 0.5
        assert run.data.params["selection.budget"] == str(RunConfig().selection.budget)
