"""Makes the processes of a run under ``bench_chaos.py`` fail on order. Python imports this module when it starts.

An order is a file in ``$KA2L_CHAOS``; who takes it away, by renaming it, carries it out:

| order | what fails |
|---|---|
| ``storage-N`` | one write to the run directory, with an input/output error |
| ``hang-N`` | one worker, which never ends what it has begun |

``asked.jsonl`` there takes the ids of every question that the annotator is asked.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("KA2L_CHAOS", "/nonexistent"))


def ordered(kind: str) -> bool:
    """Whether this process has to carry out an order of this kind."""
    for order in FOLDER.glob(f"{kind}-*"):
        try:
            order.rename(FOLDER / f"done-{order.name}")
            return True
        except FileNotFoundError:
            continue
    return False


def storage(module: Any) -> None:
    write = module._write

    def fail_or_write(*arguments: Any) -> None:
        if ordered("storage"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(*arguments)

    module._write = fail_or_write


def jobs(module: Any) -> None:
    process = module.HostJob._process

    def hang_or_process(self: Any, tables: Any) -> Any:
        def work(given: Any) -> Any:
            if ordered("hang"):
                time.sleep(3600)
            return host.process(given)

        host = self.host
        self.host = type("Host", (), {"process": staticmethod(work)})
        try:
            return process(self, tables)
        finally:
            self.host = host

    module.HostJob._process = hang_or_process


def annotation(module: Any) -> None:
    annotate = module.ReferenceAnnotator.annotate

    def annotate_and_note(self: Any, questions: Any) -> Any:
        made = annotate(self, questions)
        with (FOLDER / "asked.jsonl").open("a") as file:
            file.write(json.dumps(list(questions)) + "\n")
        return made

    module.ReferenceAnnotator.annotate = annotate_and_note


PATCHES: dict[str, Callable[[Any], None]] = {
    "engine.store.storage": storage,
    "engine.execution.jobs": jobs,
    "ka2l.annotation.annotator": annotation,
}


class Patcher(importlib.abc.MetaPathFinder):
    """Changes a module right after it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if FOLDER.is_dir():
    sys.meta_path.insert(0, Patcher())
