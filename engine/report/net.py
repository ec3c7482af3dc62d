"""The net saving of a run: annotation and computation, probing included, against what else could have been done.

Plain values in, plain values out. Curves are compared by straight lines between their measured states, so every
figure that lies between two states comes with those two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from engine.forecast.prices import PricesConfig, Work
from engine.report.data import ReportData
from engine.report.spending import KNOWING, Point, Spending, curve, everything, is_recorded, spending
from ka2l.evaluation.statistics import json_safe


@dataclass(frozen=True)
class Purpose:
    """Computation for one purpose."""

    seconds: float
    cpu_hours: float
    gpu_hours: float
    money: float


@dataclass(frozen=True)
class Saving:
    """What a run spares against an alternative. Negative where it costs more."""

    annotations: float
    annotation_money: float
    compute_money: float
    money: float
    """Of annotation and computation together: the net saving."""
    knowing_share: float | None
    """Share of ``annotation_money`` that sampling for the probe and probing took; None where nothing is spared."""
    break_even_price: float | None
    """Price of an annotation from which on there is a net saving; None where no annotation is spared."""


@dataclass(frozen=True)
class AnnotatingEverything:
    """Every candidate annotated and one tuning on that: an estimate. Its accuracy is not known."""

    annotations: int
    annotation_money: float
    steps: int | None
    compute: Purpose | None
    money: float
    """Without computation where that cannot be estimated."""
    saving: Saving


@dataclass(frozen=True)
class Difference:
    """Accuracy of this run minus another accuracy."""

    value: float
    ci: tuple[float, float] | None
    """95 %, by the method of `difference_ci`."""
    within_ci: bool | None
    """Whether the interval holds zero: no difference is shown."""


class Reached(NamedTuple):
    """Where a learning curve reaches an accuracy."""

    annotations: float
    money: float
    between: tuple[int, int]
    """Annotations of the measured states before and after; the same twice where the first state is there already."""


@dataclass(frozen=True)
class Baseline:
    """Another run of the same model and pool, at this run's accuracy."""

    name: str
    location: str
    strategy: str
    knowing_counted: bool
    """Whether its sampling for a probe and its probing count: not where it selects at random or takes everything."""
    curve: list[Point]
    difference: Difference | None
    """Of the final accuracies."""
    at_equal_annotations: tuple[float, Difference] | None
    """Accuracy on its curve at this run's number of annotations; None beyond the curve's ends."""
    reached: Reached | None
    """Where its curve reaches this run's final accuracy; None where it never does."""
    annotations_ci: tuple[float | None, float | None]
    """Annotations where its curve reaches the ends of the final accuracy's confidence interval; None: it does not."""
    saving: Saving | None
    """At equal accuracy; None where it is not reached."""
    saving_within_ci: bool | None
    """Whether this run's number of annotations lies within ``annotations_ci``: no saving is shown. None as above."""


@dataclass(frozen=True)
class Net:
    """What a run cost, and what that spares."""

    currency: str
    annotation_price: float
    annotation_booked: bool
    """Whether that is what the annotator booked, on average, and not an assumption."""
    cpu_hour: float
    gpu_hour: float
    compute_recorded: bool
    """Whether the stages recorded CPU and GPU time; else it is wall-clock time on the configured workers."""
    annotations: int
    annotation_money: float
    compute: dict[str, Purpose]
    compute_total: Purpose
    money: float
    knowing_money: float
    """Of sampling for the probe and of probing."""
    curve: list[Point]
    everything: AnnotatingEverything | None
    baselines: list[Baseline]

    @property
    def final(self) -> Point | None:
        """The last measured state."""
        return self.curve[-1] if self.curve else None


