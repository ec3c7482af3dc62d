"""Makes the missing shards of a stage, and replaces workers that die."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.host import Host
from actors.metrics import SHARDS_MISSING, count_failed_rows, count_worker_restarts, show
from actors.workers.lease_queue import Capacity
from actors.workers.ray_data import ShardDone, is_workers_loss, map_shards
from engine.execution.jobs import DEATHS, FAILED, HostJob, ShardInput
from engine.progress import Progress
from engine.store.stage_folder import Stage
from ka2l.errors import TooManyFailuresError, first_line

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

#: Without any shard for so many deadlines, all workers are replaced: each has one for its model and one for a shard.
_DEADLINES = 2.5


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
    """Make the missing shards of a stage with ``replicas`` hosts: one for each of ``over``, the pool's questions.

    Raises:
        TooManyFailuresError: more questions than the config allows could not be worked on.
        StageStalledError: workers were lost or stuck, and so were those that took their place.
    """
    ShardRun(campaign, stage, make_host, inputs, replicas, Capacity(cpus, gpus), over).run()


class ShardRun:
    """One pass over the shards of a stage.

    Args:
        campaign: the run.
        stage: what is made.
        make_host: makes what a worker hosts; pickled by reference.
        inputs: tables of the same shards.
        replicas: workers wanted.
        worker: what each takes.
        over: stage whose shards these are; the pool's questions where not given.
    """

    def __init__(
        self,
        campaign: Campaign,
        stage: Stage,
        make_host: Callable[[], Host],
        inputs: dict[str, ShardInput],
        replicas: int,
        worker: Capacity,
        over: Stage | None,
    ) -> None:
        self.campaign = campaign
        self.stage = stage
        self.replicas = replicas
        self.worker = worker
        self.faults = campaign.config.faults
        self.tags = campaign.tags(stage)
        self.job = HostJob(make_host, inputs, stage.url, replicas, self.faults, self.tags)
        source = over or campaign.stage("questions")
        self.rows = {entry.path: entry.num_rows or 0 for entry in source.require().files if entry.num_rows is not None}
        finished = stage.finished_shards()
        self.finished = [name for name in source.shard_names() if name in finished]
        self.missing = [name for name in source.shard_names() if name not in finished]
        self.num_failed = len(stage.failures()) if finished else 0
        self.losses = 0
        """Times in a row that all workers were lost before any made a shard."""

    def run(self) -> None:
        """Returns once every shard is there; raises as `run_host` does."""
        self.stage.forget_attempts("open-")
        with self.campaign.events.progress(self.stage.label, sum(self.rows.values()), "questions") as progress:
            if self.finished:
                done = sum(self.rows[name] for name in self.finished)
                progress.skip(done, f"{len(self.finished)} shards were there")
            while self.missing:
                try:
                    self._slice(progress)
                except Exception as error:
                    if not is_workers_loss(error) or self.losses >= self.faults.worker_replacements:
                        raise
                    self.losses += 1
                    self._say_lost(error)
            self._check_failures()

    def _slice(self, progress: Progress) -> None:
        """Work until all is done, or others are to have the workers."""
        campaign, wanted = self.campaign, min(self.replicas, len(self.missing))
        show(SHARDS_MISSING, self.tags, len(self.missing))
        cpus, gpus = self.worker
        with (
            campaign.hold(wanted, cpus, gpus, least=1) as placement,
            contextlib.closing(
                map_shards(
                    self.job, list(self.missing), placement=placement, cpus=cpus, gpus=gpus,
                    log_path=campaign.log_path(self.stage), stall_s=_DEADLINES * self.faults.deadline_s,
                    on_wait=self._say_waiting,
                )
            ) as shards,
        ):  # fmt: skip
            ends = time.monotonic() + campaign.slice_s
            for done in shards:
                self.losses = 0
                self._take(done, progress)
                # What is under way in other workers is lost: a shard each.
                if time.monotonic() > ends and campaign.leases is not None and campaign.leases.others_wait():
                    break
        if self.missing:
            self.stage.forget_attempts()

    def _take(self, done: ShardDone, progress: Progress) -> None:
        stage, events = self.stage, self.campaign.events
        self.campaign.note_shard(stage, done.name, done.num_rows, done.stats)
        self.missing.remove(done.name)
        show(SHARDS_MISSING, self.tags, len(self.missing))
        deaths, failed = int(done.stats.get(DEATHS, 0)), int(done.stats.get(FAILED, 0))
        count_worker_restarts(self.tags, deaths)
        count_failed_rows(self.tags, failed)
        if deaths:
            events.emit("worker_replaced", stage=stage.name, round=stage.round_index, shard=done.name, times=deaths)
        if failed:
            self.num_failed += failed
            events.emit("questions_failed", stage=stage.name, round=stage.round_index, shard=done.name, num=failed)
        progress.advance(done.num_rows, f"{self.num_failed} failed" if self.num_failed else None)
        self._check_failures()

    def _check_failures(self) -> None:
        allowed = math.ceil(self.faults.max_failed_share * sum(self.rows.values()))
        if self.num_failed <= allowed:
            return
        examples = "; ".join(f"{name}: {reason}" for name, reason in self.stage.failures()[:3])
        raise TooManyFailuresError(
            f"{self.stage.label}: {self.num_failed} questions failed, {allowed} may ({examples})",
            hint="Fix the cause and make the stage again with --redo-from, or raise faults.max_failed_share.",
        )

    def _say_lost(self, error: BaseException) -> None:
        stage = self.stage
        count_worker_restarts(self.tags, self.replicas)
        said = first_line(error)
        self.campaign.events.emit("workers_lost", stage=stage.name, round=stage.round_index, reason=said)
        self.campaign.events.say(f"{stage.label:<22} {said}; {self._named_missing()}: its workers are replaced")

    def _say_waiting(self, seconds: float) -> None:
        stage = self.stage
        self.campaign.events.emit(
            "stage_waits", stage=stage.name, round=stage.round_index, seconds=round(seconds), missing=self.missing[:10]
        )
        self.campaign.events.say(f"{stage.label:<22} nothing was made for {seconds:,.0f} s; {self._named_missing()}")

    def _named_missing(self) -> str:
        named = ", ".join(self.missing[:3]) + (" ..." if len(self.missing) > 3 else "")
        return f"{len(self.missing)} shards are missing ({named})"
