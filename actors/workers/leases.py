"""The actor that grants workers to concurrent runs, and a run's client of it.

A run asks for the workers of a stage and gives them back when the stage ends. Which request is granted next is decided
by `actors.workers.lease_queue`; services that runs share are kept by `actors.workers.shared`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray

from actors.metrics import LEASES_HELD, LEASES_WAITING, Tags, show
from actors.workers.lease_queue import Capacity, LeaseQueue, Request, alive_nodes
from actors.workers.shared import Service, SharedServices

NAMESPACE = "ka2l"
#: What others wait for comes before all that they wait with.
_SERVICE_PRIORITY = 1e9
#: Seconds between two looks at the cluster's nodes.
_WATCH_S = 2.0


class LeaseHost:
    """The queue as an actor that all runs of a benchmark share."""

    def __init__(self, patience_s: float, run: str = "") -> None:
        self._queue = LeaseQueue(alive_nodes(), patience_s)
        self._tags = Tags(run)
        self._services = SharedServices(self._hold_service, self.give_back)
        self._answers: dict[str, asyncio.Future[int]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._ending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()  # which the loop alone would forget

    async def watch(self) -> None:
        """Look after nodes and patience from now on."""
        self._watching = self._watching or asyncio.get_running_loop().create_task(self._watch())

    async def acquire(self, request: Request) -> int:
        """Wait for workers; returns how many there are."""
        self._queue.ask(request)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[request.key] = answer
        self._serve()
        return await answer

    async def give_back(self, prefix: str) -> None:
        """End all leases whose keys start with ``prefix``, granted or waited for; ``RUN/`` ends the run."""
        for key in [*self._answers, *self._queue.held]:
            if key.startswith(prefix):
                self._queue.give_back(key)
                if (answer := self._answers.pop(key, None)) is not None:
                    answer.cancel()
        if prefix.endswith("/"):
            self._queue.forget(prefix.removesuffix("/"))
            self._services.leave(prefix.removesuffix("/"))
        self._serve()

    async def join(self, service: Service, run: str) -> Any:
        """The worker of a service that runs share; see `actors.workers.shared`."""
        return await self._services.join(service, run)

    async def leave(self, run: str, key: str) -> None:
        """The run needs a service no more."""
        self._services.leave(run, key)
        self._serve()

    async def _hold_service(self, key: str, cpus: float, gpus: float) -> int:
        return await self.acquire(Request(key, Capacity(cpus, gpus), 1, 1, priority=_SERVICE_PRIORITY))

    async def waiting(self) -> dict[str, float]:
        """Seconds that each has waited."""
        return self._queue.waiting

    def _serve(self) -> None:
        for grant in self._queue.grants():
            answer = self._answers.pop(grant.key)
            if not answer.cancelled():
                answer.set_result(len(grant.nodes))
        if self._queue.waiting and not self._ending.locked():
            self._tasks.add(task := asyncio.get_running_loop().create_task(self._end_idle()))
            task.add_done_callback(self._tasks.discard)
        show(LEASES_WAITING, self._tags, len(self._queue.waiting))
        show(LEASES_HELD, self._tags, len(self._queue.held))

    async def _end_idle(self) -> None:
        async with self._ending:
            await self._services.end_idle()

    async def _watch(self) -> None:
        # Nodes come and go; and patience ends with time alone.
        while True:
            await asyncio.sleep(_WATCH_S)
            self._queue.set_nodes(alive_nodes())
            self._serve()


class Leases:
    """A run's way to the host: ask, hold, give back.

    Args:
        name: of the host's actor.
        cell: of the run; names its leases.
        priority: of the run.
    """

    def __init__(self, name: str, cell: str, priority: float) -> None:
        self._host = ray.get_actor(name, namespace=NAMESPACE)
        self.cell = cell
        self._priority = priority
        self._count = 0

    @contextlib.contextmanager
    def hold(self, worker: Capacity, num_workers: int, min_workers: int, left: float | None) -> Iterator[int]:
        """Wait for workers, for the length of a block; yields how many there are.

        Args:
            left: as in `Request`.
        """
        self._count += 1
        key = f"{self.cell}/{os.getpid()}-{self._count}"
        granted: Any = self._host.acquire.remote(Request(key, worker, num_workers, min_workers, self._priority, left))
        try:
            yield ray.get(granted)
        finally:
            ray.get(self._host.give_back.remote(key))

    def join(self, service: Service) -> Any:
        """The worker of a service that runs share; waits for its room."""
        return ray.get(self._host.join.remote(service, self.cell))

    def leave(self, key: str) -> None:
        """This run needs the service no more."""
        ray.get(self._host.leave.remote(self.cell, key))

    def others_wait(self) -> bool:
        """Whether any run waits for workers."""
        return bool(ray.get(self._host.waiting.remote()))


def start_host(name: str, patience_s: float, run: str = "") -> Any:
    """Start the host; it ends with the process that started it. ``run`` is the benchmark's name in metrics."""
    actor: Any = ray.remote(LeaseHost)
    host = actor.options(num_cpus=0, max_concurrency=1000, name=name, namespace=NAMESPACE).remote(patience_s, run)
    ray.get(host.watch.remote())
    return host
