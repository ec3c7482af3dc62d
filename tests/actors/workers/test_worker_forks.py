"""The tests' own Ray: its workers are forks of one process, and must not be copies of each other."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.usefixtures("ray_session")


def test_workers_draw_ids_of_their_own() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def drawn(self) -> tuple[int, list[str]]:
            return os.getpid(), [ray.ObjectRef.from_random().hex() for _ in range(100)]

    workers = [Worker.remote() for _ in range(3)]
    drawn = dict(ray.get([worker.drawn.remote() for worker in workers]))
    ids = [one for of_worker in drawn.values() for one in of_worker]
    assert len(drawn) == 3
    assert len(set(ids)) == len(ids)
