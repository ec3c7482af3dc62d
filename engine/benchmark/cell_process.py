"""A process for each cell, forked from one that has done the imports: they take seconds and most of a driver's memory.

That one is Python's fork server. It holds no Ray and no thread, and ends when the coordinator and all cells have ended.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

_PR_SET_NAME = 15
_LIBC = ctypes.CDLL(None)


class CellProcess:
    """One ``ka2l`` command in a process and session of its own, without input.

    Args:
        words: of the command, after ``ka2l``.
        environment: all of it.
        log: file that takes what it says, at its end.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.benchmark.cell_imports"])
        self._process = context.Process(target=_run, args=(list(words), dict(environment), str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def wait(self, patience_s: float) -> None:
        """Wait for its end, which comes by force where it takes longer than that."""
        self._process.join(patience_s)
        if self.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.join()

    def _signal(self, sign: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, sign)


def _run(words: list[str], environment: dict[str, str], log: str) -> None:
    """Become the process of a cell."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_NAME, b"ka2l-cell")
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ka2l", *words]
    runpy.run_module("engine.cli", run_name="__main__")  # imports the command line, which imports this package


def _end_with_parent() -> None:
    """A cell whose coordinator is gone, however it went, would hold its run directory against the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
