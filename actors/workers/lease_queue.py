"""Priority queue that grants Ray workers to concurrent runs.

Ray alone grants the first request that fits, so a stage that needs a whole node can wait for ever behind small ones,
and Ray does not know which run is late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ray

_TINY = 1e-6


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


def alive_nodes() -> dict[str, Capacity]:
    """What every node of the cluster has in all."""
    return {
        node["NodeID"]: Capacity(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    }


def _plus(node: Capacity, worker: Capacity, sign: int) -> Capacity:
    return Capacity(node.cpus + sign * worker.cpus, node.gpus + sign * worker.gpus)
