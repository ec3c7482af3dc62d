"""What all stages share: the campaign's state, and how a stage is skipped, made and committed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.metrics import Tags, count_cost, count_shard
from actors.workers.lease_queue import Capacity
from actors.workers.leases import Leases
from actors.workers.placement import Placement, reserved, wait_until_free
from engine.config import RunConfig
from engine.execution.hours import Hours
from engine.execution.meter import Meter
from engine.execution.remaining import RunSize, work_left
from engine.execution.trackers import Trackers
from engine.stages.kind import StageKind, Work
from engine.store.events import Events
from engine.store.manifest import fingerprint
from engine.store.run_directory import RunDirectory
from engine.store.stage_folder import Stage
from ka2l.errors import AnnotationsPending, ConfigError, KA2LError, StageFailedError, StaleStageError
from ka2l.model.loading import ModelConfig, ModelState, model_identity
from ka2l.model.sizing import model_needs
from ka2l.schemas import SCHEMA_VERSION


@dataclass
class Campaign:
    """One run: its config, its directory and what has been said about it."""

    config: RunConfig
    run: RunDirectory
    events: Events
    model: ModelConfig
    """The model with ``testbed`` resolved to a directory."""
    pool_path: str
    """The pool with ``testbed`` resolved to a file."""
    leases: Leases | None = None
    """Where workers are to be asked for, when other runs share the cluster."""
    slice_s: float = float("inf")
    """Seconds after which a stage lets others have its workers."""
    trackers: Trackers = field(default_factory=Trackers)
    """Told of every round and training step."""
    meter: Meter = field(default_factory=Meter, init=False)
    """Counts what the stage at work takes."""
    hours: Hours = field(init=False)
    """What is left of the cap on hours."""
    round_index: int = field(default=0, init=False)
    """Of the stage at work."""
    _model_id: str = field(default="", init=False)
    _billions: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.hours = Hours(self.run, self.config.budget.hours)

    @property
    def model_id(self) -> str:
        """Identity of the base model, for fingerprints."""
        self._model_id = self._model_id or model_identity(self.model)
        return self._model_id

    @contextlib.contextmanager
    def hold(
        self, num_workers: int, cpus: float, gpus: float, *, least: int | None = None, reserve: bool = True
    ) -> Iterator[Placement]:
        """Have room for workers of ``cpus`` and ``gpus`` each for a block; yields how many, ``least`` or more, and
        where. Without ``reserve`` there is room when the block begins, and it is set aside by whoever starts them.

        Raises:
            ResourcesBusyError: the cluster has no room for them, or none comes free in time.
        """
        worker, timeout_s = Capacity(cpus, gpus), self.config.ray.release_timeout_s
        least = num_workers if least is None else least
        with contextlib.ExitStack() as ended:
            if self.leases is not None:
                with self.meter.wait():
                    num_workers = ended.enter_context(self.leases.hold(worker, num_workers, least, self.work_left()))
            placement = Placement(num_workers)
            if reserve:
                placement = ended.enter_context(reserved(worker, num_workers, least, timeout_s))
            else:
                wait_until_free(worker, num_workers, timeout_s)
            ended.enter_context(self.meter.hold(placement.num_workers * cpus, placement.num_workers * gpus))
            yield placement

    def work_left(self) -> float:
        """GPU-seconds from this round's beginning to the run's end, as `engine.execution.remaining` reckons."""
        config, counts = self.config, self.stage("questions").require().metrics
        if not self._billions:
            needs = model_needs(self.model.source, trust_remote_code=self.model.trust_remote_code)
            self._billions = needs.num_parameters / 1e9
        num_candidates = int(counts["candidate"])
        size = RunSize(
            billions=self._billions,
            num_questions=int(counts["usable"]),
            num_sampled=int(counts["usable"]) - (0 if config.selection.samples_candidates else num_candidates),
            num_rehearsed=round(config.tuning.rehearsal * num_candidates),
            budget=config.selection.budget,
            rounds=config.rounds,
        )
        return work_left(size, self.round_index)

    def make(self, kind: StageKind, round_index: int | None = None) -> None:
        """Commit a stage, unless this round has none or it is committed with the same fingerprint.

        Raises:
            StaleStageError: it was made with another config.
            HoursUsedUp: it is not begun, since it would not end within the cap on hours.
            StageFailedError: the work failed in a way that no KA2LError describes.
        """
        if not kind.needed(self.config, round_index or 0):
            return
        work = kind.plan(self, round_index or 0)
        if work is None:
            return
        *others, main = (self.stage(name, round_index) for name in kind.folders)
        self._commit(kind, main, work)
        for other in others:  # what the same work has written beside it
            self._commit(kind, other, Work(work.config, [main], lambda _: (main.require().metrics, {})))

    def _commit(self, kind: StageKind, stage: Stage, work: Work) -> None:
        name, round_index = stage.name, stage.round_index
        used = {source.label: source.require().fingerprint for source in work.inputs}
        model = {"content": self.model_id} | self.model.result_fields()
        config = {"run": {"seed": self.config.seed, "model": model}} | dict(work.config)
        wanted = fingerprint(schema=SCHEMA_VERSION, stage=name, round=round_index, config=config, inputs=used)
        if _is_complete(kind, stage, wanted, config, used):
            stage.verify()
            return
        self.hours.check(self, kind, round_index)
        self.round_index = round_index or 0
        for source in work.inputs:
            source.verify()
        self.events.emit("stage_started", stage=name, round=round_index, fingerprint=wanted)
        with self._failures_told(stage):
            with (
                self.meter.measure(stage.begin(wanted, config, used), stage.note_spent),
                self.events.working(stage.label),
            ):
                metrics, cost = work.make(stage)
            count_cost(self.tags(stage), cost)
            spent = self.meter.spent()
            seconds = spent.pop("seconds")
            manifest = stage.commit(
                wanted=wanted,
                config=config,
                inputs=used,
                metrics=metrics,
                cost=dict(cost) | spent,
                seed=self.config.seed,
                seconds=seconds,
            )
        self.events.emit(
            "stage_committed", stage=name, round=round_index, seconds=manifest.seconds, metrics=manifest.metrics
        )

    @contextlib.contextmanager
    def _failures_told(self, stage: Stage) -> Iterator[None]:
        """What goes wrong with a stage is an event, and a KA2LError."""
        where: dict[str, Any] = {"stage": stage.name, "round": stage.round_index}
        try:
            yield
        except AnnotationsPending as pending:
            self.events.emit("stage_paused", **where, reason=pending.message)
            raise
        except KA2LError as error:
            with contextlib.suppress(KA2LError):  # a full disk must not hide the first error
                self.events.emit("stage_failed", **where, error=str(error))
            raise
        except Exception as error:
            with contextlib.suppress(KA2LError):
                self.events.emit("stage_failed", **where, error=repr(error))
            log = self.log_path(stage)
            raise StageFailedError(
                f"stage {stage.label} failed: {_last_line(error)}\n{_tail(log)}",
                hint=f"The whole log is {log}. What is committed is safe: ka2l resume {self.run.url}",
            ) from error

    def stage(self, name: str, round_index: int | None = None) -> Stage:
        """A stage of this run."""
        return self.run.stage(name, round_index)

    def tags(self, stage: Stage) -> Tags:
        """What the stage's metrics are tagged with."""
        folder, cell = Path(self.run.path), ""
        if self.leases is not None:  # RUN_DIR/cells/CELL
            folder, cell = folder.parent.parent, self.leases.cell
        return Tags(folder.name, cell, "" if stage.round_index is None else str(stage.round_index), stage.name)

    def note_shard(self, stage: Stage, name: str, num_rows: int, stats: Mapping[str, float]) -> None:
        """Say that a shard has been written, and what it took."""
        self.events.emit("shard_written", stage=stage.name, round=stage.round_index, shard=name)
        count_shard(self.tags(stage), num_rows, stats)

    def log_path(self, stage: Stage) -> str:
        """Where the chatter of a stage's workers goes."""
        return f"{self.run.logs()}/{stage.label.replace('/', '-')}.log"

    def state(self, round_index: int) -> ModelState:
        """What round ``round_index`` asks; round 0 the base model."""
        if round_index == 0:
            return ModelState(self.model)
        stage = self.adapter_stage(round_index - 1)
        if not _holds(stage, "model"):
            return ModelState(self.model, self._local_folder(stage, "adapter"))
        return ModelState(self.model.model_copy(update={"path": self._local_folder(stage, "model"), "revision": None}))

    def adapter_stage(self, round_index: int) -> Stage:
        """The stage that trains a round's model state to its end."""
        return self.stage("compare" if self.config.tuning.compares else "tune", round_index)

    def trained_dir(self, stage: Stage) -> str:
        """Local folder of what a stage has trained, for training to go on from: the adapter, or the whole model where
        there is none."""
        return self._local_folder(stage, "adapter" if _holds(stage, "adapter") else "model")

    def decoder_dir(self, round_index: int | None) -> str:
        """Local folder of the decoder that was fitted in a round."""
        return self._local_folder(self.stage("decoder", round_index), "decoder")

    def _local_folder(self, stage: Stage, name: str) -> str:
        """A folder of a committed stage; copied to the local disk where the run directory is behind a URL."""
        manifest = stage.verify()
        if self.run.is_local:
            return f"{stage.path}/{name}"
        folder = Path(tempfile.gettempdir()) / f"ka2l-{name}-{manifest.fingerprint}"
        folder.mkdir(exist_ok=True)
        for entry in manifest.files:
            if entry.path.startswith(f"{name}/"):
                self.run.copy_out(f"{stage.path}/{entry.path}", folder / Path(entry.path).name)
        return str(folder)

    def corpus_path(self) -> str | None:
        """File of the decoder's further training questions; ``testbed`` resolved to the crowd's."""
        return self._beside_pool(self.config.decoder.corpus, "background.jsonl")

    def reference_table_path(self) -> str | None:
        """File that answers decoded questions; ``testbed`` resolved to its facts. None without a decoder."""
        if self.config.decoder.kind == "none":
            return None
        return self._beside_pool(self.config.annotator.reference_table, "answers.parquet")

    def _beside_pool(self, path: str | None, name: str) -> str | None:
        if path != "testbed":
            return path
        if self.config.pool.path != "testbed":
            raise ConfigError(
                f"{path!r} as decoder.corpus or annotator.reference_table works only with pool.path testbed",
                hint="Name a file of your own, or set decoder.kind=none.",
            )
        return str(Path(self.pool_path).parent / name)

    def num_annotated(self, before_round: int) -> int:
        """Annotations bought in rounds before ``before_round``."""
        return sum(int(self.stage("annotate", r).require().metrics["num_annotated"]) for r in range(before_round))

    def num_left(self, round_index: int) -> int:
        """Questions this round may select."""
        left = self.config.annotation_cap - self.num_annotated(round_index)
        return max(0, min(self.config.selection.budget, left))


def _holds(stage: Stage, folder: str) -> bool:
    return any(entry.path.startswith(f"{folder}/") for entry in stage.require().files)


def _is_complete(
    kind: StageKind, stage: Stage, wanted: str, config: Mapping[str, Any], used: Mapping[str, str]
) -> bool:
    """Whether the stage is committed with this fingerprint. A leaf that is not is removed, and made anew."""
    try:
        return stage.is_complete(wanted, config, used)
    except StaleStageError:
        if not kind.is_leaf:
            raise
        stage.remove()
        return False


def _tail(path: str, num_lines: int = 15) -> str:
    file = Path(path)
    if not file.is_file():
        return ""
    lines = file.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"    {line}" for line in lines)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
