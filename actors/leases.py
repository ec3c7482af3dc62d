"""Who of many runs on one cluster gets workers next.

Runs ask for the workers of a stage and give them back when it ends. Ray alone would grant what fits first, so that a
stage that needs a whole node waits for ever behind small ones; and it knows nothing of which run is late.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from actors.metrics import LEASES_HELD, LEASES_WAITING, Tags, show

if TYPE_CHECKING:
    from actors.shared import Service

NAMESPACE = "ka2l"
#: What others wait for comes before all that they wait with.
_SERVICE_PRIORITY = 1e9
_TINY = 1e-6
#: Seconds between two looks at the cluster's nodes.
_WATCH_S = 2.0


class Capacity(NamedTuple):
    """What a node has, or a worker takes."""

    cpus: float
    gpus: float

    def holds(self, other: Capacity) -> bool:
        return other.cpus <= self.cpus + _TINY and other.gpus <= self.gpus + _TINY


class Request(NamedTuple):
    """Workers that a stage wants, all at once."""

    key: str
    """Names the lease; unique among those that wait or hold."""
    worker: Capacity
    """Of each worker, which lies on one node whole."""
    num_workers: int
    min_workers: int
    """So many are enough to begin; ``num_workers`` where the stage cannot do with fewer."""
    priority: float = 0.0
    """Higher goes first; of equal ones, who asked first."""
    left: float | None = None
    """Work that its run has left, in a unit that all runs share; None for who wants all and no fair share."""

    @property
    def run(self) -> str:
        """Whose it is: what stands before the slash of its key."""
        return self.key.split("/")[0]


class Grant(NamedTuple):
    """Workers that a stage got."""

    key: str
    nodes: tuple[str, ...]
    """Node of each worker."""


class LeaseQueue:
    """Grants in the order of priority and, behind one that does not fit yet, what fits beside it.

    That is list scheduling with backfilling (Graham 1969; Feitelson and Weil 1998). Whoever has waited longer than
    ``patience_s`` at the head of the queue is not passed any more, so that none starves. Where there is not enough for
    all, nobody gets more workers than its share of the cluster, which is its share of all work that is left: so the
    runs end at about the same time, and no engine is started for little.

    Args:
        nodes: name -> what it has.
        patience_s: seconds that the first in the queue may be passed by others.
        clock: seconds.
    """

    def __init__(
        self, nodes: Mapping[str, Capacity], patience_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nodes = dict(nodes)
        self._free = dict(nodes)
        self._patience_s = patience_s
        self._clock = clock
        self._waiting: dict[str, tuple[Request, float]] = {}
        self._held: dict[str, tuple[Request, tuple[str, ...]]] = {}
        self._left: dict[str, float] = {}

    def ask(self, request: Request) -> None:
        """Queue up.

        Raises:
            ValueError: the key waits or holds already, or not even the empty cluster has room for ``min_workers``.
        """
        if request.key in self._waiting or request.key in self._held:
            raise ValueError(f"{request.key} has asked already")
        room = len(list(self._places(request.worker, self._nodes, request.min_workers)))
        if room < request.min_workers:
            raise ValueError(
                f"{request.key} wants {request.min_workers} workers of {request.worker.cpus:g} CPUs and "
                f"{request.worker.gpus:g} GPUs, and the cluster has room for {room}"
            )
        self._waiting[request.key] = (request, self._clock())
        if request.left is not None:
            self._left[request.run] = request.left

    def forget(self, run: str) -> None:
        """A run has ended: it has no work left."""
        self._left.pop(run, None)

    def give_back(self, key: str) -> None:
        """End a lease, or stop waiting for one; a key that has neither is no error."""
        self._waiting.pop(key, None)
        request, nodes = self._held.pop(key, (None, ()))
        if request is not None:
            for node in nodes:
                if node in self._free:
                    self._free[node] = _plus(self._free[node], request.worker, 1)

    def set_nodes(self, nodes: Mapping[str, Capacity]) -> list[str]:
        """Take in that nodes have come or gone; returns the keys of leases that had a worker on one that is gone."""
        gone = set(self._nodes) - set(nodes)
        lost = [key for key, (_, places) in self._held.items() if gone & set(places)]
        self._nodes = dict(nodes)
        self._free = dict(nodes)
        for request, places in self._held.values():
            for node in places:
                if node in self._free:
                    self._free[node] = _plus(self._free[node], request.worker, -1)
        return lost

    def grants(self) -> list[Grant]:
        """What can be granted now; it is held from here on."""
        now, granted, plenty = self._clock(), [], self._is_plenty()
        for request, since in self._queue():
            wanted = request.num_workers if plenty else self._fair(request)
            places = tuple(self._places(request.worker, self._free, wanted))
            if len(places) >= request.min_workers:
                for node in places:
                    self._free[node] = _plus(self._free[node], request.worker, -1)
                del self._waiting[request.key]
                self._held[request.key] = (request, places)
                granted.append(Grant(request.key, places))
            elif now - since > self._patience_s:
                break
        return granted

    def _fair(self, request: Request) -> int:
        """Workers that a run may have, by its share of all work that is left."""
        if request.left is None:
            return request.num_workers
        most = len(list(self._places(request.worker, self._nodes, self._most(request.worker))))
        share = request.left / max(_TINY, sum(self._left.values()))
        return min(request.num_workers, max(request.min_workers, math.ceil(most * share - _TINY)))

    def _most(self, worker: Capacity) -> int:
        """No more workers than this fit on all nodes together."""
        sums = [sum(node[index] for node in self._nodes.values()) for index in range(2)]
        return int(min(has / wants for has, wants in zip(sums, worker, strict=True) if wants > 0) + _TINY)

    @property
    def held(self) -> list[str]:
        """Keys of all leases that have been granted."""
        return list(self._held)

    @property
    def waiting(self) -> dict[str, float]:
        """Seconds that each has waited, the next to be granted first."""
        now = self._clock()
        return {request.key: now - since for request, since in self._queue()}

    def _queue(self) -> list[tuple[Request, float]]:
        return sorted(self._waiting.values(), key=lambda item: (-item[0].priority, item[1]))

    def _is_plenty(self) -> bool:
        """Whether the cluster could hold all that anybody here wants, held or waited for."""
        requests = [request for request, _ in [*self._waiting.values(), *self._held.values()]]
        for index in range(2):
            wanted = sum(request.num_workers * request.worker[index] for request in requests)
            if wanted > sum(node[index] for node in self._nodes.values()):
                return False
        return True

    @staticmethod
    def _places(worker: Capacity, free: Mapping[str, Capacity], num_workers: int) -> Iterator[str]:
        """Nodes for up to ``num_workers``, the fullest that has room first: large room is kept for large workers."""
        left = dict(free)
        for _ in range(num_workers):
            fitting = [name for name, node in left.items() if node.holds(worker)]
            if not fitting:
                return
            best = min(fitting, key=lambda name: (left[name].gpus, left[name].cpus, name))
            left[best] = _plus(left[best], worker, -1)
            yield best


class LeaseHost:
    """The queue as an actor that all runs of a benchmark share."""

    def __init__(self, patience_s: float, run: str = "") -> None:
        self._queue = LeaseQueue(alive_nodes(), patience_s)
        from actors.shared import Desk  # which stands on what stands on this module

        self._tags = Tags(run)
        self._desk = Desk(self._hold_service, self.give_back)
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
            self._desk.leave(prefix.removesuffix("/"))
        self._serve()

    async def join(self, service: Service, run: str) -> Any:
        """The worker of a service that runs share; see `actors.shared`."""
        return await self._desk.join(service, run)

    async def leave(self, run: str, key: str) -> None:
        """The run needs a service no more."""
        self._desk.leave(run, key)
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
            await self._desk.end_idle()

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


def alive_nodes() -> dict[str, Capacity]:
    """What every node of the cluster has in all."""
    return {
        node["NodeID"]: Capacity(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    }


def _plus(node: Capacity, worker: Capacity, sign: int) -> Capacity:
    return Capacity(node.cpus + sign * worker.cpus, node.gpus + sign * worker.gpus)
