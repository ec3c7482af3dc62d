"""docs/observability.md names every event with its fields, every metric and every tracker."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from actors.metrics import METRICS
from engine.execution.trackers import PACKAGES

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "observability.md").read_text(encoding="utf-8")
#: First cell of a row of a table -> its other cells.
ROWS = {
    name: rest
    for line in TEXT.splitlines()
    if (row := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line))
    for name, rest in [row.groups()]
}


def emitted() -> dict[str, set[str]]:
    """Every event that the packages emit, with the fields that are named where it is emitted."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (path for package in ("ka2l", "actors", "engine") for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit":
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}: an event's name must stand where it is emitted"
                found[name.value] |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return found


def test_every_event_is_in_the_table_with_its_fields() -> None:
    events = emitted()
    assert len(events) > 8
    missing = {
        event: sorted(field for field in fields if f"`{field}`" not in ROWS.get(event, "").split(" | ")[0])
        for event, fields in events.items()
        if event not in ROWS or any(f"`{field}`" not in ROWS[event].split(" | ")[0] for field in fields)
    }
    assert not missing


def test_every_metric_is_in_the_table_and_no_other() -> None:
    assert {name for name in ROWS if name.startswith("ka2l_")} == set(METRICS)


def test_every_tracker_is_in_the_table() -> None:
    assert set(PACKAGES) <= set(ROWS)


def test_no_event_is_described_that_is_not_emitted() -> None:
    described = set(re.findall(r"^\| `(\w+)` ", TEXT.split("## Events")[1].split("\n## ")[0], re.MULTILINE))
    assert described - {"event"} == set(emitted())
