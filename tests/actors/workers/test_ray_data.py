from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.host import Stats
from actors.workers import ray_data
from actors.workers.lease_queue import Capacity
from actors.workers.placement import Placement, reserved, wait_until_free
from actors.workers.ray_data import ShardDone, is_workers_loss, map_shards, original_error
from ka2l.errors import ConfigError, KA2LError, ModelError, StageStalledError

pytestmark = pytest.mark.usefixtures("ray_session")

# Workers cannot import this file by name, so what is defined here travels with the job.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAMES = [f"part-{index:05d}.parquet" for index in range(6)]


@dataclass
class Job:
    """Leaves a file for every worker that opened it and every shard it made; misbehaves where it is told to."""

    folder: Path
    fail_open: KA2LError | None = None
    fail_run: Exception | None = None
    """Raised for the third shard."""
    kill: bool = False
    """The worker that is given the third shard dies, the first time."""
    hang: bool = False
    """The worker that is given the third shard leaves a file and never ends."""
    pause_s: float = 0.0
    num_workers: int = 1
    """No shard is finished before so many workers have opened the job."""

    def open(self) -> None:
        print("opening a model")
        if self.fail_open is not None:
            raise self.fail_open
        (self.folder / f"open-{os.getpid()}").touch()

    def run(self, name: str) -> tuple[int, Stats]:
        time.sleep(self.pause_s)
        deadline = time.monotonic() + 120.0
        while self.num_opened() < self.num_workers and time.monotonic() < deadline:
            time.sleep(0.05)
        if name == NAMES[2]:
            if self.fail_run is not None:
                raise self.fail_run
            if self.kill and not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.hang:
                (self.folder / "hangs").touch()
                time.sleep(600)
        (self.folder / f"made-{name}").write_text(str(os.getpid()))
        return int(name[5:10]), {"seconds": 0.5, "tokens": 7.0}

    def num_opened(self) -> int:
        return len(list(self.folder.glob("open-*")))


class Teller:
    """Cannot be pickled."""

    def __init__(self, told: list[float]) -> None:
        self.told = told
        self.lock = threading.Lock()

    def tell(self, seconds: float) -> None:
        with self.lock:
            self.told.append(seconds)


class ClockOfLooks:
    """In place of the module ``time``: stands still until a file is there; then each look takes half a second."""

    def __init__(self, starts: Path) -> None:
        self.starts = starts
        self.now = 0.0

    def monotonic(self) -> float:
        if self.starts.exists():
            self.now += 0.5
        return self.now


def run(job: Job, replicas: int = 1, **options: Any) -> list[ShardDone]:
    defaults: dict[str, Any] = {"placement": Placement(replicas), "cpus": 0.5, "gpus": 0.0, "log_path": None}
    return list(map_shards(job, NAMES, **(defaults | options)))


