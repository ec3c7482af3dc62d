"""Runs a `ka2l` command in a process that ends itself with SIGKILL at a chosen point.

``KA2L_TEST_KILL`` is null or a JSON object: ``event``, ``stage``, ``round`` and ``count`` (the process dies right after
the count-th such event is written), or ``before_commit`` with ``stage`` and ``round`` (it dies when all files of the
stage are there and the manifest is not). ``KA2L_TEST_LOG`` names a file that takes the ids of the questions whose
answers were asked for, one line a call.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import Any

import engine.cli
import engine.stages
from engine.artifacts import Manifest, Stage
from engine.events import Events
from ka2l.annotation import Annotation, ReferenceAnnotator

KILL: dict[str, Any] = json.loads(os.environ.get("KA2L_TEST_KILL") or "null") or {}
LOG = os.environ.get("KA2L_TEST_LOG")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_event() -> None:
    emit, left = Events.emit, KILL.get("count", 1)

    def emit_and_die(self: Events, event: str, **fields: Any) -> None:
        nonlocal left
        emit(self, event, **fields)
        if all(({"event": event} | fields).get(key) == KILL[key] for key in ("event", "stage", "round") if key in KILL):
            left -= 1
            if left == 0:
                die()

    Events.emit = emit_and_die  # type: ignore[method-assign]


def kill_before_commit() -> None:
    commit = Stage.commit

    def commit_or_die(self: Stage, **arguments: Any) -> Manifest:
        if (self.name, self.round_index) == (KILL["stage"], KILL["round"]):
            die()
        return commit(self, **arguments)

    Stage.commit = commit_or_die  # type: ignore[method-assign]


def log_annotations(path: str) -> None:
    annotate = ReferenceAnnotator.annotate

    def annotate_and_log(self: ReferenceAnnotator, questions: Mapping[str, str]) -> list[Annotation]:
        with open(path, "a", encoding="utf-8") as file:
            file.write(" ".join(questions) + "\n")
        return annotate(self, questions)

    ReferenceAnnotator.annotate = annotate_and_log  # type: ignore[method-assign]


if __name__ == "__main__":
    engine.stages._ANNOTATION_BATCH = 5  # several batches, so that there is a middle
    if LOG:
        log_annotations(LOG)
    if KILL.get("event") == "before_commit":
        kill_before_commit()
    elif KILL:
        kill_after_event()
    engine.cli.main()
