"""What all stages share: the campaign's state, and how a stage is skipped, made and committed."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from actors.host import Host, Stats
from actors.leases import Capacity, Leases
from actors.metrics import SHARDS_MISSING, Tags, count_cost, count_shard, show, show_gpu_memory
from actors.shards import map_shards, wait_until_free
from engine.artifacts import RunDirectory, Stage, fingerprint, read_shard, write_shard
from engine.config import RunConfig
from engine.events import Events
from engine.hours import Hours
from engine.meter import Meter
from engine.trackers import Trackers
from ka2l.errors import AnnotationsPending, ConfigError, KA2LError, StageFailedError
from ka2l.models import ModelConfig, model_identity
from ka2l.records import SCHEMA_VERSION

#: What a stage's work hands back: metrics for the manifest and cost that is not in its shards.
Outcome = tuple[Mapping[str, Any], Mapping[str, float]]


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
    _model_id: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.hours = Hours(self.run, self.config.budget.hours)

    @property
    def model_id(self) -> str:
        """Identity of the base model, for fingerprints."""
        self._model_id = self._model_id or model_identity(self.model)
        return self._model_id

    @contextlib.contextmanager
    def hold(self, num_workers: int, cpus: float, gpus: float, *, least: int | None = None) -> Iterator[int]:
        """Have workers of ``cpus`` and ``gpus`` each for a block; yields how many, ``least`` or more.

        Raises:
            ResourcesBusyError: the cluster has no room for them, or none comes free in time.
        """
        least = num_workers if least is None else least
        with contextlib.ExitStack() as ended:
            if self.leases is not None:
                with self.meter.wait():
                    lease = self.leases.hold(Capacity(cpus, gpus), num_workers, least)
                    num_workers = ended.enter_context(lease)
            wait_until_free(least * cpus, least * gpus, self.config.ray.release_timeout_s)
            ended.enter_context(self.meter.hold(num_workers * cpus, num_workers * gpus))
            yield num_workers

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

    def adapter_dir(self, round_index: int) -> str | None:
        """Local folder of the adapter that round ``round_index`` asks; None in round 0, which asks the base model."""
        if round_index == 0:
            return None
        return self._local_folder(self.stage("tune", round_index - 1), "adapter")

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
                content = self.run.read_bytes(f"{stage.path}/{entry.path}")
                assert content is not None
                (folder / Path(entry.path).name).write_bytes(content)
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
                f"{path!r} as decoder.corpus or annotator.reference_table goes with pool.path testbed alone",
                hint="Name a file of your own, or set decoder.kind=none.",
            )
        return str(Path(self.pool_path).parent / name)

    def num_annotated(self, before_round: int) -> int:
        """Annotations bought in rounds before ``before_round``."""
        return sum(int(self.stage("annotate", r).require().metrics["num_annotated"]) for r in range(before_round))

    def budget_cap(self) -> int:
        """Most annotations of the whole run."""
        wanted = self.config.rounds * self.config.selection.budget
        cap = self.config.budget.annotations
        return wanted if cap is None else min(wanted, cap)

    def used_up(self, round_index: int) -> str | None:
        """Which cap leaves nothing for this round, in a sentence; None where none does."""
        if self.num_left(round_index) == 0:
            return f"The budget of {self.budget_cap():,} annotations is used up."
        return self.money_reason(round_index - 1) if round_index else None

    def money_reason(self, round_index: int) -> str | None:
        """That the cap on money ended a round's annotation early, in a sentence; None where it did not."""
        annotated = self.stage("annotate", round_index).require()
        if annotated.metrics.get("stopped") != "money":
            return None
        unasked = annotated.metrics["num_not_asked"]
        cap = self.config.budget.money
        return f"The budget of {cap:g} for annotation is used up; {unasked:,} selected questions were not asked."

    def num_left(self, round_index: int) -> int:
        """Questions this round may select."""
        left = self.budget_cap() - self.num_annotated(round_index)
        return max(0, min(self.config.selection.budget, left))


class ShardInput(NamedTuple):
    """One table that a job reads, shard by shard."""

    folder_url: str
    columns: list[str] | None = None
    eval_only: bool = False
    """Only rows of eval questions: the answers of all others stay unread."""


@dataclass
class HostJob:
    """Runs a host over shards: the same shard of every input in, one shard out."""

    make_host: Callable[[], Host]
    inputs: dict[str, ShardInput]
    folder_url: str
    host: Host | None = None
    tags: Tags | None = None

    def open(self) -> None:
        """Load the host's model."""
        self.host = self.make_host()

    def run(self, name: str) -> tuple[int, Stats]:
        """Make one shard."""
        assert self.host is not None
        started = time.perf_counter()
        tables = {key: read_shard(item.folder_url, name, item.columns) for key, item in self.inputs.items()}
        for key, item in self.inputs.items():
            if item.eval_only:
                questions = tables["questions"]
                ids = questions.filter(pc.equal(questions["split"], "eval"))["question_id"]
                tables[key] = tables[key].filter(pc.is_in(tables[key]["question_id"], ids.combine_chunks()))
        table, stats = self.host.process(tables)
        show_gpu_memory(self.tags)
        stats = {"seconds": time.perf_counter() - started} | stats
        write_shard(self.folder_url, name, table, stats)
        return tables["questions"].num_rows, stats


