"""Ray Data runs a job over shards: a pool of actors, each with the job opened once. Only shard names and counts travel
to the driver; rows go from storage to worker to storage."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import ray.data
from ray.exceptions import RayTaskError

from actors.host import Stats, redirect_output
from ka2l.errors import KA2LError, ResourcesBusyError


class ShardJob(Protocol):
    """Work on shards. Pickled to the workers by reference, so its class must be importable there."""

    def open(self) -> None:
        """Load what the job needs, once a worker."""

    def run(self, name: str) -> tuple[int, Stats]:
        """Make one shard and write it; returns its rows and what they took."""


class ShardDone(NamedTuple):
    """One shard that has been written."""

    name: str
    num_rows: int
    stats: Stats


class _Worker:
    def __init__(self, job: ShardJob, log_path: str | None) -> None:
        redirect_output(log_path)
        self.job = job
        self.is_open = False

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        # Opened here and not in the constructor, so that what goes wrong reaches the driver as it was raised.
        if not self.is_open:
            self.job.open()
            self.is_open = True
        done = [self.job.run(str(name)) for name in batch["shard"]]
        return {
            "shard": [str(name) for name in batch["shard"]],
            "num_rows": [rows for rows, _ in done],
            "stats": [json.dumps(stats) for _, stats in done],
        }


def map_shards(
    job: ShardJob, names: Sequence[str], *, replicas: int, cpus: float, gpus: float, log_path: str | None
) -> Generator[ShardDone]:
    """Run ``job`` over shards, yielding each as it is written.

    Raises:
        KA2LError: as a worker raised it.
    """
    with quiet_data_context():
        dataset = ray.data.from_items([{"shard": name} for name in names], override_num_blocks=len(names)).map_batches(
            _Worker,
            fn_constructor_kwargs={"job": job, "log_path": log_path},
            batch_size=1,
            # One shard at a time: no shard waits behind a busy worker while another is idle.
            compute=ray.data.ActorPoolStrategy(size=min(replicas, len(names)), max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus or None,
        )
        try:
            for row in dataset.iter_rows():
                yield ShardDone(row["shard"], int(row["num_rows"]), json.loads(row["stats"]))
        except Exception as error:
            raise original_error(error) from error


_CHATTY = {
    "ray.data._internal.execution": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    # Prints a traceback that blames Ray for every error of ours; the error itself reaches the caller.
    "ray.data.exceptions": logging.CRITICAL,
}


@contextlib.contextmanager
def quiet_data_context() -> Iterator[None]:
    """Ray Data without bars and announcements, with rows in order."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # Row order decides which of two duplicates is kept.
    context.execution_options.preserve_order = True
    before = {name: logging.getLogger(name).level for name in _CHATTY}
    for name, level in _CHATTY.items():
        logging.getLogger(name).setLevel(level)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def original_error(error: BaseException) -> BaseException:
    """The KA2LError inside what Ray wrapped around it, or the error itself."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen or not isinstance(current, BaseException):
            continue
        seen.add(id(current))
        # Ray raises a mixture of its own class and the cause's, whose text is a traceback; the cause is inside.
        if isinstance(current, KA2LError) and not isinstance(current, RayTaskError):
            return current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return error


def wait_until_free(cpus: float, gpus: float, timeout_s: float) -> None:
    """Wait until the stage before has given back what the next one needs.

    Raises:
        ResourcesBusyError: still busy after ``timeout_s`` seconds.
    """
    wanted = {"CPU": cpus, "GPU": gpus}
    total = ray.cluster_resources()
    for name, amount in wanted.items():
        if amount > total.get(name, 0.0) + 1e-6:
            raise ResourcesBusyError(
                f"a worker wants {amount:g} {name}, the cluster has {total.get(name, 0.0):g}",
                hint="Lower cpus_per_* or gpus_per_* in the config, or add nodes.",
            )
    deadline = time.monotonic() + timeout_s
    while True:
        free = ray.available_resources()
        busy = {name: amount for name, amount in wanted.items() if free.get(name, 0.0) + 1e-6 < amount}
        if not busy:
            return
        if time.monotonic() > deadline:
            raise ResourcesBusyError(
                f"waited {timeout_s:g} s for {busy}, the cluster has free {free}",
                hint="Another job holds the resources, or an engine did not end: see `ray status`.",
            )
        time.sleep(0.2)
