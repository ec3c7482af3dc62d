"""Measures a stage: wall-clock seconds, and the CPUs and GPUs reserved for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from ka2l.errors import KA2LError

#: What a meter counts.
SPENT_ITEMS = ("seconds", "cpu_seconds", "gpu_seconds")
#: Seconds of work that a killed process may leave uncounted.
_SAVE_EVERY_S = 5.0


class Meter:
    """Measures one stage at a time.

    ``cpu_seconds`` and ``gpu_seconds`` are reserved CPUs and GPUs x the seconds for which workers held them, busy or
    not: nobody else could use them. They count from asking Ray for the workers to their end. While no worker holds
    anything the driver is at work, and counts as one CPU.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._spent = dict.fromkeys(SPENT_ITEMS, 0.0)
        self._held = (0.0, 0.0)
        self._since: float | None = None

    def spent(self) -> dict[str, float]:
        """The stage's SPENT_ITEMS so far, earlier attempts included."""
        with self._lock:
            self._count()
            return dict(self._spent)

    @contextlib.contextmanager
    def measure(self, earlier: Mapping[str, float], save: Callable[[Mapping[str, float]], None]) -> Iterator[None]:
        """Count from here to the end of the block.

        Args:
            earlier: what attempts before this one have taken.
            save: keeps what has been counted, in case the process dies; called now and then, and at the end.
        """
        with self._lock:
            self._spent = {item: float(earlier.get(item, 0.0)) for item in SPENT_ITEMS}
            self._held, self._since = (0.0, 0.0), self._clock()
        done = threading.Event()
        saver = threading.Thread(target=self._save_now_and_then, args=(save, done), daemon=True)
        saver.start()
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._since = None
            done.set()
            saver.join()
            self._save(save)

    @contextlib.contextmanager
    def hold(self, cpus: float, gpus: float) -> Iterator[None]:
        """Workers hold so many CPUs and GPUs, all together, in this block."""
        with self._lock:
            self._count()
            before, self._held = self._held, (self._held[0] + cpus, self._held[1] + gpus)
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._held = before

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """What passes in this block is not counted: others have the workers."""
        with self._lock:
            self._count()
            was, self._since = self._since, None
        try:
            yield
        finally:
            with self._lock:
                self._since = self._clock() if was is not None else None

    def _count(self) -> None:
        if self._since is None:
            return
        now = self._clock()
        seconds, self._since = now - self._since, now
        cpus, gpus = self._held
        for item, amount in zip(SPENT_ITEMS, (1.0, cpus if cpus or gpus else 1.0, gpus), strict=True):
            self._spent[item] += amount * seconds

    def _save_now_and_then(self, save: Callable[[Mapping[str, float]], None], done: threading.Event) -> None:
        while not done.wait(_SAVE_EVERY_S):
            self._save(save)

    def _save(self, save: Callable[[Mapping[str, float]], None]) -> None:
        # A disk that takes nothing more is the stage's own error to report.
        with contextlib.suppress(OSError, KA2LError):
            save(self.spent())
