"""Ray Data runs a job over shards: a pool of actors, each with the job opened once. Only shard names and counts travel
to the driver; rows go from storage to worker to storage."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import ray.data
from ray.exceptions import RayTaskError

from actors.host import Stats, redirect_output
from actors.workers.lease_queue import alive_nodes
from actors.workers.placement import Placement
from ka2l.errors import KA2LError, StageStalledError

#: Seconds between two looks at the cluster's nodes.
_LOOK_S = 5.0
#: Seconds without any shard, after which somebody is told, and then again.
_TELL_S = 300.0


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
    job: ShardJob,
    names: Sequence[str],
    *,
    placement: Placement,
    cpus: float,
    gpus: float,
    log_path: str | None,
    stall_s: float = math.inf,
    on_wait: Callable[[float], None] | None = None,
) -> Generator[ShardDone]:
    """Run ``job`` over shards, yielding each as it is written. A worker that dies is replaced, and makes its shard.

    Args:
        placement: where the workers go, and how many there are.
        cpus: of a worker.
        gpus: of a worker.
        log_path: file for what workers print.
        stall_s: seconds without any shard after which the workers are given up.
        on_wait: called, in another thread, with the seconds that have passed without any shard, now and then.

    Raises:
        KA2LError: as a worker raised it.
        StageStalledError: no shard was made in ``stall_s`` seconds, or a node is gone; what was yielded is written.
    """
    with quiet_data_context() as context:
        watch = _Watch(stall_s, on_wait)
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, watch.callback_class()]
        # Placement groups go to Ray Data's actors by an argument that is to be named otherwise after Ray 2.63.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        dataset = ray.data.from_items([{"shard": name} for name in names], override_num_blocks=len(names)).map_batches(
            _Worker,
            fn_constructor_kwargs={"job": job, "log_path": log_path},
            batch_size=1,
            # One shard at a time: no shard waits behind a busy worker while another is idle.
            compute=ray.data.ActorPoolStrategy(
                size=min(placement.num_workers, len(names)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=cpus,
            num_gpus=gpus or None,
            **placement.options(),
        )
        try:
            for row in dataset.iter_rows():
                watch.got_on()
                yield ShardDone(row["shard"], int(row["num_rows"]), json.loads(row["stats"]))
        except Exception as error:
            raise original_error(error) from error


#: Those of pipelines that run, by their ids.
_WATCHES: weakref.WeakValueDictionary[int, _Watch] = weakref.WeakValueDictionary()


def _look(key: int) -> None:
    if (watch := _WATCHES.get(key)) is not None:
        watch.look()


class _Watch:
    """Ends a pipeline that would wait for ever: for a worker that is stuck, or for one that finds no node any more."""

    def __init__(self, stall_s: float, on_wait: Callable[[float], None] | None) -> None:
        self._stall_s = stall_s
        self._on_wait = on_wait
        self._told = 0
        self._nodes = set(alive_nodes())
        self._last = self._looked = time.monotonic()

    def got_on(self) -> None:
        self._last = time.monotonic()
        self._told = 0

    def look(self) -> None:
        """Raise StageStalledError where there is nothing to wait for."""
        now = time.monotonic()
        if now - self._last > self._stall_s:
            raise StageStalledError(f"its workers have finished no shard for {now - self._last:,.0f} s")
        if self._on_wait is not None and now - self._last > (self._told + 1) * _TELL_S:
            self._told += 1
            self._on_wait(now - self._last)
        if now - self._looked > _LOOK_S:
            self._looked = now
            if gone := self._nodes - set(alive_nodes()):
                raise StageStalledError(f"{len(gone)} node(s) of the cluster are gone")

    def callback_class(self) -> type:
        """What Ray Data makes an instance of and calls at each step of its loop; errors it raises reach the caller."""
        key = id(self)
        _WATCHES[key] = self

        class Callback:
            def before_execution_starts(self, executor: Any) -> None: ...

            def on_execution_step(self, executor: Any) -> None:
                # Ray sends this class to its workers with everything that it holds: so it holds a number.
                _look(key)

            def after_execution_succeeds(self, executor: Any) -> None: ...

            def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

        return Callback


def is_workers_loss(error: BaseException) -> bool:
    """Whether an error of `map_shards` is about workers or nodes, and not about the work."""
    lost = isinstance(error, ray.exceptions.RayError) and not isinstance(error, RayTaskError)
    return lost or isinstance(error, StageStalledError)


_CHATTY = {
    "ray.data._internal.execution": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    # Prints a traceback that blames Ray for every error of ours; the error itself reaches the caller.
    "ray.data.exceptions": logging.CRITICAL,
}


@contextlib.contextmanager
def quiet_data_context() -> Iterator[ray.data.DataContext]:
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
            yield context
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
