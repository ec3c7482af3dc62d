"""Experiment trackers, through accelerate's interface: each round's figures, the training loss, the config once.

``trackers.json`` in the run directory says which run of each tracker is this one and what it has been told, so that a
resumed run goes on there and says nothing twice. A tracker that fails while the run is at work is switched off, and
the run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import TrackerName
from ka2l.errors import ConfigError, KA2LError, first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from engine.config import RunConfig
    from engine.store.events import Events
    from engine.store.run_directory import RunDirectory
    from engine.store.stage_folder import Stage

#: What pip installs for each; the extra ``trackers`` in pyproject.toml is all of them.
PACKAGES: dict[TrackerName, str] = {
    "tensorboard": "tensorboard>=2.21,<3",
    "wandb": "wandb>=0.31,<0.32",
    "mlflow": "mlflow-skinny>=3.17,<4",
}
#: Project of W&B and experiment of MLflow, where the environment names no other.
PROJECT = "ka2l"
STATE = "trackers.json"
#: Names of the x axes; metrics stand below them, such as ``round/accuracy``.
_ROUND, _TRAINING = "round", "training"


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Raises ConfigError, with the command that helps, where a tracker's package is missing."""
    from accelerate.tracking import get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        packages = " ".join(f'"{PACKAGES[name]}"' for name in missing)
        raise ConfigError(
            f"trackers names {', '.join(missing)}, which is not installed",
            hint=f"pip install {packages}, or leave it out of trackers.",
        )


