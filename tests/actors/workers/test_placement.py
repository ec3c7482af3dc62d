"""Room for workers is set aside whole on one node, and given back."""

from __future__ import annotations

import pytest
import ray

from actors.workers.lease_queue import Capacity
from actors.workers.placement import _room, reserved, wait_until_free
from ka2l.errors import ResourcesBusyError

pytestmark = pytest.mark.usefixtures("ray_session")


def groups() -> int:
    """Placement groups that hold or want something."""
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def test_as_many_workers_as_there_is_room_for_are_given_and_their_room_is_theirs_alone() -> None:
    with reserved(Capacity(1.0, 0.0), 5, 1, timeout_s=60.0) as placement:
        assert placement.num_workers == 2
        where = ray.remote(num_cpus=1)(lambda: "ran").options(**placement.options())
        assert ray.get([where.remote(), where.remote()]) == ["ran", "ran"]
        with pytest.raises(ResourcesBusyError, match=r"waited 0\.5 s for room"):
            wait_until_free(Capacity(0.5, 0.0), 1, timeout_s=0.5)
    assert groups() == 0
    wait_until_free(Capacity(2.0, 0.0), 1, timeout_s=60.0)


def test_where_others_hold_a_part_the_rest_is_taken_before_the_time_is_up() -> None:
    with reserved(Capacity(1.0, 0.0), 1, 1, timeout_s=60.0):
        with reserved(Capacity(0.5, 0.0), 4, 1, timeout_s=6.0) as placement:
            assert placement.num_workers == 2
        with pytest.raises(ResourcesBusyError), reserved(Capacity(0.5, 0.0), 4, 4, timeout_s=0.5):
            pass
    assert groups() == 0


def test_what_the_empty_cluster_could_not_hold_is_refused_at_once() -> None:
    with pytest.raises(ResourcesBusyError, match=r"64 CPU and 0 GPU.*up to 2 CPU and 0 GPU") as caught:
        wait_until_free(Capacity(64.0, 0.0), 1, timeout_s=3600.0)
    assert "cpus_per_" in str(caught.value.hint)
    with pytest.raises(ResourcesBusyError, match="room for 0"):
        wait_until_free(Capacity(1.0, 1.0), 1, timeout_s=3600.0)


def test_room_is_counted_node_by_node() -> None:
    nodes = {"a": Capacity(8, 3), "b": Capacity(8, 1)}
    assert _room(Capacity(1, 2), nodes) == 1  # four GPUs in all, but two only on the first
    assert _room(Capacity(1, 0.25), nodes) == 12
    assert _room(Capacity(3, 0), nodes) == 4
