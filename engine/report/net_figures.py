"""Charts of the net saving: learning curves of several runs."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from engine.report.chart import SERIES, error_bars, new_figure, percent, shortened
from engine.report.net import Net
from engine.report.spending import Point


def curves(result: Net, *, by_money: bool) -> go.Figure | None:
    """Accuracy of this run and of its baselines against annotations or total cost; None before any measurement."""
    runs = [(item.name, item.curve) for item in result.baselines if item.curve]
    if not runs and not result.curve:
        return None
    figure = new_figure(f"total cost, {html.escape(result.currency)}" if by_money else "annotations", "accuracy")
    for index, (name, points) in enumerate(runs):
        color = SERIES[1 + index % (len(SERIES) - 1)]
        _add(figure, name, points, color, result.currency, by_money=by_money, is_own=False)
    if result.final is not None:
        _add(figure, "this run", result.curve, "var(--accent)", result.currency, by_money=by_money, is_own=True)
        figure.add_hline(y=result.final.accuracy, line={"color": "var(--accent)", "width": 1.2, "dash": "dot"})
    every = [point for points in (*(points for _, points in runs), result.curve) for point in points]
    right = max(_x(point, by_money) for point in every) or 1
    top = max(point.accuracy_ci[1] if point.accuracy_ci else point.accuracy for point in every)
    figure.update_xaxes(range=[-0.05 * right, 1.06 * right])
    figure.update_yaxes(tickformat=".0%", range=[0, min(1.03, top * 1.08 + 0.02)])
    return figure


def _x(point: Point, by_money: bool) -> float:
    return point.money if by_money else point.annotations


def _add(
    figure: go.Figure,
    name: str,
    points: Sequence[Point],
    color: str,
    currency: str,
    *,
    by_money: bool,
    is_own: bool,
) -> None:
    label = html.escape(shortened(name))
    figure.add_scatter(
        x=[_x(point, by_money) for point in points],
        y=[point.accuracy for point in points],
        mode="lines+markers",
        name=label,
        line={"color": color, "width": 2.8 if is_own else 2, "dash": "solid" if is_own else "dash"},
        marker={"color": color, "size": 9 if is_own else 7},
        error_y=error_bars([point.accuracy for point in points], [point.accuracy_ci for point in points], color),
        customdata=[_hover(label, point, html.escape(currency)) for point in points],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(label: str, point: Point, currency: str) -> str:
    lines = [f"<b>{label}</b>, round {point.round}", f"accuracy {percent(point.accuracy)}"]
    if point.accuracy_ci:
        lines.append(f"95 % CI {percent(point.accuracy_ci[0])} – {percent(point.accuracy_ci[1])}")
    return "<br>".join([*lines, f"annotations {point.annotations:,}", f"total cost {point.money:,.2f} {currency}"])
