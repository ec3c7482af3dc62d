"""Progress of long work: a live bar on a terminal, else a line with counts, rate and time left every half minute."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

#: Seconds between two lines where there is no terminal.
LINE_EVERY_S = 30.0


class Progress:
    """Counts done units of work of a known total, and shows them. A context manager.

    Args:
        console: where to show it.
        label: what the work is.
        total: units in all, as far as is known; `resize` changes it.
        unit: plural noun of what is counted.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        unit: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.console = console
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._clock = clock
        self._started = clock()
        self._skipped = 0
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(label, total=total, unit=unit, note="")
        self._lines = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._bar.start()
        if not self.console.is_terminal:
            self._lines.enter_context(every(LINE_EVERY_S, lambda: say(self.console, self.line())))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._lines.close()
        self._bar.stop()

    def advance(self, count: int, note: str | None = None) -> None:
        """``count`` more units are done."""
        self.done += count
        self.note = self.note if note is None else note
        self._bar.update(self._task, advance=count, note=self.note)

    def skip(self, count: int, note: str | None = None) -> None:
        """``count`` more units were done before, and say nothing about the rate."""
        self._skipped += count
        self.advance(count, note)

    def resize(self, total: int) -> None:
        """There are ``total`` units in all."""
        self.total = total
        self._bar.update(self._task, total=total)

    def line(self) -> str:
        """How far the work is, in one line."""
        made, seconds = self.done - self._skipped, self._clock() - self._started
        parts = [f"{self.done:,} of {self.total:,} {self.unit}"]
        if made and seconds:
            left = duration(seconds / made * max(0, self.total - self.done))
            parts += [rate(made, seconds, self.unit), f"about {left} left"]
        else:
            parts.append(f"{duration(seconds)} so far")
        return f"{self.label:<22} {', '.join(parts)}{self._noted()}"

    def summary(self) -> str:
        """What was done, in one line."""
        made, seconds = self.done - self._skipped, self._clock() - self._started
        speed = f", {rate(made, seconds, self.unit)}" if made and seconds else ""
        return f"{self.label:<22} {self.done:>7,} {self.unit} in {seconds:6.1f} s{speed}{self._noted()}"

    def _noted(self) -> str:
        return f" · {self.note}" if self.note else ""


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` each time that so many seconds of the block have passed, from a thread."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def rate(count: float, seconds: float, unit: str) -> str:
    """``120 questions/s``, ``1.5 steps/s``; where one takes longer than a second, ``79.1 s each``."""
    if count < seconds:
        return f"{seconds / count:,.1f} s each"
    return f"{count / seconds:,.{0 if count >= 10 * seconds else 1}f} {unit}/s"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