def net(data: ReportData) -> Net:
    """The net saving of a run against annotating everything and against ``data.baselines``."""
    prices, spent = data.prices, spending(data)
    annotation_money = spent.annotation_money(prices)
    price = annotation_money / spent.annotations if spent.annotations else prices.annotation
    compute = {name: _purpose(work, prices) for name, work in spent.work.items()}
    points = curve(data, prices, price)
    return Net(
        currency=prices.currency,
        annotation_price=price,
        annotation_booked=spent.money_booked > 0,
        cpu_hour=prices.cpu_hour,
        gpu_hour=prices.gpu_hour,
        compute_recorded=is_recorded(data),
        annotations=spent.annotations,
        annotation_money=annotation_money,
        compute=compute,
        compute_total=_purpose(sum(spent.work.values(), Work()), prices),
        money=annotation_money + spent.compute_money(prices),
        knowing_money=sum(compute[name].money for name in KNOWING),
        curve=points,
        everything=_everything(data, spent, price),
        baselines=[_compare(data, other, points, price) for other in data.baselines],
    )


def net_summary(result: Net) -> dict[str, Any]:
    """The JSON-safe form for ``summary.json``; docs/net-saving.md describes it."""
    values: dict[str, Any] = json_safe(asdict(result))
    points = [(values, result.curve), *zip(values["baselines"], (item.curve for item in result.baselines), strict=True)]
    for value, original in points:
        value["curve"] = [json_safe(point._asdict()) for point in original]
    for value, item in zip(values["baselines"], result.baselines, strict=True):
        value["reached"] = None if item.reached is None else json_safe(item.reached._asdict())
        if item.at_equal_annotations is not None:
            accuracy, difference = item.at_equal_annotations
            value["at_equal_annotations"] = {"accuracy": accuracy, "difference": json_safe(asdict(difference))}
    return values


# -- curves ----------------------------------------------------------------------------------------------------------


def reach(points: Sequence[Point], accuracy: float) -> Reached | None:
    """Where a curve first reaches an accuracy, by a straight line between the measured states; None if it never does.

    A curve whose first state is there already has reached it with that state's annotations.
    """
    before = None
    for point in points:
        if point.accuracy >= accuracy:
            if before is None:
                return Reached(float(point.annotations), point.money, (point.annotations, point.annotations))
            way = (accuracy - before.accuracy) / (point.accuracy - before.accuracy)
            return Reached(
                before.annotations + way * (point.annotations - before.annotations),
                before.money + way * (point.money - before.money),
                (before.annotations, point.annotations),
            )
        before = point
    return None


def accuracy_at(points: Sequence[Point], annotations: int) -> tuple[float, tuple[float, float] | None] | None:
    """Accuracy of a curve at a number of annotations; None beyond the curve's ends.

    With its interval where a state was measured there, of several the last; without on the straight line between two.
    """
    before = [point for point in points if point.annotations <= annotations]
    after = [point for point in points if point.annotations > annotations]
    if not before:
        return None
    left = before[-1]
    if left.annotations == annotations:
        return left.accuracy, left.accuracy_ci
    if not after:
        return None
    way = (annotations - left.annotations) / (after[0].annotations - left.annotations)
    return (1 - way) * left.accuracy + way * after[0].accuracy, None


def difference_ci(
    first: float, first_ci: tuple[float, float], second: float, second_ci: tuple[float, float]
) -> tuple[float, float]:
    """Interval of ``first - second`` from the intervals of both proportions.

    Newcombe 1998 (method 10, doi 10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I), for independent
    samples. Two runs answer the same eval questions, which makes the true interval narrower, hardly ever wider.
    """
    low = math.hypot(first - first_ci[0], second_ci[1] - second)
    high = math.hypot(first_ci[1] - first, second - second_ci[0])
    return first - second - low, first - second + high


def _difference(
    first: float, first_ci: tuple[float, float] | None, second: float, second_ci: tuple[float, float] | None
) -> Difference:
    if first_ci is None or second_ci is None:
        return Difference(first - second, None, None)
    low, high = difference_ci(first, first_ci, second, second_ci)
    return Difference(first - second, (low, high), low <= 0 <= high)


# -- comparisons -----------------------------------------------------------------------------------------------------


