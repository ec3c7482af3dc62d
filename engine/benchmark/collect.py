"""Reads the results of a benchmark's cells. Files only; a cell that cannot be read is named and left blank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from engine.benchmark.agreement import KnowledgeMap, agreement
from engine.benchmark.data import Agreement, BenchmarkData, CellReport, Combination, Cost, CurvePoint, MeanPoint
from engine.benchmark.matrix import Cell, MatrixConfig
from engine.benchmark.runner import CellState, cell_url, read_state
from engine.report.data import finite
from engine.report.reader import UNREADABLE
from engine.store.run_directory import RunDirectory
from ka2l.errors import KA2LError

#: What a summary of the wrong shape may raise besides.
_UNREADABLE = (*UNREADABLE, TypeError, AttributeError, ValidationError)


def collect_benchmark(root: RunDirectory, config: MatrixConfig, cells: Iterable[Cell]) -> BenchmarkData:
    """What stands in a benchmark's folder by now; never raises because of a single cell.

    Args:
        cells: of ``config``, in any order.
    """
    place = {
        names: index for index, names in enumerate(product(config.models, config.data, config.strategies, config.seeds))
    }
    ordered = sorted(cells, key=lambda cell: place[cell.model, cell.data, cell.strategy, cell.seed])
    problems: list[str] = []
    reports = [_cell(root, cell, problems) for cell in ordered]
    return BenchmarkData(
        name=config.name,
        location=root.url,
        models=list(config.models),
        data=list(config.data),
        strategies=list(config.strategies),
        seeds=config.seeds,
        cells=reports,
        combinations=[
            _combined([cell for cell in reports if (cell.model, cell.data, cell.strategy) == names])
            for names in product(config.models, config.data, config.strategies)
        ],
        agreement=_agreements(root, config, ordered, problems),
        problems=problems,
    )


def _note(problems: list[str], what: str, error: Exception) -> str:
    message = error.message if isinstance(error, KA2LError) else f"{type(error).__name__}: {error}"
    problem = f"{what}: {(message.splitlines() or [''])[0]}"
    if problem not in problems:
        problems.append(problem)
    return problem


# -- cells -----------------------------------------------------------------------------------------------------------


def _cell(root: RunDirectory, cell: Cell, problems: list[str]) -> CellReport:
    try:
        state = read_state(root, cell.name)
    except _UNREADABLE as error:
        state = CellState(error=_note(problems, f"states/{cell.name}.json", error))
    blank = CellReport(
        name=cell.name,
        model=cell.model,
        data=cell.data,
        strategy=cell.strategy,
        seed=cell.seed,
        status=state.status,
        attempts=state.attempts,
        error=None if state.status == "complete" else state.error,
        wall_seconds=state.seconds,
    )
    try:
        text = RunDirectory(cell_url(root, cell.name)).read_text("summary.json")
        if text is None:
            return blank
        return CellReport.model_validate(blank.model_dump() | _summary(json.loads(text), cell.name))
    except _UNREADABLE as error:
        problem = _note(problems, f"cells/{cell.name}/summary.json", error)
        return blank.model_copy(update={"error": blank.error or problem})


def _summary(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a run's ``summary.json`` adds to its cell."""
    rounds: list[Mapping[str, Any]] = summary["rounds"]
    measured = [row for row in rounds if finite(row.get("accuracy")) is not None]
    costs = [row.get("cost") or {} for row in rounds]

    def total(item: str) -> float:
        return sum(finite(cost.get(item)) or 0.0 for cost in costs)

    return {
        "curve": [
            CurvePoint(
                round=row["round"],
                num_annotated=row["num_annotated"],
                accuracy=row["accuracy"],
                accuracy_ci=row.get("accuracy_ci"),
            )
            for row in measured
        ],
        "num_candidates": summary.get("num_candidates"),
        "unknown_fraction": finite(rounds[0].get("unknown_fraction")) if rounds else None,
        "cost": Cost(
            annotations=int(total("annotation")),
            money=total("money"),
            tokens_generated=int(total("tokens_generated")),
            seconds=finite(summary.get("total_seconds")) or 0.0,
            cpu_seconds=total("cpu_seconds"),
            gpu_seconds=total("gpu_seconds"),
        ),
        "report": f"cells/{name}/report.html",
    }


