"""Runs a training function on Ray Train workers, with progress, logs, checkpoints and the errors it raised."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray

from actors.host import redirect_output, set_num_threads
from actors.metrics import show_gpu_memory
from actors.workers.faults import deadline
from actors.workers.ray_task import Workers
from ka2l.errors import KA2LError, ResourcesBusyError, StageFailedError, first_line
from ka2l.tuning.checkpoints import CheckpointFolder

POLL_SECONDS = 0.5
START_ATTEMPTS = 3
"""Ray Train waits a minute for its workers' resources in each."""
LOG_LINES = 20
#: Training in a worker: (arguments, report) -> metrics; rank 0's are handed back.
Loop = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]


def run_loop(
    loop: Loop,
    arguments: dict[str, Any],
    workers: Workers,
    scratch_dir: str,
    log_path: str | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
    checkpoints: CheckpointFolder | None = None,
) -> dict[str, Any]:
    """Run ``loop`` on Ray Train workers, with progress, logs, and errors as they were raised.

    Args:
        loop: a function of a module, which workers import.
        scratch_dir: folder for Ray Train's own files and the progress file; the caller removes it.
        log_path: file that takes the workers' stdout and stderr; default: in ``scratch_dir``.
        on_progress: called in a thread of this process with what the loop reports.
        checkpoints: where the loop's checkpoints are kept, for it to go on from when it is begun again, here or later.

    Raises:
        KA2LError: as a worker raised it.
        ResourcesBusyError: the cluster has no room for the workers.
        StageFailedError: anything else; carries the last lines of the log.
    """
    scratch = Path(scratch_dir).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    progress_path = scratch / "progress.jsonl"
    progress_path.unlink(missing_ok=True)
    log = Path(log_path).absolute() if log_path else scratch / "workers.log"
    loop_config = {
        "loop": loop,
        "arguments": arguments,
        "cpus": workers.cpus,
        "log_path": str(log),
        "progress_path": str(progress_path),
        "deadline_s": workers.faults.deadline_s,
        "tags": workers.tags,
    }
    with _Follower(progress_path, on_progress):
        for attempts_left in reversed(range(workers.faults.worker_replacements + 1)):
            storage = checkpoints or CheckpointFolder(str(scratch / f"ray_train-{attempts_left}"))
            trainer = _trainer(loop_config, workers, storage)
            try:
                return _fit(trainer, workers, log).return_value
            except WorkerLostError:
                if not attempts_left:
                    raise
    raise AssertionError("unreachable")


def _trainer(loop_config: dict[str, Any], workers: Workers, storage: CheckpointFolder) -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    resources = {"CPU": workers.cpus}
    if workers.gpus > 0:
        resources["GPU"] = workers.gpus
    # Ray Train's controller takes a checkpoint up when it looks after its workers; until then they wait, and a killed
    # one's is lost.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS / 2))
    # Of another number of workers a batch may be made up otherwise, so that is a training of its own.
    name = f"workers-{workers.num_workers}"
    _tidy(storage, name)
    run_config: Any = RunConfig(
        name=name,
        storage_path=storage.path,
        storage_filesystem=storage.filesystem,
        checkpoint_config=CheckpointConfig(num_to_keep=1),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=START_ATTEMPTS - 1),
        logging_config=LoggingConfig(log_level="CRITICAL"),  # every failure reaches the caller as an exception
    )
    return TorchTrainer(
        cast("Callable[[dict[str, Any]], None]", _train_loop),  # annotated for Train V1, which returns nothing
        train_loop_config=loop_config,
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.gpus > 0, resources_per_worker=resources
        ),
        run_config=run_config,
    )


