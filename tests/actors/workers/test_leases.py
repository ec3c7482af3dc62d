"""Workers go to whoever is first, what fits beside it goes on meanwhile, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from actors.workers.lease_queue import Capacity, LeaseQueue, Request

WHOLE = Capacity(4, 8)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(key: str, gpus: float = 1, workers: int = 1, least: int | None = None, priority: float = 0.0) -> Request:
    return Request(key, Capacity(0.1, gpus), workers, workers if least is None else least, priority)


def keys(queue: LeaseQueue) -> list[str]:
    return [grant.key for grant in queue.grants()]


def test_what_fits_is_granted_in_the_order_of_priority_and_then_of_asking() -> None:
    queue = LeaseQueue({"a": Capacity(4, 2)})
    for item in (request("late"), request("first", priority=1), request("second", priority=1)):
        queue.ask(item)
    assert keys(queue) == ["first", "second"]
    queue.give_back("first")
    assert keys(queue) == ["late"]


def test_a_worker_lies_on_one_node() -> None:
    queue = LeaseQueue({"a": Capacity(4, 2), "b": Capacity(4, 2)})
    queue.ask(request("one", gpus=2))
    queue.ask(request("half", gpus=1))
    queue.ask(request("wide", gpus=2))
    assert keys(queue) == ["one", "half"]  # a GPU is free on b, and no two
    queue.give_back("half")
    assert [(grant.key, grant.nodes) for grant in queue.grants()] == [("wide", ("b",))]


def test_small_workers_share_the_fullest_node() -> None:
    queue = LeaseQueue({"a": WHOLE, "b": WHOLE})
    queue.ask(request("first", gpus=0.5))
    queue.ask(request("second", gpus=0.5))
    nodes = [grant.nodes for grant in queue.grants()]
    assert nodes[0] == nodes[1]
    queue.ask(request("whole", gpus=8))
    assert keys(queue) == ["whole"]


def test_a_stage_that_can_do_with_fewer_workers_begins_with_fewer() -> None:
    queue = LeaseQueue({"a": Capacity(4, 3)})
    queue.ask(request("elastic", workers=8, least=1))
    queue.ask(request("rigid", workers=2))
    (grant,) = queue.grants()
    assert (grant.key, len(grant.nodes)) == ("elastic", 3)
    queue.give_back("elastic")
    assert keys(queue) == ["rigid"]


def test_where_there_is_not_enough_nobody_gets_more_than_its_share_of_the_work_that_is_left() -> None:
    queue = LeaseQueue({"a": Capacity(8, 8)})
    for run, left in (("large", 300.0), ("small", 100.0)):
        queue.ask(Request(f"{run}/1", Capacity(1, 1), 8, 1, left=left))
    assert {grant.key: len(grant.nodes) for grant in queue.grants()} == {"large/1": 6, "small/1": 2}
    queue.give_back("large/1")
    queue.forget("large")
    queue.ask(Request("small/2", Capacity(1, 1), 8, 1, left=50.0))
    assert [len(grant.nodes) for grant in queue.grants()] == [6]


def test_where_there_is_enough_for_all_nobody_is_held_to_a_share() -> None:
    queue = LeaseQueue({"a": Capacity(16, 16)})
    for run, left in (("large", 1e6), ("small", 1.0)):
        queue.ask(Request(f"{run}/1", Capacity(1, 1), 8, 1, left=left))
    assert {grant.key: len(grant.nodes) for grant in queue.grants()} == {"large/1": 8, "small/1": 8}


def test_others_pass_who_does_not_fit_until_its_patience_ends() -> None:
    clock = Clock()
    queue = LeaseQueue({"a": WHOLE}, patience_s=60, clock=clock)
    queue.ask(request("small-0"))
    assert keys(queue) == ["small-0"]
    queue.ask(request("large", gpus=8))
    queue.ask(request("small-1"))
    assert keys(queue) == ["small-1"]
    clock.now = 61
    queue.ask(request("small-2"))
    assert keys(queue) == []
    queue.give_back("small-0")
    queue.give_back("small-1")
    assert keys(queue) == ["large"]
    queue.give_back("large")
    assert keys(queue) == ["small-2"]


def test_the_queue_says_who_waits_and_how_long() -> None:
    clock = Clock()
    queue = LeaseQueue({"a": Capacity(4, 1)}, clock=clock)
    queue.ask(request("holds"))
    queue.grants()
    queue.ask(request("b"))
    clock.now = 5
    queue.ask(request("urgent", priority=1))
    clock.now = 7
    assert list(queue.waiting.items()) == [("urgent", 2.0), ("b", 7.0)]


def test_what_never_fits_is_refused_at_once() -> None:
    queue = LeaseQueue({"a": WHOLE})
    with pytest.raises(ValueError, match="room for 0"):
        queue.ask(request("huge", gpus=9))
    with pytest.raises(ValueError, match="wants 3 workers"):
        queue.ask(request("many", gpus=4, workers=3))
    assert queue.waiting == {}


def test_asking_twice_is_an_error_and_giving_back_twice_is_none() -> None:
    queue = LeaseQueue({"a": WHOLE})
    queue.ask(request("x"))
    with pytest.raises(ValueError, match="already"):
        queue.ask(request("x"))
    queue.grants()
    queue.give_back("x")
    queue.give_back("x")
    queue.ask(request("all", gpus=8))
    assert keys(queue) == ["all"]


def test_a_node_that_is_gone_names_the_leases_that_it_took_along() -> None:
    queue = LeaseQueue({"a": WHOLE, "b": WHOLE})
    queue.ask(request("x", gpus=8))
    queue.ask(request("y", gpus=8))
    on = {grant.key: grant.nodes[0] for grant in queue.grants()}
    left = {name: WHOLE for name in ("a", "b") if name != on["x"]}
    assert queue.set_nodes(left) == ["x"]
    queue.give_back("x")
    queue.ask(request("z", gpus=8))
    assert keys(queue) == []  # y is still there
    queue.give_back("y")
    assert keys(queue) == ["z"]


@pytest.mark.parametrize("seed", range(20))
def test_no_node_is_ever_given_out_twice_and_all_are_served(seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    nodes = {f"n{index}": Capacity(8, rng.choice([1, 4, 8])) for index in range(4)}
    queue = LeaseQueue(nodes, patience_s=20, clock=clock)
    asked = {
        f"r{index}": Request(f"r{index}", Capacity(0.5, rng.choice([0.25, 0.5, 1])), 2, 1, rng.random())
        for index in range(60)
    }
    for item in asked.values():
        queue.ask(item)
    held: dict[str, tuple[str, ...]] = {}
    served: set[str] = set()
    while len(served) < len(asked):
        clock.now += 1
        for grant in queue.grants():
            held[grant.key] = grant.nodes
        used = {name: [0.0, 0.0] for name in nodes}
        for key, places in held.items():
            for node in places:
                used[node][0] += asked[key].worker.cpus
                used[node][1] += asked[key].worker.gpus
        assert all(used[name][0] <= nodes[name].cpus and used[name][1] <= nodes[name].gpus for name in nodes)
        for key in [key for key in held if rng.random() < 0.3]:
            queue.give_back(key)
            served.add(key)
            del held[key]
        assert clock.now < 1000
