"""Runs that compare answers with one model, or ask one teacher, share its worker; it goes when others want its room."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from actors.workers.faults import FaultsConfig
from actors.workers.lease_queue import Capacity
from actors.workers.leases import Leases, start_host
from actors.workers.shared import EquivalenceHost, Service, SharedEquivalence, SharedWorkers, joined
from ka2l.answers.equivalence import LexicalEquivalence

pytestmark = pytest.mark.usefixtures("ray_session")

# Workers cannot import this file by name, so what is defined here travels with the job.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Counter:
    """Leaves a file for every process that opened it."""

    def __init__(self, folder: Path) -> None:
        (folder / f"open-{os.getpid()}").touch()

    def double(self, item: int) -> int:
        return item * 2


@pytest.fixture
def queue_name() -> Iterator[str]:
    """Name of a queue for workers on the two cores."""
    name = f"shared-{time.monotonic_ns()}"
    host = start_host(name, 60.0)
    yield name
    ray.kill(host)


def service(folder: Path, cpus: float = 0.5) -> Service:
    return Service("doubler", partial(Counter, folder), cpus, 0.0, 60.0, None)


def test_two_runs_ask_one_worker_which_is_opened_once(queue_name: str, tmp_path: Path) -> None:
    pools = [
        SharedWorkers(Leases(queue_name, cell, 0.0), [service(tmp_path)], FaultsConfig())
        for cell in ("first", "second")
    ]
    for pool in pools:
        assert dict(pool.map("double", [1, 2, 3])) == {0: 2, 1: 4, 2: 6}
    pools[0].close()
    assert list(pools[1].map("double", [5])) == [(0, 10)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_service_keeps_its_room_while_a_run_uses_it_and_gives_it_to_who_waits_afterwards(
    queue_name: str, tmp_path: Path
) -> None:
    user, other = Leases(queue_name, "user", 0.0), Leases(queue_name, "other", 0.0)
    host = ray.get_actor(queue_name, namespace="ka2l")
    with joined(user, service(tmp_path)) as worker:
        assert ray.get(worker.call.remote("double", 4)) == 8
        with other.hold(Capacity(1.5, 0.0), 1, 1, None) as num_workers:
            assert num_workers == 1
        asking = ray.remote(num_cpus=0)(wait_for_all_cores).remote(queue_name)
        assert not ray.wait([asking], timeout=3)[0]
    assert ray.get(asking, timeout=60) == 1
    # Whoever needs it again starts it again.
    with joined(user, service(tmp_path)) as worker:
        assert ray.get(worker.call.remote("double", 4)) == 8
    assert len(list(tmp_path.iterdir())) == 2
    assert ray.get(host.waiting.remote()) == {}


def wait_for_all_cores(queue_name: str) -> int:
    with Leases(queue_name, "large", 0.0).hold(Capacity(2.0, 0.0), 1, 1, None) as num_workers:
        return num_workers


def test_a_run_that_died_uses_nothing_any_more(queue_name: str, tmp_path: Path) -> None:
    Leases(queue_name, "dead", 0.0).join(service(tmp_path))
    ray.get(ray.get_actor(queue_name, namespace="ka2l").give_back.remote("dead/"))
    with Leases(queue_name, "other", 0.0).hold(Capacity(2.0, 0.0), 1, 1, None) as num_workers:
        assert num_workers == 1


def test_what_the_cluster_could_never_hold_is_an_error_for_each_who_asks(queue_name: str, tmp_path: Path) -> None:
    for cell in ("first", "second"):
        with pytest.raises(Exception, match="the cluster has room for 0"):
            Leases(queue_name, cell, 0.0).join(service(tmp_path, cpus=64.0))


def test_a_shared_equivalence_decides_as_its_own(queue_name: str) -> None:
    made = Service("lexical", partial(EquivalenceHost, LexicalEquivalence()), 0.5, 0.0, 60.0, None)
    batch = (["Where?", "Where?"], ["in Paris", "Rome"], ["Paris", "Oslo"])
    with joined(Leases(queue_name, "run", 0.0), made) as worker:
        assert SharedEquivalence(worker).equivalent(*batch) == LexicalEquivalence().equivalent(*batch) == [True, False]
