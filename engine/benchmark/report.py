"""All runs of a benchmark as one HTML file that opens offline, and the same values as ``benchmark.json``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from itertools import product
from operator import add
from typing import Any

from engine.benchmark import figures
from engine.benchmark.collect import collect_benchmark
from engine.benchmark.data import BenchmarkData, Cost
from engine.benchmark.matrix import Cell, MatrixConfig
from engine.report.page import render_page
from engine.store.run_directory import RunDirectory

#: In the order in which a reader wants to know.
_STATUSES = ("failed", "paused", "running", "waiting", "complete")


def write_benchmark_report(root: RunDirectory, config: MatrixConfig, cells: Iterable[Cell]) -> BenchmarkData:
    """Write ``benchmark.html`` and ``benchmark.json`` from what the cells have committed; reads files only.

    Raises:
        StorageFullError: there is no space for them.
    """
    data = collect_benchmark(root, config, cells)
    root.write_text("benchmark.html", render_benchmark(data))
    root.write_json("benchmark.json", data.model_dump(mode="json"))
    return data


def render_benchmark(data: BenchmarkData) -> str:
    """The whole page. Everything that comes from data is escaped; a missing part becomes a sentence."""
    curves = figures.curves(data)
    heat_map = figures.heat_map(data)
    combinations = {(item.model, item.data, item.strategy): item for item in data.combinations}
    cells: dict[tuple[str, str, str], list[Any]] = {key: [] for key in combinations}
    for cell in data.cells:
        cells[cell.model, cell.data, cell.strategy].append(cell)
    return render_page(
        "benchmark.html.j2",
        data=data,
        columns=list(product(data.data, data.strategies)),
        combinations=combinations,
        cells=cells,
        counts={status: sum(cell.status == status for cell in data.cells) for status in _STATUSES},
        troubled=[cell for cell in data.cells if cell.error],
        total=reduce(add, (cell.cost for cell in data.cells), Cost()),
        curves=curves,
        charts={item.key: item for item in curves} | {"agreement": heat_map},
        colors={model: figures.color(data, model) for model in data.models},
    )
