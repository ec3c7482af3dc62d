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

from actors.faults import FaultsConfig
from actors.leases import Capacity, Leases, start_host
from actors.shared import EquivalenceHost, Service, SharedEquivalence, SharedPool, joined
from ka2l.equivalence import LexicalEquivalence

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
def desk() -> Iterator[str]:
    """Name of a queue for workers on the two cores."""
    name = f"shared-{time.monotonic_ns()}"
    host = start_host(name, 60.0)
    yield name
    ray.kill(host)


def service(folder: Path, cpus: float = 0.5) -> Service:
    return Service("doubler", partial(Counter, folder), cpus, 0.0, 60.0, None)


def test_two_runs_ask_one_worker_which_is_opened_once(desk: str, tmp_path: Path) -> None:
    pools = [SharedPool(Leases(desk, cell, 0.0), [service(tmp_path)], FaultsConfig()) for cell in ("first", "second")]
    for pool in pools:
        assert dict(pool.map("double", [1, 2, 3])) == {0: 2, 1: 4, 2: 6}
    pools[0].close()
    assert list(pools[1].map("double", [5])) == [(0, 10)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_service_keeps_its_room_while_a_run_uses_it_and_gives_it_to_who_waits_afterwards(
    desk: str, tmp_path: Path
) -> None:
    user, other = Leases(desk, "user", 0.0), Leases(desk, "other", 0.0)
    host = ray.get_actor(desk, namespace="ka2l")
    with joined(user, service(tmp_path)) as worker:
        assert ray.get(worker.call.remote("double", 4)) == 8
        with other.hold(Capacity(1.5, 0.0), 1, 1, None) as num_workers:
            assert num_workers == 1
        asking = ray.remote(num_cpus=0)(wait_for_all_cores).remote(desk)
        assert not ray.wait([asking], timeout=3)[0]
    assert ray.get(asking, timeout=60) == 1
    # Whoever needs it again starts it again.
    with joined(user, service(tmp_path)) as worker:
        assert ray.get(worker.call.remote("double", 4)) == 8
    assert len(list(tmp_path.iterdir())) == 2
    assert ray.get(host.waiting.remote()) == {}


def wait_for_all_cores(desk: str) -> int:
    with Leases(desk, "large", 0.0).hold(Capacity(2.0, 0.0), 1, 1, None) as num_workers:
        return num_workers


def test_a_run_that_died_uses_nothing_any_more(desk: str, tmp_path: Path) -> None:
    Leases(desk, "dead", 0.0).join(service(tmp_path))
    ray.get(ray.get_actor(desk, namespace="ka2l").give_back.remote("dead/"))
    with Leases(desk, "other", 0.0).hold(Capacity(2.0, 0.0), 1, 1, None) as num_workers:
        assert num_workers == 1


def test_what_the_cluster_could_never_hold_is_an_error_for_each_who_asks(desk: str, tmp_path: Path) -> None:
    for cell in ("first", "second"):
        with pytest.raises(Exception, match="the cluster has room for 0"):
            Leases(desk, cell, 0.0).join(service(tmp_path, cpus=64.0))


def test_a_shared_equivalence_decides_as_its_own(desk: str) -> None:
    made = Service("lexical", partial(EquivalenceHost, LexicalEquivalence()), 0.5, 0.0, 60.0, None)
    batch = (["Where?", "Where?"], ["in Paris", "Rome"], ["Paris", "Oslo"])
    with joined(Leases(desk, "run", 0.0), made) as worker:
        assert SharedEquivalence(worker).equivalent(*batch) == LexicalEquivalence().equivalent(*batch) == [True, False]
