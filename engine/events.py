"""What happened when: events.jsonl for machines, a live line a stage for people."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.artifacts import RunDirectory
from engine.storage import persistently


class Events:
    """Appends to ``events.jsonl`` and draws progress. Every event has ``time`` (Unix seconds) and ``event``."""

    def __init__(self, run: RunDirectory, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console(stderr=True)

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event; on object stores, where files cannot grow, each event is a file of its own."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields, ensure_ascii=False) + "\n"
        if self.run.is_local:
            path = f"{self.run.path}/events.jsonl"
            persistently(lambda: _append(path, line), path)
        else:
            self.run.write_text(f"events/{time.time_ns()}.jsonl", line)

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[StageProgress]:
        """Progress of one stage: a live bar on a terminal, else one line when it ends."""
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not live) as bar:
            tracker = StageProgress(bar, bar.add_task(label, total=total, unit=unit, note=""), total)
            yield tracker
        seconds = time.perf_counter() - started
        rate = f", {tracker.done / seconds:,.0f} {unit}/s" if tracker.done and seconds else ""
        note = f" · {tracker.note}" if tracker.note else ""
        self.say(f"{label:<22} {tracker.done:>7,} {unit} in {seconds:6.1f} s{rate}{note}")


def _append(path: str, line: str) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(line)


class StageProgress:
    """Counts what a stage has done."""

    def __init__(self, bar: Progress, task: Any, total: int) -> None:
        self.bar = bar
        self.task = task
        self.total = total
        self.done = 0
        self.note = ""

    def advance(self, count: int, note: str | None = None) -> None:
        """``count`` more units are done."""
        self.done += count
        self.note = self.note if note is None else note
        self.bar.update(self.task, advance=count, note=self.note)


def read_events(run: RunDirectory) -> list[Mapping[str, Any]]:
    """All events so far; a line cut off by a crash is skipped."""
    events = []
    for line in (run.read_text("events.jsonl") or "").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
