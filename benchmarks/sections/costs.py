"""What every stage costs as its work grows, beside its floor."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from charts import lines
from pages import Section
from tables import figure, table

TITLE = "Cost of every stage, beside its floor"
COMMAND = "python benchmarks/bench_costs.py"
FACTORS = {"num_questions": "questions", "num_samples": "samples", "num_layers": "layers", "width": "width"}
#: Stages that run a model are measured at other widths with fewer questions than the default has.
WIDTH_APART = ("sample", "extract", "tune")
#: Beyond this many times its floor a stage is on the list of losses.
FAR = 3.0
FLOORS = {
    "sample": "tokens", "extract": "FLOPs", "probe": "FLOPs", "tune": "FLOPs", "cluster": "bytes", "label": "bytes",
    "knowledge": "bytes", "select": "bytes",
}  # fmt: skip


def section(result: dict[str, Any]) -> Section:
    """Seconds, exponents, floors."""
    stages = [stage for stage in FLOORS if any(point["stage"] == stage for point in result["points"])]
    rows = []
    for stage in stages:
        base = default(result, stage)
        exponents = [exponent(result, stage, factor) for factor in FACTORS]
        rows.append(
            [stage, base["threads"], figure(base["seconds"], 3), figure(base["peak_mib"], 0),
             *(figure(e, 2) for e in exponents), FLOORS[stage], f"{base['floor_s']:.2g}",
             f"{base['seconds'] / base['floor_s']:,.1f}"]
        )  # fmt: skip
    at = result["default"]
    floors = {key: median(p[key] for p in result["points"]) for key in ("flop_per_s", "bytes_per_s")}
    header = ["stage", "threads", "seconds", "peak MiB", *(f"by {name}" for name in FACTORS.values()), "floor in",
              "floor, s", "seconds / floor"]  # fmt: skip
    wide = {stage: largest_width(result, stage) for stage in WIDTH_APART}
    shares = "; ".join(
        f"{stage} {p['seconds'] / p['floor_s']:.1f} at width {p['width']}" for stage, p in wide.items() if p
    )
    text = f"""At {at["num_questions"]:,} questions, {at["num_samples"]} samples, {at["num_layers"]} layers and width
{at["width"]}, in one process, without Ray. "By" is the exponent of growth in that factor, the slope of
log seconds against log factor with all others fixed: 1 is proportional, a dash where the stage does not depend on it
or that was not varied. Floors: {floors["flop_per_s"] / 1e9:,.0f} GFLOP/s of a large float32 product,
{floors["bytes_per_s"] / 1e6:,.0f}
MB/s of disk (medians), {_pace(result):,.0f} tokens/s of the engine with 256 long answers, measured just before.

{table(header, rows)}

Seconds / floor with wider models, where there is more to compute a token: {shares}.

{_workers(result)} {" ".join(result.get("notes", []))}"""
    series = {stage: _curve(result, stage) for stage in stages}
    chart = lines("Seconds by pool size", "questions", "seconds", series, log_x=True, log_y=True)
    return Section(text, {"pool": chart}, losses(result))


def default(result: dict[str, Any], stage: str) -> dict[str, Any]:
    """The measurement that all factors start from."""
    found: dict[str, Any] = next(p for p in result["points"] if p["stage"] == stage and p["factor"] == "default")
    return found


def points_of(result: dict[str, Any], stage: str, factor: str) -> list[dict[str, Any]]:
    """Measurements in which this factor varies and nothing else, by its value."""
    found = [p for p in result["points"] if p["stage"] == stage and p["factor"] == factor]
    if found and not (factor == "width" and stage in WIDTH_APART):
        found.append(default(result, stage))
    return sorted(found, key=lambda p: p[factor])


def exponent(result: dict[str, Any], stage: str, factor: str) -> float | None:
    """Least-squares slope of log seconds against the log of a factor; None where it was not varied."""
    points = points_of(result, stage, factor)
    if len(points) < 2:
        return None
    x, y = ([math.log(point[key]) for point in points] for key in (factor, "seconds"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def largest_width(result: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """The measurement of the widest model."""
    points = points_of(result, stage, "width")
    return points[-1] if points else None


def _pace(result: dict[str, Any]) -> float:
    return float(default(result, "sample")["tokens_per_s"])


def _curve(result: dict[str, Any], stage: str) -> list[tuple[float, float]]:
    return [(point["num_questions"], point["seconds"]) for point in points_of(result, stage, "num_questions")]


def _workers(result: dict[str, Any]) -> str:
    found = {p["stage"]: {} for p in result["points"] if p["factor"] == "workers"}
    for point in result["points"]:
        if point["factor"] == "workers":
            found[point["stage"]][point["workers"]] = point["seconds"]
    said = [f"{stage} {by[1] / by[2]:.2f} times as fast" for stage, by in found.items()]
    return (
        f"Two processes of one thread against one, sharing the questions: {', '.join(said)}."
        if said
        else "More than one worker: not measured."
    )


def losses(result: dict[str, Any]) -> list[str]:
    """Stages far above their floor."""
    reasons = {
        "bytes": "probably Python objects and fixed costs, not the disk",
        "FLOPs": "probably because matrices of this width are too small for the processor's pace in large products",
        "tokens": "probably the start and end of requests, with answers of a few tokens",
    }
    found = []
    for stage, kind in FLOORS.items():
        if not any(point["stage"] == stage for point in result["points"]):
            continue
        base = default(result, stage)
        ratio = base["seconds"] / base["floor_s"]
        if ratio > FAR:
            found.append(
                f"{stage} takes {ratio:,.0f} times its floor in {kind} ({base['seconds']:.3f} s against "
                f"{base['floor_s']:.2g} s at {base['num_questions']:,} questions): {reasons[kind]}."
            )
    return found
