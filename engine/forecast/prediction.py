"""The prediction of a run, stage by stage, each figure with an interval; printed as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engine.forecast.rates import Range, exactly
from ka2l.schemas import SCHEMA_VERSION

NOTHING = exactly(0.0)
#: What the intervals cover, for readers of the JSON.
_INTERVALS = (
    "Of tokens the interval is the spread between questions (95 %), of seconds the range between repeated "
    "measurements, and +-25 % for what could be measured only once, such as a stage's start. It does not cover what "
    "the warm-up cannot see: a machine that is busier later, answers that tuning makes longer or shorter than the "
    "warm-up's short tuning did."
)


@dataclass(frozen=True)
class Prediction:
    """What one stage of one round takes, or several together."""

    round_index: int | None
    """-1 for the pool, as in the ledger; None for the whole run."""
    stage: str
    """Empty for several."""
    rows: int = 0
    """Questions, or optimiser steps for ``tune`` and ``decoder``; 0 for several stages."""
    forward_passes: int = 0
    """Prompts that the model under study reads."""
    annotations: int = 0
    tokens_prompt: Range = NOTHING
    tokens_generated: Range = NOTHING
    seconds: Range = NOTHING
    cpu_seconds: Range = NOTHING
    """Of CPUs that are reserved, busy or not (engine.execution.meter)."""
    gpu_seconds: Range = NOTHING
    money: Range = NOTHING


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    counts: Mapping[str, int]
    """Questions of the pool, by split."""
    stages: list[Prediction]
    notes: list[str] = field(default_factory=list)
    """What the figures leave out."""

    @property
    def rounds(self) -> list[Prediction]:
        """The sum of each round."""
        return [total(rows, index) for index, rows in groupby(self.stages, lambda row: row.round_index)]

    @property
    def total(self) -> Prediction:
        """The sum of the run."""
        return total(self.stages)

    def as_json(self) -> str:
        """For machines: every quantity of every stage, of the rounds and of the run."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "pool": dict(self.counts),
            "intervals": _INTERVALS,
            "notes": self.notes,
            "stages": [asdict(row) for row in self.stages],
            "rounds": [asdict(row) for row in self.rounds],
            "total": asdict(self.total),
        }
        return json.dumps(content, indent=1) + "\n"


def total(rows: Iterable[Prediction], round_index: int | None = None) -> Prediction:
    """The sum of several stages."""
    rows = list(rows)
    sums: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in ("forward_passes", "annotations")}
    for item in fields(Prediction):
        if item.default is NOTHING:
            sums[item.name] = sum((getattr(row, item.name) for row in rows), NOTHING)
    return Prediction(round_index, "", **sums)


#: Columns of the table; those with nothing in them are left out.
_COLUMNS = {
    "prompts": "forward_passes",
    "annot.": "annotations",
    "tok. in": "tokens_prompt",
    "tok. out": "tokens_generated",
    "sec.": "seconds",
    "CPU s": "cpu_seconds",
    "GPU s": "gpu_seconds",
    "money": "money",
}


def print_estimate(made: Estimate, console: Console) -> None:
    """What a stage takes, the sums of rounds and run, and the run's interval."""
    columns = {heading: item for heading, item in _COLUMNS.items() if _end(made.total, item, "high")}
    table = Table("round", "stage", *columns, title="estimate", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify, column.no_wrap = ("left" if column.header in ("round", "stage") else "right"), True

    def add(first: str, second: str, row: Prediction, end: str = "value") -> None:
        table.add_row(first, second, *(_number(_end(row, item, end), item) for item in columns.values()))

    for together in made.rounds:
        number = "" if together.round_index == -1 else str(together.round_index)
        for row in made.stages:
            if row.round_index == together.round_index:
                add(number, row.stage, row)
        if number:
            add(number, "all", together)
        table.add_section()
    for name, end in (("run", "value"), ("at least", "low"), ("at most", "high")):
        add("", name, made.total, end)
    console.print(table)
    for note in made.notes:
        console.print(note, highlight=False)


def _end(row: Prediction, item: str, end: str) -> float:
    quantity = getattr(row, item)
    return float(getattr(quantity, end) if isinstance(quantity, Range) else quantity)


def _number(value: float, item: str) -> str:
    if not value:
        return ""
    return f"{value:,.2f}" if item == "money" else f"{value:,.0f}"
