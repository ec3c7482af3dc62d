"""What a run spent, by purpose and up to each of its model states; and what annotating every candidate would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.forecast.prices import PricesConfig, Work
from engine.report.data import ReportData, RoundReport, StageReport, finite
from engine.stages import room_of, stage_kind
from engine.stages.kind import PURPOSES
from ka2l.tuning.sft import num_steps

#: What only a selection that asks the model first needs.
KNOWING = ("sampling", "probing")
#: What sampled answers are for, by the purpose in their table.
_ANSWERS = {"probe": "sampling", "eval": "measuring", "rehearsal": "tuning", "agreement": "measuring"}


class Point(NamedTuple):
    """A model state on the learning curve."""

    round: int
    annotations: int
    """That it was tuned on."""
    accuracy: float
    accuracy_ci: tuple[float, float] | None
    money: float
    """Everything spent when its accuracy was known, in the currency of the prices."""


@dataclass(frozen=True)
class Spending:
    """What a run has spent."""

    annotations: int
    money_booked: float
    """By the annotator."""
    num_unbooked: int
    """Annotations of rounds for which the annotator booked nothing."""
    work: Mapping[str, Work]
    """By purpose."""

    def annotation_money(self, prices: PricesConfig) -> float:
        """What the annotator booked, and the assumed price of what it did not book."""
        return self.money_booked + self.num_unbooked * prices.annotation

    def compute_money(self, prices: PricesConfig, *, knowing: bool = True) -> float:
        """The price of the computation, with or without that for knowing what the model knows."""
        return sum(work.money(prices) for purpose, work in self.work.items() if knowing or purpose not in KNOWING)


@dataclass(frozen=True)
class Everything:
    """What annotating every candidate and tuning on that would take: an estimate."""

    annotations: int
    steps: int | None = None
    """Optimiser steps; None where no tuning was measured."""
    work: Work | None = None


def spending(data: ReportData, measured_in: int | None = None) -> Spending:
    """What was spent in all, or by the time that the accuracy of round ``measured_in`` was known."""
    work: dict[str, Work] = {purpose: Work() for purpose in PURPOSES}
    for name, stage in data.pool_stages.items():
        work[_purpose_of(name)] += stage_work(data, name, stage)
    annotations, unbooked, booked = 0, 0, 0.0
    for item in data.rounds:
        if measured_in is not None and item.round > measured_in:
            break
        for name, stage in item.stages.items():
            if item.round == measured_in and not _measures(name):
                continue
            for purpose, share in _shares(name, item):
                work[purpose] += stage_work(data, name, stage) * share
            if name == "annotate":
                count, money = int(stage.number("num_annotated") or 0), finite(stage.cost.get("money")) or 0.0
                annotations, booked = annotations + count, booked + money
                unbooked += 0 if money else count
    return Spending(annotations, booked, unbooked, work)


def stage_work(data: ReportData, name: str, stage: StageReport) -> Work:
    """Recorded CPU and GPU time; for runs that recorded none, wall-clock time on the workers that the config names."""
    seconds, cpu, gpu = (finite(stage.cost.get(item)) for item in ("seconds", "cpu_seconds", "gpu_seconds"))
    if cpu is None and gpu is None:
        cpus, gpus = room_of(name, data.config)
        return Work(seconds or 0.0, (seconds or 0.0) * cpus, (seconds or 0.0) * gpus)
    return Work(seconds or 0.0, cpu or 0.0, gpu or 0.0)


def is_recorded(data: ReportData) -> bool:
    """Whether the stages of every round recorded their CPU or GPU time."""
    costs = [stage.cost for item in data.rounds for stage in item.stages.values()]
    return bool(costs) and all(cost.keys() & {"cpu_seconds", "gpu_seconds"} for cost in costs)


def _shares(name: str, item: RoundReport) -> Iterator[tuple[str, float]]:
    """Purposes of a stage and their shares. One engine session answers for several purposes: by generated tokens."""
    kind = stage_kind(name)
    tokens = {answer: item.answer_tokens.get(answer, 0) for answer in (kind.answers if kind else ())}
    total = sum(tokens.values())
    if not total:
        yield _purpose_of(name), 1.0
        return
    for answer, number in tokens.items():
        yield _ANSWERS[answer], number / total


def _purpose_of(name: str) -> str:
    kind = stage_kind(name)
    return "rest" if kind is None else kind.purpose


def _measures(name: str) -> bool:
    kind = stage_kind(name)
    return kind is not None and kind.measures


def curve(data: ReportData, prices: PricesConfig, annotation_price: float, *, knowing: bool = True) -> list[Point]:
    """The measured states in the order of their rounds, with every annotation at the same price.

    Args:
        knowing: whether sampling for the probe and probing count.
    """
    points = []
    for item in data.measured():
        spent, cluster = spending(data, item.round), item.stage("cluster")
        accuracy, annotations = cluster.number("accuracy"), data.annotated_before(item.round)
        assert accuracy is not None
        money = annotations * annotation_price + spent.compute_money(prices, knowing=knowing)
        points.append(Point(item.round, annotations, accuracy, cluster.interval("accuracy_ci"), money))
    return points


def everything(data: ReportData) -> Everything | None:
    """Every candidate annotated and tuned on; None where the candidates were not counted.

    The computation is that of the last tune stage: what it takes to start, and its optimiser steps at the speed they
    had, as many as the config asks for.
    """
    if not data.num_candidates:
        return None
    tuned = [item.stage("tune") for item in data.rounds if (item.stage("tune").number("num_steps") or 0) > 0]
    if not tuned or data.config is None:
        return Everything(data.num_candidates)
    tune = tuned[-1]
    now, training, wall = tune.number("num_steps"), tune.number("training_seconds"), finite(tune.cost.get("seconds"))
    if not now or training is None or not wall:
        return Everything(data.num_candidates)
    # Nothing but the seed questions is left to rehearse.
    rehearsed = (data.num_seed or 0) if data.config.tuning.rehearsal > 0 else 0
    steps = num_steps(data.config.tuning, data.num_candidates, rehearsed)
    seconds = max(0.0, wall - training) + training * steps / now
    return Everything(data.num_candidates, steps, stage_work(data, "tune", tune) * (seconds / wall))
