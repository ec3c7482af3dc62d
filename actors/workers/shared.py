"""Services that several runs on one cluster share: one teacher, one NLI model.

A `SharedServices` is part of the queue for workers (`actors.workers.leases.LeaseHost`): it starts a service when the
first run joins it, with room from the queue, and ends it when nobody uses it and others wait for room.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from actors.workers.faults import FaultsConfig
from actors.workers.placement import Placement
from actors.workers.standing import StandingWorker, StandingWorkers

if TYPE_CHECKING:
    from actors.workers.leases import Leases
    from ka2l.answers.equivalence import Equivalence


class Service(NamedTuple):
    """A host in a worker of its own."""

    key: str
    """Names what it hosts: runs that give the same key are given the same worker."""
    make_host: Callable[[], Any]
    """Pickled by reference."""
    cpus: float
    gpus: float
    deadline_s: float
    """Seconds that one call may take, loading the model included."""
    log_path: str | None


class _Shared(NamedTuple):
    started: asyncio.Task[Any]
    users: set[str]


class SharedServices:
    """Keeps track of services and who uses them.

    Args:
        hold: waits for room in the queue, under a key.
        give_back: gives that room back.
    """

    def __init__(
        self, hold: Callable[[str, float, float], Awaitable[Any]], give_back: Callable[[str], Awaitable[None]]
    ) -> None:
        self._hold = hold
        self._give_back = give_back
        self._services: dict[str, _Shared] = {}

    async def join(self, service: Service, run: str) -> Any:
        """The worker of a service, which is started where no run uses it yet."""
        shared = self._services.get(service.key)
        if shared is None:
            shared = _Shared(asyncio.get_running_loop().create_task(self._start(service)), set())
            self._services[service.key] = shared
        shared.users.add(run)
        try:
            return await asyncio.shield(shared.started)
        except Exception:  # as where the cluster could never hold it: the next one is told the same
            self._services.pop(service.key, None)
            raise

    async def _start(self, service: Service) -> Any:
        await self._hold(_lease(service.key), service.cpus, service.gpus)
        worker: Any = ray.remote(num_cpus=service.cpus, num_gpus=service.gpus, max_restarts=3, max_task_retries=3)(
            StandingWorker
        )
        return worker.remote(service.make_host, service.log_path, service.deadline_s, None)

    def leave(self, run: str, key: str | None = None) -> None:
        """A run uses a service no more; none at all where ``key`` is not given."""
        for name, shared in self._services.items():
            if key in (None, name):
                shared.users.discard(run)

    async def end_idle(self) -> None:
        """End what nobody uses."""
        for key, shared in list(self._services.items()):
            if not shared.users and shared.started.done():
                del self._services[key]
                ray.kill(shared.started.result())
                await self._give_back(_lease(key))


def _lease(key: str) -> str:
    return f"shared-{key}/service"


class SharedWorkers(StandingWorkers):
    """A `StandingWorkers` whose workers are services: other runs ask them, too, and closing it leaves them."""

    def __init__(self, leases: Leases, services: Sequence[Service], faults: FaultsConfig) -> None:
        first = services[0]
        super().__init__(
            first.make_host, placement=Placement(len(services)), cpus=first.cpus, gpus=first.gpus,
            log_path=None, faults=faults,
        )  # fmt: skip
        self._leases = leases
        self._services = services

    def _start(self) -> None:
        if not self._idle:
            self._idle = [self._leases.join(service) for service in self._services]

    def close(self) -> None:
        """Leave the workers to the other runs."""
        self._idle = []
        for service in self._services:
            self._leases.leave(service.key)


class EquivalenceHost:
    """Hosts an equivalence as a service."""

    def __init__(self, equivalence: Equivalence) -> None:
        self.equivalence = equivalence

    def decide(self, batch: tuple[list[str], list[str], list[str]]) -> list[bool]:
        """`Equivalence.equivalent` of (questions, left, right)."""
        return self.equivalence.equivalent(*batch)


class SharedEquivalence:
    """An `Equivalence` that asks a service. Travels to the workers of a stage."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See `ka2l.answers.equivalence.Equivalence`."""
        decided: list[bool] = ray.get(self.worker.call.remote("decide", (list(questions), list(left), list(right))))
        return decided


@contextlib.contextmanager
def joined(leases: Leases, service: Service) -> Iterator[Any]:
    """The worker of a service, for the length of a block."""
    try:
        yield leases.join(service)
    finally:
        leases.leave(service.key)
