"""Runs one function call in a Ray worker of its own, with log, deadline and the errors it raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from actors.host import redirect_output
from actors.metrics import Tags
from actors.workers.faults import FaultsConfig, deadline
from actors.workers.placement import Placement
from actors.workers.ray_data import original_error
from ka2l.errors import KA2LError, StageFailedError, first_line


class Workers(NamedTuple):
    """The workers of one training, or of one task."""

    section: str
    """Of the config, for messages."""
    num_workers: int
    cpus: float
    """Of each."""
    gpus: float
    faults: FaultsConfig = FaultsConfig()
    placement: Placement = Placement(1)
    """Of a task; Ray Train places its workers itself."""
    tags: Tags | None = None
    """Of their metrics."""


def run_remote(work: Callable[[], Any], what: str, workers: Workers, log_path: str | None) -> Any:
    """What ``work`` returns, in a process of its own; where that dies it is begun again.

    Args:
        work: a function of a module or a partial of one, which the worker imports.
        what: names it in messages.

    Raises:
        KA2LError: as ``work`` raised it.
        StageFailedError: the process died.
    """
    try:
        task = _remote.options(
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            max_retries=workers.faults.worker_replacements,
            **workers.placement.options(),
        )
        return ray.get(task.remote(log_path, workers.faults.deadline_s, work))
    except ray.exceptions.RayError as error:
        found = original_error(error)
        if isinstance(found, KA2LError):
            raise found from error
        raise StageFailedError(f"{what} could not run: {first_line(error, 'no message')}") from error


@ray.remote
def _remote(log_path: str | None, deadline_s: float, work: Callable[[], Any]) -> Any:
    redirect_output(log_path)
    with deadline(deadline_s):
        return work()
