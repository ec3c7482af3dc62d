"""Runs a `ka2l` command in a process that ends itself with SIGKILL at a chosen point.

``KA2L_TEST_KILL`` is null or a JSON object: ``event``, ``stage``, ``round`` and ``count`` (the process dies right after
the count-th such event is written; keys left out match anything), or the event ``before_commit`` with ``stage`` and
``round`` (it dies when all files of the stage are there and the manifest is not). ``KA2L_TEST_LOG`` names a file that
takes the ids of the questions that the annotator is asked.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import engine.campaign
import engine.cli
from actors.host import Stats
from engine.artifacts import Manifest, Stage
from engine.events import Events
from ka2l.annotation import Annotation, ReferenceAnnotator


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_event(wanted: dict[str, Any], left: int) -> None:
    emit = Events.emit

    def emit_and_die(self: Events, event: str, **fields: Any) -> None:
        nonlocal left
        emit(self, event, **fields)
        if wanted.items() <= ({"event": event} | fields).items():
            left -= 1
            if left == 0:
                die()

    Events.emit = emit_and_die  # type: ignore[method-assign]


def kill_before_commit(stage: str, round_index: int | None) -> None:
    commit = Stage.commit

    def commit_or_die(self: Stage, **arguments: Any) -> Manifest:
        if (self.name, self.round_index) == (stage, round_index):
            die()
        return commit(self, **arguments)

    Stage.commit = commit_or_die  # type: ignore[method-assign]


class SlowHostJob(engine.campaign.HostJob):
    """Leaves time to be killed between two shards. Defined in the main script, so it is pickled by value."""

    def run(self, name: str) -> tuple[int, Stats]:
        done = super().run(name)
        time.sleep(1.5)
        return done


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
    if kill.get("event") == "before_commit":
        kill_before_commit(kill["stage"], kill["round"])
    elif kill:
        kill_after_event(kill, kill.pop("count", 1))
    if kill.get("event") == "shard_written":
        engine.campaign.HostJob = SlowHostJob  # type: ignore[misc]
    engine.cli.main()


if __name__ == "__main__":
    main()
