"""Standing workers: a few actors with one host each, asked again and again until they are closed.

For work that comes in several helpings, of which each decides the next; what is known in full beforehand goes through
:mod:`actors.workers.ray_data`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray

from actors.host import redirect_output
from actors.metrics import Tags, show_gpu_memory
from actors.workers.faults import FaultsConfig, deadline
from actors.workers.placement import Placement
from actors.workers.ray_data import original_error


class StandingWorker:
    """The actor: opens its host with the first call."""

    def __init__(
        self, make_host: Callable[[], Any], log_path: str | None, deadline_s: float, tags: Tags | None
    ) -> None:
        redirect_output(log_path)
        self.make_host = make_host
        self.deadline_s = deadline_s
        self.tags = tags
        self.host: Any = None

    def started(self) -> None:
        """Returns once the process is up."""

    def call(self, method: str, item: Any) -> Any:
        """What a method of the host makes of an item."""
        # Opened here and not in the constructor, so that what goes wrong reaches the driver as it was raised.
        with deadline(self.deadline_s):
            if self.host is None:
                self.host = self.make_host()
            result = getattr(self.host, method)(item)
        show_gpu_memory(self.tags)
        return result


class StandingWorkers:
    """Workers for which there is room; none is started before the first call.

    Args:
        make_host: makes what a worker hosts; pickled by reference.
        cpus: cores of one worker.
        gpus: GPUs of one worker.
        log_path: where the workers' chatter goes.
        placement: where they go, and how many there are.
        faults: how long a worker may take over one call.
        tags: of the workers' metrics.
    """

    def __init__(
        self,
        make_host: Callable[[], Any],
        *,
        placement: Placement,
        cpus: float,
        gpus: float,
        log_path: str | None,
        faults: FaultsConfig,
        tags: Tags | None = None,
    ) -> None:
        self.make_host = make_host
        self.placement = placement
        self.cpus = cpus
        self.gpus = gpus
        self.log_path = log_path
        self.faults = faults
        self.tags = tags
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []

    def map(self, method: str, items: Sequence[Any]) -> Generator[tuple[int, Any]]:
        """Call a host's method on every item; yields (position, result) in the order they end. A worker that dies is
        started again once, and its item with it.

        Raises:
            KA2LError: as a worker raised it.
        """
        self._start()
        waiting = deque(enumerate(items))
        busy: dict[Any, tuple[Any, int]] = {}
        try:
            while waiting or busy:
                while self._idle and waiting:
                    worker = self._idle.pop()
                    index, item = waiting.popleft()
                    busy[worker.call.remote(method, item)] = (worker, index)
                # A worker for which there is no room yet is waited for beside those that work.
                (done,), _ = ray.wait([*busy, *self._starting], num_returns=1)
                if done in self._starting:
                    self._idle.append(self._starting.pop(done))
                    ray.get(done)
                    continue
                worker, index = busy.pop(done)
                self._idle.append(worker)
                yield index, ray.get(done)
        except ray.exceptions.RayError as error:
            raise original_error(error) from error
        finally:
            # What was cut short goes on until it ends; its worker takes the next item after that.
            self._idle += [worker for worker, _ in busy.values()]

    def _start(self) -> None:
        if self._idle or self._starting:
            return
        options = ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=1, max_task_retries=1, **self.placement.options()
        )
        workers: list[Any] = [
            options(StandingWorker).remote(self.make_host, self.log_path, self.faults.deadline_s, self.tags)
            for _ in range(self.placement.num_workers)
        ]
        self._starting = {worker.started.remote(): worker for worker in workers}

    def close(self) -> None:
        """End the workers; their cores and GPUs come free soon after. A later call starts new ones."""
        started, starting = self._idle, list(self._starting.values())
        self._idle, self._starting = [], {}
        # They end by themselves where they can, so that an engine takes its own processes along.
        ended = [worker.__ray_terminate__.remote() for worker in started]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=10)
        for worker in [*started, *starting]:
            ray.kill(worker)
