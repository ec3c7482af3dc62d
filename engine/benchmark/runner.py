"""Runs the cells of a benchmark side by side on one cluster.

Each cell is an ordinary run in a process of its own: what one does, or dies of, touches no other. What they share is
the queue for workers (`actors.workers.leases`). The state of each cell stands in a file, so that a benchmark that was
killed goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from actors.workers.leases import start_host
from engine.benchmark.cell_process import CellProcess
from engine.benchmark.matrix import Cell, MatrixConfig
from engine.config import dump_config
from engine.execution.sharing import LEASES_VARIABLE
from engine.store.events import Events
from engine.store.run_directory import RunDirectory
from ka2l.errors import KA2LError

_POLL_S = 0.5
_PAUSED = 3


class CellState(NamedTuple):
    """Where a cell stands."""

    status: str = "waiting"
    """``waiting``, ``running``, ``complete``, ``paused`` for people's annotations, or ``failed``."""
    attempts: int = 0
    """Times that its process was started since it last got on."""
    seconds: float = 0.0
    """Wall-clock, over all attempts."""
    error: str | None = None
    """The last lines that a failed process said."""


def cell_url(root: RunDirectory, name: str) -> str:
    """The run directory of a cell."""
    return f"{root.url.rstrip('/')}/cells/{name}"


def read_state(root: RunDirectory, name: str) -> CellState:
    """What is written of a cell; `waiting` where nothing is."""
    text = root.read_text(f"states/{name}.json")
    return CellState(**json.loads(text)) if text else CellState()


def run_cells(
    config: MatrixConfig,
    cells: Sequence[Cell],
    root: RunDirectory,
    events: Events,
    address: str,
    on_end: Callable[[], None],
) -> dict[str, CellState]:
    """Run all cells that are not complete. Ray must be initialised; returns where each cell stands.

    Args:
        address: of the Ray cluster, for the cells' processes.
        on_end: called after each cell that has ended.
    """
    name = f"leases-{os.getpid()}"
    host = start_host(name, config.patience_s, Path(root.path).name)
    queue = _Queue(config, cells, root, events, {"RAY_ADDRESS": address}, name, host)
    try:
        with Live(get_renderable=lambda: state_table(root, cells, queue.states), console=events.console,
                  refresh_per_second=1, transient=True) as live:  # fmt: skip
            if not events.console.is_terminal:
                live.stop()
            while queue.step():
                if queue.ended:
                    queue.ended.clear()
                    on_end()
                time.sleep(_POLL_S)
    finally:
        queue.stop()
    on_end()
    return queue.states


