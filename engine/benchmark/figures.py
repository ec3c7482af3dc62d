"""Charts of a benchmark's report: learning curves side by side, agreement between models."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from engine.benchmark.data import Agreement, BenchmarkData, Combination, Pair
from engine.report.chart import SERIES, Chart, chart, new_figure, percent, shortened

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "hexagon")
_KAPPA = "Cohen's kappa"
#: What a heat map can show of a pair, and the range of its colours.
_MEASURES: dict[str, tuple[Callable[[Pair], float | None], tuple[float, float]]] = {
    _KAPPA: (lambda pair: pair.kappa, (-1.0, 1.0)),
    "both know": (lambda pair: pair.both_known, (0.0, 1.0)),
    "neither knows": (lambda pair: pair.both_unknown, (0.0, 1.0)),
    "they differ": (lambda pair: pair.differ, (0.0, 1.0)),
}


def color(data: BenchmarkData, model: str) -> str:
    """A model's colour, the same in every chart."""
    return SERIES[data.models.index(model) % len(SERIES)]


def curves(data: BenchmarkData) -> list[Chart]:
    """Accuracy over annotations, a chart for each data set and strategy that has a measurement, a line a model.

    All charts share their axis of accuracy, so that they can be compared.
    """
    drawn = [item for item in data.combinations if item.curve]
    top = max((point.high for item in drawn for point in item.curve), default=1.0)
    charts: list[Chart] = []
    for place in dict.fromkeys((item.data, item.strategy) for item in drawn):
        lines = [item for item in drawn if (item.data, item.strategy) == place]
        title = place[0] if len(data.strategies) == 1 else f"{place[0]}, {place[1]}"
        charts.append(chart(f"curve-{len(charts)}", title, _curves(data, lines, top)))
    return charts


def _curves(data: BenchmarkData, lines: Sequence[Combination], top: float) -> go.Figure:
    figure = new_figure("annotations", "accuracy", height=300, showlegend=False)
    figure.update_layout(margin_t=12)
    for item in lines:
        own = color(data, item.model)
        several = any(point.num_seeds > 1 for point in item.curve)
        figure.add_scatter(
            x=[point.num_annotated for point in item.curve],
            y=[point.accuracy for point in item.curve],
            mode="lines+markers",
            name=html.escape(item.model),
            line={"color": own, "width": 2.2},
            marker={"color": own, "size": 7, "symbol": _SYMBOLS[data.models.index(item.model) % len(_SYMBOLS)]},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [point.high - point.accuracy for point in item.curve],
                "arrayminus": [point.accuracy - point.low for point in item.curve],
                "color": own,
                "thickness": 1.2,
                "width": 4,
            }
            if several
            else None,
            customdata=[_hover(data, item, index) for index in range(len(item.curve))],
            hovertemplate="%{customdata}<extra></extra>",
        )
    right = max(1.0, *(point.num_annotated for item in lines for point in item.curve))
    figure.update_xaxes(range=[-0.05 * right, 1.06 * right])
    figure.update_yaxes(tickformat=".0%", range=[-0.03 * top, min(1.03, top * 1.1 + 0.02)])
    return figure


def _hover(data: BenchmarkData, item: Combination, index: int) -> str:
    point = item.curve[index]
    lines = [f"<b>{html.escape(item.model)}</b>, round {point.round}", f"accuracy {percent(point.accuracy)}"]
    if point.num_seeds > 1:
        lines.append(f"{point.num_seeds} seeds: {percent(point.low)} – {percent(point.high)}")
    else:
        intervals = [
            measured.accuracy_ci
            for cell in data.cells
            if (cell.model, cell.data, cell.strategy) == (item.model, item.data, item.strategy)
            for measured in cell.curve
            if measured.round == point.round and measured.accuracy == point.accuracy and measured.accuracy_ci
        ]
        lines += [f"95 % CI {percent(low)} – {percent(high)}" for low, high in intervals[:1]]
    return "<br>".join([*lines, f"annotations {point.num_annotated:,.0f}"])


def heat_map(data: BenchmarkData) -> Chart | None:
    """Agreement of each pair of models, by data set and measure; None where no data set has two maps."""
    if not data.agreement:
        return None
    views = {
        f"{row}|{column}": _heat_map(item, measure)
        for row, item in enumerate(data.agreement)
        for column, measure in enumerate(_MEASURES)
    }
    selectors = [("Data set", [item.data for item in data.agreement]), ("Show", list(_MEASURES))]
    return Chart("agreement", "Agreement between the models' knowledge maps", selectors, views, default="0|0")


def _heat_map(item: Agreement, measure: str) -> go.Figure:
    value_of, limits = _MEASURES[measure]
    names = list(item.maps)
    pairs = {frozenset((pair.first, pair.second)): pair for pair in item.pairs}
    values = [[_value(pairs, value_of, row, column) for column in names] for row in names]
    texts = [[_text(value, measure) for value in row] for row in values]
    hover = [[_pair_hover(pairs.get(frozenset((row, column)))) for column in names] for row in names]
    labels = [html.escape(shortened(name)) for name in names]
    places = list(range(len(names)))
    figure = new_figure("", "", height=130 + 44 * len(names))
    low = "var(--unknown)" if measure == _KAPPA else "var(--card)"
    figure.add_heatmap(
        z=values,
        x=places,
        y=places,
        zmin=limits[0],
        zmax=limits[1],
        colorscale=[[0, low], [0.5, "var(--card)"], [1, "var(--known)"]]
        if measure == _KAPPA
        else [[0, low], [1, "var(--known)"]],
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 12, "color": "var(--ink)"},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        colorbar={"thickness": 12, "outlinewidth": 0, "len": 0.9, "tickformat": ".1f" if measure == _KAPPA else ".0%"},
    )
    axis = {"tickmode": "array", "tickvals": places, "ticktext": labels, "showgrid": False, "zeroline": False}
    figure.update_xaxes(**axis, tickangle=-35, linewidth=0)
    figure.update_yaxes(**axis, autorange="reversed")
    figure.update_layout(margin_t=10)
    return figure


def _value(
    pairs: dict[frozenset[str], Pair], value_of: Callable[[Pair], float | None], row: str, column: str
) -> float | None:
    pair = pairs.get(frozenset((row, column)))
    return None if pair is None else value_of(pair)


def _text(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.2f}".replace("-", "−") if measure == _KAPPA else percent(value, 0)


def _pair_hover(pair: Pair | None) -> str:
    if pair is None:
        return ""
    kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.3f}"
    return (
        f"<b>{html.escape(pair.first)}</b> and <b>{html.escape(pair.second)}</b><br>kappa {kappa}"
        f"<br>both know {percent(pair.both_known)}<br>neither knows {percent(pair.both_unknown)}"
        f"<br>they differ on {percent(pair.differ)}"
    )
