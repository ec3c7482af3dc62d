from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.workers.faults import FaultsConfig
from actors.workers.lease_queue import Capacity
from actors.workers.placement import Placement, wait_until_free
from actors.workers.standing import StandingWorkers
from ka2l.errors import ModelError, ResourcesBusyError

pytestmark = pytest.mark.usefixtures("ray_session")

# Workers cannot import this file by name, so what is defined here travels with the job.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Doubler:
    """Leaves a file for every worker that opened it; misbehaves where an item tells it to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"open-{os.getpid()}").touch()
        print("opening a model")

    def double(self, item: Any) -> Any:
        if item == "broken":
            raise ModelError("no weights", hint="Download them.")
        if item == "deadly" and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "hanging" and not (self.folder / "hung").exists():
            (self.folder / "hung").touch()
            time.sleep(600)
        if item == "both":
            deadline = time.monotonic() + 120
            while len(list(self.folder.glob("open-*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        return item * 2


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Callable[..., StandingWorkers]]:
    """Makes pools; they are closed with the test."""
    made: list[StandingWorkers] = []

    def make(**options: Any) -> StandingWorkers:
        defaults = {
            "placement": Placement(1), "cpus": 0.5, "gpus": 0.0, "log_path": None, "faults": FaultsConfig(),
        }  # fmt: skip
        made.append(StandingWorkers(partial(Doubler, tmp_path), **(defaults | options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def num_opened(folder: Path) -> int:
    return len(list(folder.glob("open-*")))


def test_a_host_is_opened_once_for_all_calls_and_none_before_the_first(
    pool: Callable[..., StandingWorkers], tmp_path: Path
) -> None:
    made = pool(log_path=str(tmp_path / "log"))
    assert num_opened(tmp_path) == 0
    for _ in range(2):
        assert dict(made.map("double", [1, 2, 3])) == {0: 2, 1: 4, 2: 6}
    assert num_opened(tmp_path) == 1
    assert "opening a model" in (tmp_path / "log").read_text()


def test_replicas_work_side_by_side_and_those_without_room_are_not_waited_for(
    pool: Callable[..., StandingWorkers], tmp_path: Path
) -> None:
    made = pool(placement=Placement(3), cpus=1.0)  # of two cores
    assert dict(made.map("double", ["both", "both", "x"])) == {0: "bothboth", 1: "bothboth", 2: "xx"}
    assert num_opened(tmp_path) == 2


def test_closing_gives_the_cores_back_and_a_later_call_starts_anew(
    pool: Callable[..., StandingWorkers], tmp_path: Path
) -> None:
    made = pool(cpus=2.0)
    list(made.map("double", [1]))
    with pytest.raises(ResourcesBusyError):
        wait_until_free(Capacity(2.0, 0.0), 1, timeout_s=0.1)
    made.close()
    wait_until_free(Capacity(2.0, 0.0), 1, timeout_s=60.0)
    assert list(made.map("double", [1])) == [(0, 2)]
    assert num_opened(tmp_path) == 2


def test_an_error_of_ours_reaches_the_driver_as_it_was_raised(pool: Callable[..., StandingWorkers]) -> None:
    made = pool()
    with pytest.raises(ModelError, match="no weights") as caught:
        list(made.map("double", [1, "broken", 2]))
    assert type(caught.value) is ModelError
    assert dict(made.map("double", [1])) == {0: 2}


def test_a_worker_that_dies_is_started_again_and_its_item_with_it(
    pool: Callable[..., StandingWorkers], tmp_path: Path
) -> None:
    assert dict(pool().map("double", [1, "deadly", 2])) == {0: 2, 1: "deadlydeadly", 2: 4}
    assert num_opened(tmp_path) == 2


def test_a_worker_that_hangs_is_ended_at_its_deadline_and_its_stack_is_in_the_log(
    pool: Callable[..., StandingWorkers], tmp_path: Path
) -> None:
    made = pool(faults=FaultsConfig(deadline_s=3.0), log_path=str(tmp_path / "log"))
    assert dict(made.map("double", [1, "hanging"])) == {0: 2, 1: "hanginghanging"}
    assert num_opened(tmp_path) == 2
    log = (tmp_path / "log").read_text()
    assert "Timeout (0:00:03)" in log
    assert "in double" in log