def test_every_shard_is_made_once_and_the_job_is_opened_once_a_worker(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = run(job)
    assert done == [ShardDone(name, index, {"seconds": 0.5, "tokens": 7.0}) for index, name in enumerate(NAMES)]
    assert job.num_opened() == 1


def test_replicas_share_the_shards(tmp_path: Path) -> None:
    job = Job(tmp_path, num_workers=2)
    assert sorted(shard.name for shard in run(job, replicas=2)) == NAMES
    assert job.num_opened() == 2
    assert len({(tmp_path / f"made-{name}").read_text() for name in NAMES}) == 2


def test_shards_are_handed_on_while_others_are_still_made(tmp_path: Path) -> None:
    making = map_shards(Job(tmp_path, pause_s=0.5), NAMES, placement=Placement(1), cpus=0.5, gpus=0.0, log_path=None)
    assert next(making).name == NAMES[0]
    assert not (tmp_path / f"made-{NAMES[-1]}").exists()
    assert [shard.name for shard in making] == NAMES[1:]


@pytest.mark.parametrize("place", ["fail_open", "fail_run"])
def test_an_error_of_ours_reaches_the_driver_as_it_was_raised(place: str, tmp_path: Path) -> None:
    error = ModelError("no weights in ./model", hint="Download the whole model.")
    with pytest.raises(ModelError) as caught:
        run(Job(tmp_path, **{place: error}))  # type: ignore[arg-type]
    assert type(caught.value) is ModelError
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    # Not asked for again: the same model would be loaded for nothing.
    assert not (tmp_path / f"made-{NAMES[2]}").exists()


def test_any_other_error_names_what_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the disk is on fire") as caught:
        run(Job(tmp_path, fail_run=RuntimeError("the disk is on fire")))
    assert not isinstance(caught.value, KA2LError)


def test_a_worker_that_is_killed_is_replaced_and_every_shard_is_made(tmp_path: Path) -> None:
    job = Job(tmp_path, kill=True)
    assert [shard.name for shard in run(job)] == NAMES
    assert (tmp_path / "killed").exists()
    assert job.num_opened() == 2


def test_workers_that_make_nothing_are_told_of_and_then_given_up_with_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ray_data, "_TELL_S", 1.0)
    # What workers take to start does not count: that is the machine's.
    monkeypatch.setattr(ray_data, "time", ClockOfLooks(tmp_path / "hangs"))
    with (
        pytest.raises(StageStalledError, match="finished no shard for") as caught,
        reserved(Capacity(0.5, 0.0), 1, 1, timeout_s=60.0) as placement,
    ):
        # What is told of it need not travel to workers.
        run(Job(tmp_path, hang=True), placement=placement, stall_s=5.0, on_wait=Teller(waited).tell)
    assert sorted(path.name for path in tmp_path.glob("made-*")) == [f"made-{name}" for name in NAMES[:2]]
    assert is_workers_loss(caught.value)
    assert len(waited) >= 4
    # The worker that hangs is ended with its room. (Errors of earlier tests may hold theirs until they are collected.)
    gc.collect()
    wait_until_free(Capacity(2.0, 0.0), 1, timeout_s=60.0)


def test_the_loss_of_a_node_ends_the_wait_for_workers_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = iter([{"here": Capacity(2, 0), "there": Capacity(2, 0)}])
    monkeypatch.setattr(ray_data, "alive_nodes", lambda: next(nodes, {"here": Capacity(2, 0)}))
    monkeypatch.setattr(ray_data, "_LOOK_S", 0.5)
    with (
        pytest.raises(StageStalledError, match=r"1 node\(s\) of the cluster are gone"),
        reserved(Capacity(0.5, 0.0), 1, 1, timeout_s=60.0) as placement,
    ):
        run(Job(tmp_path, hang=True), placement=placement)


def test_what_workers_print_goes_to_the_log(tmp_path: Path) -> None:
    run(Job(tmp_path), log_path=str(tmp_path / "stage.log"))
    assert "opening a model" in (tmp_path / "stage.log").read_text()


@pytest.mark.slow
def test_a_driver_that_stops_listening_frees_the_workers(tmp_path: Path) -> None:
    making = map_shards(Job(tmp_path, pause_s=0.2), NAMES, placement=Placement(1), cpus=2.0, gpus=0.0, log_path=None)
    next(making)
    making.close()  # type: ignore[attr-defined]
    wait_until_free(Capacity(2.0, 0.0), 1, timeout_s=120.0)


def test_the_original_error_is_found_under_what_was_wrapped_around_it() -> None:
    inner = ConfigError("wrong", hint="put right")
    outer = RuntimeError("task failed")
    outer.cause = ValueError("in the middle")  # type: ignore[attr-defined]
    outer.cause.__cause__ = inner  # type: ignore[attr-defined]
    assert original_error(outer) is inner
    lonely = RuntimeError("alone")
    lonely.__context__ = lonely
    assert original_error(lonely) is lonely
