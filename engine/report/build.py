"""A finished or running campaign as one HTML file that opens offline, and its ``summary.json``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from engine.forecast.prices import PricesConfig
from engine.report import figures
from engine.report.baseline import aspects_against, read_baseline
from engine.report.chart import Chart, chart
from engine.report.collect import collect
from engine.report.data import (
    COST_ITEMS,
    ReportData,
    RoundReport,
    finite,
    forgetting,
    summary,
    unknown_fraction,
)
from engine.report.evaluation import evaluation_charts, evaluation_rows
from engine.report.net import Net, net, net_summary
from engine.report.net_figures import curves
from engine.report.page import render_page
from engine.stages import folders_by_purpose, round_folders
from engine.store.run_directory import RunDirectory

__all__ = ["ReportData", "collect", "render", "summary", "write_report"]


def write_report(
    run: RunDirectory,
    status: str | None = None,
    reason: str | None = None,
    *,
    prices: PricesConfig | None = None,
    baselines: Iterable[str] = (),
) -> dict[str, Any]:
    """Write ``report.html`` and ``summary.json`` from what is committed; reads files only.

    Args:
        run: the run directory.
        status: running | paused | complete | failed; None keeps what an earlier ``summary.json`` says.
        reason: why the run stopped or pauses, where that is not simply its end.
        prices: what annotation and computation are worth; None takes the config's.
        baselines: folders or URLs of finished runs of the same model and pool to compare with.

    Returns:
        The content of ``summary.json``.

    Raises:
        KA2LError: a baseline cannot be read or compared with; nothing is written then.
    """
    others = [replace(read_baseline(run, url), aspects=aspects_against(run, RunDirectory(url))) for url in baselines]
    data = collect(run, status, reason)
    data = replace(data, prices=prices or data.prices, baselines=others)
    content = summary(data) | {"net": net_summary(net(data))}
    content |= {"aspects_against": {other.location: other.aspects for other in others if other.aspects}}
    run.write_text("report.html", render(data))
    run.write_json("summary.json", content)
    return content


def render(data: ReportData) -> str:
    """The whole page. Everything that comes from data is escaped; a missing part becomes a sentence."""
    result = net(data)
    return render_page(
        "report.html.j2",
        data=data,
        net=result,
        charts=_charts(data) | _net_charts(result) | evaluation_charts(data),
        evaluation=evaluation_rows(data),
        headline=_headline(data),
        cost_items=COST_ITEMS,
        rounds=[_round_row(data, item) for item in data.rounds],
        costs=_costs(data),
        num_tuned=sum("tune" in item.stages for item in data.rounds),
        command=f"ka2l {data.command} campaign.yaml --run-dir {shlex.quote(f'runs/{data.name}-again')}",
    )


# -- charts ----------------------------------------------------------------------------------------------------------


def _charts(data: ReportData) -> dict[str, Chart | None]:
    single = {
        "curve": (figures.learning_curve, "Accuracy against number of annotations"),
        "transitions": (figures.transitions, "Eval questions kept, learned and forgotten by round"),
        "layers": (figures.probe_layers, "Probe AUROC by layer and round"),
        "auroc": (figures.probe_rounds, "Probe AUROC by round"),
    }
    charts: dict[str, Chart | None] = {}
    for key, (make, label) in single.items():
        figure = make(data)
        charts[key] = None if figure is None else chart(key, label, figure)
    entropies = [(item, figures.entropy_histogram(item)) for item in data.rounds]
    charts["entropy"] = _by_round(
        "entropy", "Semantic entropy of the seed questions", [(item, figure) for item, figure in entropies if figure]
    )
    charts["states"] = _by_round(
        "states",
        "Hidden states in the plane of two principal components",
        [(item, figures.states(item.points)) for item in data.rounds if item.points],
    )
    charts["groups"] = _groups(data)
    return charts


def _net_charts(result: Net) -> dict[str, Chart | None]:
    charts: dict[str, Chart | None] = {}
    for key, by_money in (("net_annotations", False), ("net_money", True)):
        label = f"Accuracy of this run and its baselines against {'total cost' if by_money else 'annotations'}"
        figure = curves(result, by_money=by_money) if result.baselines else None
        charts[key] = None if figure is None else chart(key, label, figure)
    return charts


def _by_round(key: str, label: str, figures: Sequence[tuple[RoundReport, Any]]) -> Chart | None:
    if not figures:
        return None
    options = [f"round {item.round}" + (" (base)" if item.round == 0 else "") for item, _ in figures]
    views = {str(index): figure for index, (_, figure) in enumerate(figures)}
    return Chart(key, label, [("Round", options)], views, default="0")


def _groups(data: ReportData) -> Chart | None:
    rounds = [item for item in data.rounds if item.groups]
    if not rounds:
        return None
    columns = list(dict.fromkeys(share.column for item in rounds for share in item.groups))
    views = {}
    for row, item in enumerate(rounds):
        for position, column in enumerate(columns):
            shares = [share for share in item.groups if share.column == column]
            if shares:
                views[f"{position}|{row}"] = figures.groups(shares)
    selectors = [("Column", columns), ("Round", [f"round {item.round}" for item in rounds])]
    return Chart("groups", "Known and unknown by metadata", selectors, views, default=next(iter(views)))


# -- numbers and sentences -------------------------------------------------------------------------------------------


def _headline(data: ReportData) -> dict[str, Any]:
    measured, probed = data.measured(), data.probed()
    base = measured[0] if measured and measured[0].round == 0 else None
    last = measured[-1] if measured else None
    probe = probed[-1] if probed else None
    accuracy = last.stage("cluster").number("accuracy") if last else None
    base_accuracy = base.stage("cluster").number("accuracy") if base else None
    gain = None if accuracy is None or base_accuracy is None or last is base else accuracy - base_accuracy
    share = data.num_annotated / data.num_candidates if data.num_candidates else None
    return {
        "accuracy": accuracy,
        "accuracy_ci": last.stage("cluster").interval("accuracy_ci") if last else None,
        "base_accuracy": base_accuracy,
        "gain": gain,
        "gain_text": "" if gain is None else f"{100 * gain:+.1f} points".replace("-", "−"),
        "last_round": last.round if last else None,
        "share": share,
        "probe": probe.stage("probe") if probe else None,
        "probe_round": probe.round if probe else None,
        "first_probe": probed[0].stage("probe") if len(probed) > 1 else None,
        "forgotten": forgetting(last) if last and last is not base else None,
        "money": sum(item.cost("money") for item in data.rounds),
        "auroc_wrong": probe.stage("knowledge").number("auroc_wrong") if probe else None,
    }


def _round_row(data: ReportData, item: RoundReport) -> dict[str, Any]:
    tune = item.stage("tune")
    # Of the adapter that the round ends with.
    canary = (item.stage("compare").metrics or tune.metrics).get("canary")
    return {
        "round": item.round,
        "report": item,
        "num_annotated": data.annotated_before(item.round),
        "cluster": item.stage("cluster"),
        "tune": tune,
        "facts": item.stage("facts"),
        "augment": item.stage("augment"),
        "compare": item.stage("compare"),
        "select": item.stage("select"),
        "annotate": item.stage("annotate"),
        "canary": finite(canary.get("max_logit_difference")) if isinstance(canary, dict) else None,
        "example": tune.metrics.get("example"),
        "transitions": item.transitions,
        "forgetting": forgetting(item),
        "unknown_fraction": unknown_fraction(item),
    }


def _costs(data: ReportData) -> dict[str, Any]:
    """Rows (name, {item: quantity}) by stage and by round with its stages, the totals and a sentence on probing."""
    everything = [(name, stage) for name, stage in data.pool_stages.items()]
    everything += [(name, stage) for item in data.rounds for name, stage in item.stages.items()]
    order = {name: index for index, name in enumerate((*data.pool_stages, *round_folders()))}
    names = sorted({name for name, _ in everything}, key=lambda name: order.get(name, len(order)))
    by_stage = [(name, _sum(stage.cost for other, stage in everything if other == name)) for name in names]
    total = _sum(stage.cost for _, stage in everything)
    by_round = [("pool", _sum(s.cost for s in data.pool_stages.values()), _stage_rows(data.pool_stages.items()))]
    by_round += [
        (f"round {item.round}", _sum(s.cost for s in item.stages.values()), _stage_rows(item.stages.items()))
        for item in data.rounds
    ]
    seconds = dict(by_stage)
    by_purpose = folders_by_purpose()
    shares = {
        purpose: sum(seconds.get(name, {}).get("seconds", 0.0) for name in stages) / total["seconds"]
        for purpose, stages in by_purpose.items()
        if total["seconds"] > 0
    }
    return {
        "by_stage": by_stage,
        "by_round": [row for row in by_round if row[2]],
        "total": total,
        "shares": shares,
        "probing": by_purpose["probing"],
    }


def _stage_rows(stages: Iterable[tuple[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    return [(name, _sum([stage.cost])) for name, stage in stages]


def _sum(costs: Iterable[Any]) -> dict[str, float]:
    totals = dict.fromkeys(COST_ITEMS, 0.0)
    for cost in costs:
        for item in COST_ITEMS:
            totals[item] += finite(cost.get(item)) or 0.0
    return totals