def _everything(data: ReportData, spent: Spending, price: float) -> AnnotatingEverything | None:
    estimate = everything(data)
    if estimate is None:
        return None
    compute = None if estimate.work is None else _purpose(estimate.work, data.prices)
    annotation_money = estimate.annotations * price
    compute_money = 0.0 if compute is None else compute.money
    # The whole run against no more than one tuning: measuring is left out of the alternative alone.
    saving = _saving(
        float(estimate.annotations - spent.annotations),
        price,
        compute_money - spent.compute_money(data.prices),
        _knowing_money(spent, data.prices),
    )
    money = annotation_money + compute_money
    return AnnotatingEverything(estimate.annotations, annotation_money, estimate.steps, compute, money, saving)


def _compare(data: ReportData, other: ReportData, points: Sequence[Point], price: float) -> Baseline:
    """Another run at this run's accuracy. Annotations of both have the price that they had in this run."""
    knowing = _needs_knowing(other, data.num_candidates)
    theirs = curve(other, data.prices, price, knowing=knowing)
    final = points[-1] if points else None
    difference, equal, reached, saving, within = None, None, None, None, None
    ends: tuple[float | None, float | None] = (None, None)
    if final is not None and theirs:
        last = theirs[-1]
        difference = _difference(final.accuracy, final.accuracy_ci, last.accuracy, last.accuracy_ci)
        there = accuracy_at(theirs, final.annotations)
        if there is not None:
            equal = there[0], _difference(final.accuracy, final.accuracy_ci, *there)
        reached = reach(theirs, final.accuracy)
        if final.accuracy_ci is not None:
            low, high = (reach(theirs, end) for end in final.accuracy_ci)
            ends = (low and low.annotations, high and high.annotations)
            if low is not None and reached is not None:
                within = low.annotations <= final.annotations <= (math.inf if high is None else high.annotations)
        if reached is not None:
            fewer = reached.annotations - final.annotations
            ours = spending(data, final.round)
            saving = _saving(
                fewer, price, reached.money - final.money - fewer * price, _knowing_money(ours, data.prices)
            )
    return Baseline(
        name=_label(other, data.baselines),
        location=other.location,
        strategy=_strategy(other),
        knowing_counted=knowing,
        curve=theirs,
        difference=difference,
        at_equal_annotations=equal,
        reached=reached,
        annotations_ci=ends,
        saving=saving,
        saving_within_ci=within,
    )


def _saving(annotations: float, price: float, compute_money: float, knowing_money: float) -> Saving:
    annotation_money = annotations * price
    return Saving(
        annotations=annotations,
        annotation_money=annotation_money,
        compute_money=compute_money,
        money=annotation_money + compute_money,
        knowing_share=knowing_money / annotation_money if annotation_money > 0 else None,
        break_even_price=max(0.0, -compute_money / annotations) if annotations > 0 else None,
    )


def _knowing_money(spent: Spending, prices: PricesConfig) -> float:
    return sum(spent.work[purpose].money(prices) for purpose in KNOWING)


def _purpose(work: Work, prices: PricesConfig) -> Purpose:
    return Purpose(work.seconds, work.cpu_seconds / 3600, work.gpu_seconds / 3600, work.money(prices))


def _needs_knowing(other: ReportData, num_candidates: int | None) -> bool:
    """Whether a run's selection rests on what the model knows: not at random, nor where nothing is left out."""
    selections = [item.stage("select") for item in other.rounds if "select" in item.stages]
    taken = sum(int(stage.number("num_selected") or 0) for stage in selections)
    if not selections or (num_candidates and taken >= num_candidates):
        return False
    return any(stage.metrics.get("strategy") != "random" for stage in selections)


def _strategy(other: ReportData) -> str:
    found = dict.fromkeys(str(item.stage("select").metrics.get("strategy", "")) for item in other.rounds)
    return ", ".join(name for name in found if name)


def _label(other: ReportData, among: Sequence[ReportData]) -> str:
    """The last part of its path, with the part before it where two runs share that."""
    parts = [part for part in other.location.split("/") if part] or [other.name]
    shared = [item for item in among if item.location.rstrip("/").endswith(f"/{parts[-1]}")]
    return "/".join(parts[-2:]) if len(shared) > 1 else parts[-1]