def _combined(cells: Sequence[CellReport]) -> Combination:
    """Cells that differ in their seed alone; there is one at least."""
    complete = [cell for cell in cells if cell.status == "complete" and cell.curve]
    chosen = complete or [cell for cell in cells if cell.curve]
    final = [cell.curve[-1].accuracy for cell in complete]
    return Combination(
        model=cells[0].model,
        data=cells[0].data,
        strategy=cells[0].strategy,
        num_cells=len(cells),
        num_complete=sum(cell.status == "complete" for cell in cells),
        curve=_mean_curve(chosen),
        final_accuracy=_mean(final),
        final_range=(min(final), max(final)) if len(final) > 1 else None,
        final_ci=complete[0].curve[-1].accuracy_ci if len(final) == 1 else None,
    )


def _mean_curve(cells: Sequence[CellReport]) -> list[MeanPoint]:
    by_round = [{point.round: point for point in cell.curve} for cell in cells]
    common = set.intersection(*(set(points) for points in by_round)) if by_round else set()
    curve = []
    for index in sorted(common):
        points = [points[index] for points in by_round]
        accuracies = [point.accuracy for point in points]
        curve.append(
            MeanPoint(
                round=index,
                num_annotated=sum(point.num_annotated for point in points) / len(points),
                accuracy=sum(accuracies) / len(accuracies),
                low=min(accuracies),
                high=max(accuracies),
                num_seeds=len(points),
            )
        )
    return curve


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# -- who knows what --------------------------------------------------------------------------------------------------


def _agreements(
    root: RunDirectory, config: MatrixConfig, cells: Sequence[Cell], problems: list[str]
) -> list[Agreement]:
    """One for each data set that two models or more have mapped. What was compared before is not read again."""
    earlier = _earlier(root)
    found = []
    for data in config.data:
        best: tuple[str, int, list[KnowledgeMap]] = ("", 0, [])
        for strategy, seed in product(config.strategies, config.seeds):
            alike = [cell for cell in cells if (cell.data, cell.strategy, cell.seed) == (data, strategy, seed)]
            maps = [each for cell in alike if (each := _map(root, cell, problems)) is not None]
            if len(maps) > len(best[2]):
                best = (strategy, seed, maps)
        strategy, seed, maps = best
        before = earlier.get(data)
        if before is not None and before.maps == {each.model: each.fingerprint for each in maps}:
            found.append(before)
            continue
        whole = [each for each in maps if _is_whole(each, problems)]
        try:
            if len(whole) > 1:
                found.append(agreement(data, strategy, seed, whole))
        except UNREADABLE as error:
            _note(problems, f"knowledge of {data}", error)
    return found


def _map(root: RunDirectory, cell: Cell, problems: list[str]) -> KnowledgeMap | None:
    try:
        stage = RunDirectory(cell_url(root, cell.name)).stage("knowledge", 0)
        manifest = stage.manifest()
    except UNREADABLE as error:
        _note(problems, f"cells/{cell.name}", error)
        return None
    return None if manifest is None else KnowledgeMap(cell.model, stage, manifest.fingerprint)


def _is_whole(each: KnowledgeMap, problems: list[str]) -> bool:
    try:
        each.stage.verify()
    except UNREADABLE as error:
        _note(problems, each.stage.url, error)
        return False
    return True


def _earlier(root: RunDirectory) -> dict[str, Agreement]:
    """By data set: what the last report says."""
    try:
        values = json.loads(root.read_text("benchmark.json") or "{}")
        return {each.data: each for each in map(Agreement.model_validate, values.get("agreement", []))}
    except _UNREADABLE:
        return {}
