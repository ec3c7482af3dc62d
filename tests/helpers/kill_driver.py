"""Runs a `ka2l` command in a process that ends itself with SIGKILL at a chosen point.

``KA2L_TEST_KILL`` is null or a JSON object: ``event``, ``stage``, ``round`` and ``count`` (the process dies right after
the count-th such event is written; keys left out match anything; ``signal`` is another one than SIGKILL), or the event
``before_commit`` with ``stage`` and ``round`` (it dies when all files of the stage are there and the manifest is not).
With ``poison``, ids of questions, it lives, and every stage fails over these. ``KA2L_TEST_LOG`` names a file that takes
the ids of the questions that the annotator is asked.

``kill_driver.py --serve NUMBER`` waits for commands instead, at the socket that is its file of that number, and forks a
process for each: they save the imports, which are most of what a short command takes.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import pyarrow as pa
from forks import end_with, import_ray

#: What commands import, and takes a second or more.
IMPORTED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "sklearn.linear_model",
    "ray.data",
    "ray.train.torch",
    "engine.loop",
    "engine.cli.main",
)
import_ray(IMPORTED)  # first of all: modules of ours, too, define actor classes

import engine.cli.main
import engine.execution.jobs
import engine.execution.shard_run
from actors.host import Stats
from engine.store.events import Events
from engine.store.manifest import Manifest
from engine.store.stage_folder import Stage
from ka2l.annotation.annotator import Annotation, ReferenceAnnotator


def die(how: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), how)


def kill_after_event(wanted: dict[str, Any], left: int) -> None:
    emit = Events.emit
    how = wanted.pop("signal", signal.SIGKILL)

    def emit_and_die(self: Events, event: str, **fields: Any) -> None:
        nonlocal left
        emit(self, event, **fields)
        if wanted.items() <= ({"event": event} | fields).items():
            left -= 1
            if left == 0:
                die(how)

    Events.emit = emit_and_die  # type: ignore[method-assign]


def kill_before_commit(stage: str, round_index: int | None) -> None:
    commit = Stage.commit

    def commit_or_die(self: Stage, **arguments: Any) -> Manifest:
        if (self.name, self.round_index) == (stage, round_index):
            die()
        return commit(self, **arguments)

    Stage.commit = commit_or_die  # type: ignore[method-assign]


class SlowHostJob(engine.execution.jobs.HostJob):
    """Leaves time to be killed between two shards. Defined in the main script, so it is pickled by value."""

    def run(self, name: str) -> tuple[int, Stats]:
        done = super().run(name)
        time.sleep(1.5)
        return done


class PoisonedHostJob(engine.execution.jobs.HostJob):
    """Fails over some questions, whatever the stage."""

    poison: frozenset[str] = frozenset()

    def _process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        if self.poison & set(tables["questions"]["question_id"].to_pylist()):
            raise ValueError("poison")
        return super()._process(tables)


def log_annotations(path: str) -> None:
    annotate = ReferenceAnnotator.annotate

    def annotate_and_log(self: ReferenceAnnotator, questions: Mapping[str, str]) -> list[Annotation]:
        with open(path, "a", encoding="utf-8") as file:
            file.write(" ".join(questions) + "\n")
        return annotate(self, questions)

    ReferenceAnnotator.annotate = annotate_and_log  # type: ignore[method-assign]


def main() -> None:
    kill: dict[str, Any] = json.loads(os.environ.pop("KA2L_TEST_KILL", "null")) or {}
    ReferenceAnnotator.batch_size = 5  # several batches, so that there is a middle
    if log := os.environ.pop("KA2L_TEST_LOG", ""):
        log_annotations(log)
    if poison := kill.pop("poison", ()):
        PoisonedHostJob.poison = frozenset(poison)
        engine.execution.shard_run.HostJob = PoisonedHostJob  # type: ignore[misc]
    if kill.get("event") == "before_commit":
        kill_before_commit(kill["stage"], kill["round"])
    elif kill:
        kill_after_event(kill, kill.pop("count", 1))
    if kill.get("event") == "shard_written":
        engine.execution.shard_run.HostJob = SlowHostJob  # type: ignore[misc]
    engine.cli.main.main()


def run_forked(request: dict[str, Any]) -> NoReturn:
    """Become the process of one command: in a session of its own, with its own environment and files."""

    def command() -> None:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [__file__, *request["words"]]
        main()

    end_with(command, exit_functions=True)


def answer(connection: socket.socket, pid: int) -> None:
    """Say which process it is, and how it ended."""
    with connection:
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def serve(listener: socket.socket) -> None:
    """Fork a process for each command that comes over the socket."""
    gc.freeze()  # no command needs to look through what all of them share
    while True:
        connection, _ = listener.accept()
        request = json.loads(connection.makefile("r").readline())
        pid = os.fork()
        if pid == 0:
            listener.close()
            run_forked(request)
        threading.Thread(target=answer, args=(connection, pid), daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        main()