def commit_stage(
    campaign: Campaign,
    name: str,
    round_index: int | None,
    *,
    config: Mapping[str, Any],
    inputs: Sequence[Stage],
    work: Callable[[Stage], Outcome],
) -> Stage:
    """Skip the stage if it is committed with the same fingerprint, else make and commit it.

    Raises:
        StaleStageError: it was made with another config.
        HoursUsedUp: it is not begun, since it would not end within the cap on hours.
        StageFailedError: the work failed in a way that no KA2LError describes.
    """
    stage = campaign.stage(name, round_index)
    used = {source.label: source.require().fingerprint for source in inputs}
    model = {"content": campaign.model_id} | campaign.model.result_fields()
    config = {"run": {"seed": campaign.config.seed, "model": model}} | dict(config)
    wanted = fingerprint(schema=SCHEMA_VERSION, stage=name, round=round_index, config=config, inputs=used)
    if stage.is_complete(wanted, config, used):
        stage.verify()
        return stage
    campaign.hours.check(campaign, name, round_index)
    for source in inputs:
        source.verify()
    campaign.events.emit("stage_started", stage=name, round=round_index, fingerprint=wanted)
    try:
        with campaign.meter.measure(stage.begin(wanted, config, used), stage.note_spent):
            metrics, cost = work(stage)
        count_cost(campaign.tags(stage), cost)
        spent = campaign.meter.spent()
        seconds = spent.pop("seconds")
        manifest = stage.commit(
            wanted=wanted,
            config=config,
            inputs=used,
            metrics=metrics,
            cost=dict(cost) | spent,
            seed=campaign.config.seed,
            seconds=seconds,
        )
    except AnnotationsPending as pending:
        campaign.events.emit("stage_paused", stage=name, round=round_index, reason=pending.message)
        raise
    except KA2LError as error:
        with contextlib.suppress(KA2LError):  # a full disk must not hide the first error
            campaign.events.emit("stage_failed", stage=name, round=round_index, error=str(error))
        raise
    except Exception as error:
        with contextlib.suppress(KA2LError):
            campaign.events.emit("stage_failed", stage=name, round=round_index, error=repr(error))
        log = campaign.log_path(stage)
        raise StageFailedError(
            f"stage {stage.label} failed: {_last_line(error)}\n{_tail(log)}",
            hint=f"The whole log is {log}. What is committed is safe: ka2l resume {campaign.run.url}",
        ) from error
    campaign.events.emit(
        "stage_committed", stage=name, round=round_index, seconds=manifest.seconds, metrics=manifest.metrics
    )
    return stage


def run_host(
    campaign: Campaign,
    stage: Stage,
    make_host: Callable[[], Host],
    inputs: dict[str, ShardInput],
    *,
    replicas: int,
    cpus: float,
    gpus: float,
    over: Stage | None = None,
) -> None:
    """Make the missing shards of a stage with ``replicas`` hosts: one for each of ``over``, the pool's questions."""
    questions = over or campaign.stage("questions")
    manifest = questions.require()
    rows = {entry.path: entry.num_rows or 0 for entry in manifest.files}
    finished = stage.finished_shards()
    missing = [name for name in questions.shard_names() if name not in finished]
    with campaign.events.progress(stage.label, sum(rows.values()), "questions") as progress:
        if finished:
            progress.advance(sum(rows[name] for name in finished), f"{len(finished)} shards were there")
        tags = campaign.tags(stage)
        job = HostJob(make_host, inputs, stage.url, tags=tags)
        log = campaign.log_path(stage)
        while missing:
            show(SHARDS_MISSING, tags, len(missing))
            with (
                campaign.hold(min(replicas, len(missing)), cpus, gpus, least=1) as workers,
                contextlib.closing(
                    map_shards(job, missing, replicas=workers, cpus=cpus, gpus=gpus, log_path=log)
                ) as shards,
            ):
                ends = time.monotonic() + campaign.slice_s
                for done in shards:
                    campaign.note_shard(stage, done.name, done.num_rows, done.stats)
                    progress.advance(done.num_rows)
                    missing.remove(done.name)
                    show(SHARDS_MISSING, tags, len(missing))
                    # What is under way in other workers is lost: a shard each.
                    if time.monotonic() > ends and campaign.leases is not None and campaign.leases.others_wait():
                        break


def _tail(path: str, num_lines: int = 15) -> str:
    file = Path(path)
    if not file.is_file():
        return ""
    lines = file.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"    {line}" for line in lines)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
