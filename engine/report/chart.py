"""The style that all charts share: axes, error bars, labels. Colours are CSS variables that the page resolves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

SERIES = tuple(f"var(--series-{index})" for index in range(9))
_MAX_LABEL = 36
NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Chart:
    """One chart of the page: a figure for every combination of its selectors."""

    key: str
    """Element id."""
    label: str
    """What a screen reader says."""
    selectors: list[tuple[str, list[str]]]
    """(name, options) of each drop-down list; empty where there is one figure."""
    views: dict[str, go.Figure]
    """By option numbers joined with a bar: ``0|2``; ``""`` without selectors."""
    default: str = ""


def chart(key: str, label: str, figure: go.Figure) -> Chart:
    """A chart without selectors."""
    return Chart(key, label, [], {"": figure})


def new_figure(x_title: str, y_title: str, height: int = 340, **layout: Any) -> go.Figure:
    """An empty figure in the page's style."""
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zerolinecolor": "var(--grid)",
        "tickfont": {"size": 12},
        "title": {"font": {"size": 12}, "standoff": 8},
        "automargin": True,
        "fixedrange": False,
    }
    figure = go.Figure()
    figure.update_layout(
        template=None,
        height=height,
        margin={"l": 8, "r": 14, "t": 34, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "var(--soft)"},
        hoverlabel={
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {"size": 12, "color": "var(--ink)"},
            "align": "left",
        },
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 12},
            "traceorder": "normal",
        },
        hovermode="closest",
        dragmode=False,
        bargap=0.28,
        xaxis={**axis, "showgrid": False, "zeroline": False},
        yaxis=axis,
    )
    figure.update_layout(xaxis_title_text=x_title, yaxis_title_text=y_title, **layout)
    return figure


def percent(value: float | None, digits: int = 1) -> str:
    """``84.2 %``; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}{NBSP}%"


def error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None], color: str) -> dict[str, Any]:
    """Asymmetric error bars; none where an interval is missing."""
    pairs = [(value, pair or (value, value)) for value, pair in zip(values, intervals, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(pair[1] - value, 0.0) for value, pair in pairs],
        "arrayminus": [max(value - pair[0], 0.0) for value, pair in pairs],
        "color": color,
        "thickness": 1.4,
        "width": 5,
    }


def shortened(text: str) -> str:
    """Cut to what fits on an axis; escape it afterwards."""
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