class _Queue:
    """Starts cells as there is room, and takes note of how they end."""

    def __init__(
        self, config: MatrixConfig, cells: Sequence[Cell], root: RunDirectory, events: Events,
        environment: Mapping[str, str], leases: str, host: Any,
    ) -> None:  # fmt: skip
        self.config = config
        self.root = root
        self.events = events
        self.environment = environment
        self.leases = leases
        self.host = host
        self.cells = {cell.name: cell for cell in cells}
        self.states = {name: read_state(root, name) for name in self.cells}
        for name, state in self.states.items():
            if state.status in ("running", "failed", "paused"):  # of a coordinator that was killed, or tried again now
                self._set(name, state._replace(status="waiting", attempts=0))
        self.processes: dict[str, tuple[CellProcess, float]] = {}
        self.ended: list[str] = []

    def step(self) -> bool:
        """Look after the processes once; False where nothing is left to do."""
        for name, (process, since) in list(self.processes.items()):
            if (code := process.poll()) is not None:
                del self.processes[name]
                self._end(name, code, time.monotonic() - since)
        waiting = [name for name, state in self.states.items() if state.status == "waiting"]
        for name in waiting[: self.config.max_running - len(self.processes)]:
            self._start(self.cells[name])
        return bool(self.processes)

    def _start(self, cell: Cell) -> None:
        state = self.states[cell.name]
        folder = Path(self.root.logs())
        written = folder / f"{cell.name}.yaml"
        written.write_text(dump_config(cell.config), encoding="utf-8")
        environment = {
            **os.environ,
            **self.environment,
            LEASES_VARIABLE: json.dumps({
                "name": self.leases, "cell": cell.name, "priority": cell.priority, "slice_s": self.config.slice_s,
            }),
        }  # fmt: skip
        words = ["run", str(written), "--run-dir", cell_url(self.root, cell.name), "--resume"]
        process = CellProcess(words, environment, folder / f"{cell.name}.log")
        self.processes[cell.name] = (process, time.monotonic())
        self._set(cell.name, state._replace(status="running", attempts=state.attempts + 1, error=None))
        self.events.emit("cell_started", cell=cell.name, attempt=state.attempts + 1, pid=process.pid)

    def _end(self, name: str, code: int, seconds: float) -> None:
        self.host.give_back.remote(f"{name}/")
        state = self.states[name]
        state = state._replace(seconds=state.seconds + seconds)
        if code == 0:
            state = state._replace(status="complete")
        elif code == _PAUSED:
            state = state._replace(status="paused")
        else:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            said = f"{how}: {_last_words(Path(self.root.logs()) / f'{name}.log')}"
            again = state.attempts <= self.config.retries and code != 2
            state = state._replace(status="waiting" if again else "failed", error=said)
            self.events.say(f"{name}: {how}" + (", is started again" if again else ", has failed"))
        self._set(name, state)
        self.ended.append(name)
        self.events.emit("cell_ended", cell=name, status=state.status, exit_code=code, seconds=round(seconds, 1))
        if state.status in ("complete", "paused"):
            self.events.say(f"{name:<40} {state.status} after {state.seconds:,.0f} s")

    def _set(self, name: str, state: CellState) -> None:
        self.states[name] = state
        self.root.write_text(f"states/{name}.json", json.dumps(state._asdict()))

    def stop(self) -> None:
        """End what still runs; it goes on another time."""
        for process, _ in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + 10
        for name, (process, since) in self.processes.items():
            process.wait(max(0.1, deadline - time.monotonic()))
            state = self.states[name]
            self._set(name, state._replace(status="waiting", seconds=state.seconds + time.monotonic() - since))
        self.processes.clear()


def state_table(root: RunDirectory, cells: Iterable[Cell], states: Mapping[str, CellState] | None = None) -> Table:
    """A line for each cell: where it stands, in which round, how accurate. Reads files only."""
    # Where there is little room the name gives way; in a pipe there may be 80 columns.
    widths = {"status": len("complete"), "round": 5, "annotated": 9, "accuracy": 8, "seconds": 7}
    whole = (Column(name, no_wrap=True, min_width=width) for name, width in widths.items())
    table = Table(Column("cell", overflow="fold"), *whole, caption_justify="left")
    errors = []
    for cell in cells:
        state = states[cell.name] if states is not None else read_state(root, cell.name)
        rounds: list[dict[str, Any]] = []
        with suppress(KA2LError, ValueError, OSError):
            summary = RunDirectory(cell_url(root, cell.name)).read_text("summary.json")
            rounds = json.loads(summary)["rounds"] if summary else []
        last = rounds[-1] if rounds else {}
        accuracy = last.get("accuracy")
        table.add_row(
            cell.name, state.status, str(last.get("round", "")), str(last.get("num_annotated", "")),
            "" if accuracy is None else f"{accuracy:.3f}", f"{state.seconds:,.0f}",
        )  # fmt: skip
        if state.error:
            errors.append(f"{cell.name}: {' '.join(state.error.split())[:200]}")
    table.caption = Text("\n".join(errors)) if errors else None
    return table


def _last_words(path: Path, num_lines: int = 5) -> str:
    """The error that a command ended with, and the last lines of its log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    last = [line for line in lines[-num_lines:] if line.strip()]
    error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    return "\n".join(last if error is None or error in last else [error, *last])
