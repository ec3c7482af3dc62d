"""The report's section on facts, wording, aspects, calibration and abstention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from engine.report.chart import SERIES, Chart, chart, new_figure, percent
from engine.report.data import ReportData, RoundReport

#: Source of confidence -> what the report calls it.
SOURCES = {
    "p_unknown": "1 − P(unknown)",
    "agreement": "agreement of samples",
    "p_wrong": "1 − P(wrong), base model",
}


_TABLES = ("text", "facts", "aspects", "against", "confidence", "judge")


def evaluation_rows(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """Rows of the section's tables by their name; empty where nothing was measured of any state."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for item in data.rounds:
        metrics = item.stage("evaluate").metrics if item.evaluated else {}
        if metrics.get("text"):
            rows["text"].append({"round": item.round} | dict(metrics["text"]))
        if metrics.get("facts"):
            rows["facts"].append({"round": item.round} | dict(metrics["facts"]))
        for judged_by, aspects in (metrics.get("aspects") or {}).items():
            same = (metrics.get("judge") or {}).get("same_in_both_positions") or {}
            for aspect, rates in aspects.items():
                row = {"round": item.round, "judged_by": judged_by.removeprefix("by_"), "aspect": aspect}
                agreed = same.get(aspect) if judged_by == "by_judge" else None
                rows["aspects"].append(row | dict(rates) | {"same": agreed})
        for source, made in _confidence(item).items():
            row = {"round": item.round, "source": SOURCES.get(source, source)} | dict(made)
            rows["confidence"].append(row)
        if judge := metrics.get("judge"):
            rows["judge"].append({"round": item.round} | dict(judge))
    for other in data.baselines:
        rows["against"] += [
            {"baseline": other.name, "aspect": aspect} | dict(rates) for aspect, rates in other.aspects.items()
        ]
    return rows if any(rows.values()) else {}


def evaluation_charts(data: ReportData) -> dict[str, Chart | None]:
    """The section's charts by their id; None where there is nothing to draw."""
    charts: dict[str, Chart | None] = dict.fromkeys(("facts", "reliability", "abstention"))
    counted = [item for item in data.rounds if item.evaluated and item.stage("evaluate").metrics.get("facts")]
    if counted:
        charts["facts"] = chart("facts", "Facts an answer by round", _facts(counted))
    rounds = [item for item in data.rounds if _confidence(item)]
    if not rounds:
        return charts
    names = [f"round {item.round}" + (" (base)" if item.round == 0 else "") for item in rounds]
    sources = [source for source in SOURCES if any(source in _confidence(item) for item in rounds)]
    views = {
        f"{place}|{index}": _reliability(_confidence(item)[source])
        for place, source in enumerate(sources)
        for index, item in enumerate(rounds)
        if source in _confidence(item)
    }
    selectors = [("Confidence", [SOURCES[source] for source in sources]), ("Round", names)]
    charts["reliability"] = Chart("reliability", "Reliability", selectors, views, default=next(iter(views)))
    curves = {str(index): _abstention(_confidence(item)) for index, item in enumerate(rounds)}
    charts["abstention"] = Chart("abstention", "Accuracy by coverage", [("Round", names)], curves, default="0")
    return charts


def _confidence(item: RoundReport) -> Mapping[str, Any]:
    return (item.stage("evaluate").metrics.get("confidence") or {}) if item.evaluated else {}


def _facts(rounds: list[RoundReport]) -> go.Figure:
    figure = new_figure("round", "facts an answer", barmode="stack")
    for name, color in (("correct", "var(--good)"), ("incorrect", "var(--bad)"), ("missing", "var(--neutral)")):
        figure.add_bar(
            x=[item.round for item in rounds],
            y=[(item.stage("evaluate").metrics["facts"][name] or [None])[0] for item in rounds],
            name=name,
            marker={"color": color},
            hovertemplate=f"round %{{x}}: %{{y:.2f}} {name}<extra></extra>",
        )
    figure.update_xaxes(dtick=1)
    return figure


def _reliability(made: Mapping[str, Any]) -> go.Figure:
    """Share of right answers against stated confidence, one point a bin, with the line of perfect calibration."""
    bins = made["reliability"]["bins"]
    figure = new_figure("stated confidence", "share of right answers", showlegend=False)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "var(--soft)", "width": 1, "dash": "dot"}, hoverinfo="skip"
    )
    hover = [
        f"{entry['count']:,} answers<br>stated {percent(entry['predicted'])}, right {percent(entry['observed'])}"
        for entry in bins
    ]
    observed = [entry["observed"] for entry in bins]
    figure.add_scatter(
        x=[entry["predicted"] for entry in bins],
        y=observed,
        mode="lines+markers",
        line={"color": "var(--accent)", "width": 2},
        marker={"color": "var(--accent)", "size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [entry["observed_ci"][1] - entry["observed"] for entry in bins],
            "arrayminus": [entry["observed"] - entry["observed_ci"][0] for entry in bins],
            "color": "var(--accent)",
            "thickness": 1.2,
            "width": 4,
        },
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(tickformat=".0%", range=[-0.03, 1.03])
    return figure


def _abstention(sources: Mapping[str, Any]) -> go.Figure:
    """Accuracy of what is still answered against its share, one line a source of confidence."""
    figure = new_figure("share of questions answered", "accuracy of these answers")
    lowest = 1.0
    for index, (source, made) in enumerate(sources.items()):
        curve = made["abstention"]["curve"]
        lowest = min([lowest, *(accuracy for _, accuracy in curve)])
        figure.add_scatter(
            x=[coverage for coverage, _ in curve],
            y=[accuracy for _, accuracy in curve],
            mode="lines",
            name=SOURCES.get(source, source),
            line={"color": SERIES[index % len(SERIES)], "width": 2.2},
            hovertemplate="%{x:.0%} answered: %{y:.1%} right<extra></extra>",
        )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(tickformat=".0%", range=[max(0.0, lowest - 0.08), 1.02])
    return figure
