"""Reserves room for the workers of a stage in a Ray placement group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.workers.lease_queue import Capacity, alive_nodes
from ka2l.errors import ResourcesBusyError

_POLL_S = 0.5


class Placement(NamedTuple):
    """Workers for which there is room."""

    num_workers: int
    group: Any = None
    """Ray's placement group, a bundle a worker; None where Ray finds the room itself."""

    def options(self) -> dict[str, Any]:
        """Options of an actor or a task that is one of the workers."""
        if self.group is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=self.group)}


@contextlib.contextmanager
def reserved(worker: Capacity, num_workers: int, least: int, timeout_s: float) -> Iterator[Placement]:
    """Set room for workers aside for the length of a block, each whole on one node.

    Yields room for ``num_workers`` where it comes free within a third of the time, else for as many as there is room
    for, ``least`` or more.

    Raises:
        ResourcesBusyError: not even the empty cluster has room for ``least``, or none comes free in time.
    """
    bundle = {name: amount for name, amount in (("CPU", worker.cpus), ("GPU", worker.gpus)) if amount > 0}
    if not bundle:
        yield Placement(num_workers)
        return
    num_workers = min(num_workers, max(least, _room(worker, alive_nodes())))
    _check(worker, least)
    group = _first_ready(bundle, num_workers, least, timeout_s)
    try:
        yield Placement(len(group.bundle_specs), group)
    finally:
        # Ray's connection may be what the block has lost.
        with contextlib.suppress(Exception):
            remove_placement_group(group)


def wait_until_free(worker: Capacity, num_workers: int, timeout_s: float) -> None:
    """Wait until there is room for workers that somebody else places, as Ray Train does; raises ResourcesBusyError."""
    with reserved(worker, num_workers, num_workers, timeout_s):
        pass


def _first_ready(bundle: dict[str, float], num_workers: int, least: int, timeout_s: float) -> Any:
    """The first placement group for which there is room, of as many workers as wanted and then of fewer."""
    deadline = time.monotonic() + timeout_s
    wanted = num_workers
    patient_until = time.monotonic() + timeout_s / 3 if num_workers > least else deadline
    while True:
        group = placement_group([bundle] * wanted, strategy="PACK")
        try:
            if _wait(group, patient_until):
                return group
        except BaseException:
            remove_placement_group(group)
            raise
        remove_placement_group(group)
        if time.monotonic() >= deadline:
            raise ResourcesBusyError(
                f"waited {timeout_s:g} s for room for {least} worker(s) of {bundle}, the cluster has free {_free()}",
                hint="Another job holds the resources, or an engine did not end: see `ray status`.",
            )
        wanted = max(least, wanted // 2)
        patient_until = deadline if wanted == least else min(deadline, time.monotonic() + timeout_s / 6)


def _wait(group: Any, until: float) -> bool:
    """Whether there is room in time; in small steps, between which Ctrl-C is heard."""
    while not group.wait(_POLL_S):
        if time.monotonic() >= until:
            return False
    return True


def _check(worker: Capacity, least: int) -> None:
    """Raise where the empty cluster could not hold ``least`` workers."""
    nodes = alive_nodes()
    room = _room(worker, nodes)
    if room >= least:
        return
    largest = Capacity(max(node.cpus for node in nodes.values()), max(node.gpus for node in nodes.values()))
    raise ResourcesBusyError(
        f"the stage wants {least} worker(s) of {worker.cpus:g} CPU and {worker.gpus:g} GPU, each on one node; the "
        f"cluster has room for {room} (nodes have up to {largest.cpus:g} CPU and {largest.gpus:g} GPU)",
        hint="Lower cpus_per_* or gpus_per_* in the config, or add nodes.",
    )


def _room(worker: Capacity, nodes: dict[str, Capacity]) -> int:
    """Workers that the empty cluster could hold."""
    rooms = []
    for node in nodes.values():
        shares = [has / wants for has, wants in zip(node, worker, strict=True) if wants > 0]
        rooms.append(int(min(shares) + 1e-6))
    return sum(rooms)


def _free() -> dict[str, float]:
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