def _tidy(storage: CheckpointFolder, name: str) -> None:
    """Remove checkpoints that Ray Train had not taken up when it died, and all of them where its note of them was half
    written or names one that is gone: it would refuse to begin."""
    from pyarrow import fs as pafs

    files, folder = storage.filesystem or pafs.LocalFileSystem(), f"{storage.path}/{name}"
    found = files.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    if not found:
        return
    there = {info.base_name for info in found if info.type == pafs.FileType.Directory}
    try:
        with files.open_input_stream(f"{folder}/checkpoint_manager_snapshot.json") as stream:
            note = json.loads(stream.read())
        noted = {
            kept["checkpoint_dir_name"] for kept in [note["latest_checkpoint_result"], *note["checkpoint_results"]]
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        noted = {""}
    if not noted <= there:
        files.delete_dir(folder)
        return
    for left in there - noted:
        files.delete_dir(f"{folder}/{left}")


class WorkerLostError(StageFailedError):
    """A worker of a training died: killed, out of memory, or longer without progress than the deadline."""


def _fit(trainer: Any, workers: Workers, log: Path) -> Any:
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError

    in_main_thread = threading.current_thread() is threading.main_thread()
    interrupt_handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit as error:  # Ray Train's answer to Ctrl-C, with exit code 0
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        known = [cause for cause in _causes(error) if isinstance(cause, KA2LError)]
        if known:
            raise known[0] from error
        if isinstance(error, ControllerError):
            raise ResourcesBusyError(
                f"Ray could not start {workers.num_workers} {workers.section} worker(s) of {workers.cpus:g} CPU and "
                f"{workers.gpus:g} GPU: {first_line(error.controller_failure, 'no message')}",
                hint=f"Lower cpus_per_worker or gpus_per_worker of {workers.section}, or its workers.",
            ) from error
        causes = _causes(error)
        reason = next((f"{type(cause).__name__}: {first_line(cause, 'no message')}" for cause in causes), str(error))
        lost = any(isinstance(cause, ray.exceptions.RayError) for cause in causes)
        raise (WorkerLostError if lost else StageFailedError)(
            f"{workers.section.capitalize()} failed: {reason}\nLast lines of {log}:\n{_tail(log)}"
        ) from error
    finally:
        # Ray Train installs a handler for Ctrl-C and leaves it there.
        if in_main_thread:
            signal.signal(signal.SIGINT, interrupt_handler)


#: Where Ray Train and Ray core keep what they wrap: what user code raised, or how a worker died.
_WRAPPED_AS = ("_base_exc", "cause", "health_check_failure")


def _causes(error: BaseException) -> list[BaseException]:
    """What the workers raised, by rank, out of Ray's wrappings."""
    failures = getattr(error, "worker_failures", None)
    causes = []
    for failure in [failures[rank] for rank in sorted(failures)] if failures else []:
        while inner := next((found for name in _WRAPPED_AS if (found := getattr(failure, name, None))), None):
            failure = inner
        causes.append(failure)
    return causes


def _train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """One worker. Its return value on rank 0 is the result of the run."""
    redirect_output(loop_config["log_path"])
    set_num_threads(loop_config["cpus"])

    def report(progress: dict[str, Any]) -> None:
        with open(loop_config["progress_path"], "a", encoding="utf-8") as file:
            file.write(json.dumps(progress) + "\n")
        show_gpu_memory(loop_config["tags"])
        ended.close()
        ended.enter_context(deadline(loop_config["deadline_s"]))

    loop: Loop = loop_config["loop"]
    ended = contextlib.ExitStack()
    try:
        with ended:
            ended.enter_context(deadline(loop_config["deadline_s"]))
            return loop(dict(loop_config["arguments"]), report)
    except Exception:
        # Into the log: Ray hands on the exception alone. Not by print, which Ray Train patches.
        sys.stderr.write(traceback.format_exc())
        raise


class _Follower:
    """Hands new lines of the progress file to the caller while the block runs, the last ones at its end."""

    def __init__(self, path: Path, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        self._path = path
        self._on_progress = on_progress
        self._offset = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._on_progress is not None:
            self._thread.join()

    def _follow(self) -> None:
        finished = False
        while not finished:
            finished = self._done.wait(POLL_SECONDS)
            for report in self._new_reports():
                assert self._on_progress is not None
                self._on_progress(report)

    def _new_reports(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")  # a line may be half written
        self._offset += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]


def _tail(path: Path) -> str:
    if not path.exists():
        return "(no log)"
    with open(path, encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=LOG_LINES)).rstrip()