class Trackers:
    """All trackers of a run; made by `open_trackers`, without arguments none.

    Args:
        backends: started trackers by name.
        state: content of ``trackers.json``, with an entry for each.
    """

    def __init__(
        self,
        run: RunDirectory | None = None,
        events: Events | None = None,
        backends: Mapping[str, GeneralTracker] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._events = events
        self._backends = dict(backends or {})
        self._state = {} if state is None else state
        self._steps_before: dict[int, int] = {}

    def log_rounds(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Tell each tracker the rounds of ``summary.json`` whose figures it does not know."""
        known = [(str(row["round"]), figures) for row in rounds if (figures := round_figures(row))]
        for name in list(self._backends):
            with self._switched_off_if_it_fails(name):
                told: dict[str, Any] = self._state[name]["rounds"]
                for index, figures in known:
                    if told.get(index) != figures:
                        self._log(name, _ROUND, int(index), figures)
                        told[index] = figures
                        self._save()

    def log_step(self, stage: Stage, report: Mapping[str, Any]) -> None:
        """Tell each tracker of a training step of a ``tune`` stage, unless an earlier attempt at it has.

        Args:
            report: what `ka2l.tuning.sft.tune` reports of a step.
        """
        for name in list(self._backends):
            with self._switched_off_if_it_fails(name):
                step, told = int(report["step"]), self._state[name]
                attempt = f"{stage.round_index}-{(stage.plan() or {}).get('fingerprint')}"
                if told.get("attempt") == attempt and step <= told["step"]:
                    continue
                values = {key: float(report[key]) for key in ("loss", "learning_rate")}
                self._log(name, _TRAINING, self._earlier_steps(stage) + step, values)
                told |= {"attempt": attempt, "step": step}
                self._save()

    def finish(self) -> None:
        """Close all of them."""
        for name in list(self._backends):
            with self._switched_off_if_it_fails(name):
                self._backends.pop(name).finish()

    def _log(self, name: str, axis: str, step: int, figures: Mapping[str, float]) -> None:
        values = {f"{axis}/{key}": value for key, value in figures.items()}
        backend = self._backends[name]
        if name == "wandb":  # its own step counts calls; see `_start`
            backend.log(values | {axis: step})
        elif name == "mlflow":  # a thread that has no run of its own would begin one
            backend.log(values, step=step, run_id=self._state[name]["id"])
        else:
            backend.log(values, step=step)

    def _save(self) -> None:
        assert self._run is not None
        self._run.write_json(STATE, self._state)

    def _earlier_steps(self, stage: Stage) -> int:
        """Training steps of the rounds before."""
        assert stage.round_index is not None
        if stage.round_index not in self._steps_before:
            manifests = (stage.run.stage(stage.name, index).manifest() for index in range(stage.round_index))
            steps = sum(int(manifest.metrics.get("num_steps", 0)) for manifest in manifests if manifest)
            self._steps_before[stage.round_index] = steps
        return self._steps_before[stage.round_index]

    @contextlib.contextmanager
    def _switched_off_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._backends.pop(name, None)
            assert self._events is not None
            _report(self._events, name, error)


def open_trackers(config: RunConfig, run: RunDirectory, events: Events) -> Trackers:
    """Start the trackers that the config names, each where an earlier attempt at this run left it.

    Raises:
        ConfigError: a package is missing, or a tracker that has not been told of this run yet cannot be started.
    """
    if not config.trackers:
        return Trackers()
    check_trackers(config.trackers)
    state = _read_state(run)
    backends: dict[str, GeneralTracker] = {}
    for name in dict.fromkeys(config.trackers):
        folder = tensorboard_folder(run)
        if name == "tensorboard" and not folder.exists():
            state.pop(name, None)  # on another machine, or removed: it is told everything again
        try:
            backends[name] = _start(name, run, folder, state, _flat(config))
        except Exception as error:
            if name in state:
                _report(events, name, error)
                continue
            raise ConfigError(
                f"the tracker {name} cannot be started: {first_line(error)}",
                hint=f"Check its address and login, or leave {name} out of trackers.",
            ) from error
        if name == "tensorboard" and not run.is_local:
            events.say(f"tensorboard --logdir {folder}")
    run.write_json(STATE, state)
    return Trackers(run, events, backends, state)


def round_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are told of a round of ``summary.json``; empty where nothing of its state is measured."""
    if row["accuracy"] is None and row["unknown_fraction"] is None:
        return {}
    probe, cost = row.get("probe") or {}, row["cost"]
    figures = {
        "accuracy": row["accuracy"],
        "forgetting": row["forgetting"],
        "num_annotated": row["num_annotated"],
        "unknown_fraction": row["unknown_fraction"],
        "auroc": probe.get("auroc"),
        "auroc_wrong": probe.get("auroc_wrong"),
        "cost_annotations": cost["annotation"],
        "cost_money": cost["money"],
        "cost_tokens_generated": cost["tokens_generated"],
        "cost_seconds": cost["seconds"],
        "cost_gpu_seconds": cost["gpu_seconds"],
    }
    return {key: float(value) for key, value in figures.items() if value is not None}


def tensorboard_folder(run: RunDirectory) -> Path:
    """``tensorboard`` in the run directory; for one behind a URL, a folder of this machine that is named after it."""
    if run.is_local:
        return Path(run.path) / "tensorboard"
    digest = hashlib.sha256(run.url.encode()).hexdigest()[:8]
    return Path(run.logs()).parent / "tensorboard" / f"{Path(run.path).name}-{digest}"


def _start(
    name: TrackerName, run: RunDirectory, folder: Path, state: dict[str, Any], config: dict[str, Any]
) -> GeneralTracker:
    """Start a tracker. One that is new to this run gets its config, and an entry in ``state``."""
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log messages, which it refuses to do before
    entry = state.get(name, {"id": uuid.uuid4().hex, "rounds": {}})
    tracker = _MAKE[name](run, folder, entry["id"] if name == "wandb" or name in state else None)
    tracker.start()
    if name == "mlflow":
        entry["id"] = tracker.tracker.info.run_id
    elif name == "wandb":
        # Rounds and training steps are axes of their own; W&B's step may not go back.
        for axis in (_ROUND, _TRAINING):
            tracker.tracker.define_metric(axis, hidden=True)
            tracker.tracker.define_metric(f"{axis}/*", step_metric=axis)
    if name not in state:
        tracker.store_init_configuration(config)
        state[name] = entry
    return tracker


def _tensorboard(run: RunDirectory, folder: Path, run_id: str | None) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # Names of event files hold the second they were opened in: two of one second would be one.
    return TensorBoardTracker(folder.name, str(folder.parent), filename_suffix=f".{uuid.uuid4().hex[:8]}")


def _wandb(run: RunDirectory, folder: Path, run_id: str | None) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=Path(run.path).name,
        id=run_id,
        resume="allow",
        dir=run.path if run.is_local else run.logs(),
        settings=wandb.Settings(console="off"),
    )


def _mlflow(run: RunDirectory, folder: Path, run_id: str | None) -> GeneralTracker:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=run_id, run_name=Path(run.path).name)


#: (run, TensorBoard's folder, id of the tracker's run to go on with) -> a tracker that has not been started.
_MAKE: dict[TrackerName, Callable[[RunDirectory, Path, str | None], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _read_state(run: RunDirectory) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        state = json.loads(run.read_text(STATE) or "{}")
        if isinstance(state, dict):
            return state
    return {}


def _flat(config: RunConfig) -> dict[str, Any]:
    """The config as ``a.b: value``, secrets masked, with lists and nulls as JSON."""
    from engine.config import mask_secrets

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else json.dumps(value)

    return dict(walk(mask_secrets(config.model_dump(mode="json", by_alias=True)), ""))


def _report(events: Events, name: str, error: Exception) -> None:
    with contextlib.suppress(KA2LError):  # a full disk is the run's own error to report
        events.say(f"the tracker {name} fails and is switched off: {first_line(error)}")
        events.emit("tracker_failed", tracker=name, error=first_line(error))
