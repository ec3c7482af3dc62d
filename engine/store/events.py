"""Events of a run: events.jsonl for machines, a live line a stage for people."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from engine.progress import LINE_EVERY_S, Progress, duration, every, say
from engine.store.run_directory import RunDirectory
from engine.store.storage import with_retries


class Events:
    """Appends to ``events.jsonl`` and draws progress. Every event has ``time`` (Unix seconds) and ``event``."""

    def __init__(self, run: RunDirectory, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console(stderr=True)
        self._shown = 0

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event; on object stores, where files cannot grow, each event is a file of its own."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields, ensure_ascii=False) + "\n"
        if self.run.is_local:
            path = f"{self.run.path}/events.jsonl"
            with_retries(lambda: _append(path, line), path)
        else:
            self.run.write_text(f"events/{time.time_ns()}.jsonl", line)

    def say(self, text: str) -> None:
        """A line for people."""
        say(self.console, text)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """Progress of one stage, and one line when it ends."""
        with Progress(self.console, label, total, unit) as progress:
            self._shown += 1
            try:
                yield progress
            finally:
                self._shown -= 1
        self.say(progress.summary())

    @contextlib.contextmanager
    def working(self, label: str) -> Iterator[None]:
        """While nothing in this block shows its progress, a line now and then that it goes on."""
        started = time.perf_counter()

        def tell() -> None:
            if not self._shown:
                self.say(f"{label:<22} at work for {duration(time.perf_counter() - started)}")

        with every(LINE_EVERY_S, tell):
            yield


def _append(path: str, line: str) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(line)


def read_events(run: RunDirectory) -> list[Mapping[str, Any]]:
    """All events so far; a line cut off by a crash is skipped."""
    events = []
    for line in (run.read_text("events.jsonl") or "").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
