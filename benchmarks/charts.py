"""Charts as SVG text: the same figures give the same bytes, so that a page can be checked against its results.

A white ground keeps them readable on dark pages. Colours are Okabe and Ito's, which colour-blind readers can tell
apart (https://jfly.uni-koeln.de/color/), and every line has a marker of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
#: More than eight lines take the colours again, dashed.
DASHES = ("-", "--", ":")
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, and searchable
    "svg.hashsalt": "ka2l",  # else ids in the file are random
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """A line for each name, with a shaded band where its points have an interval.

    Args:
        series: name -> points (x, y) or (x, y, low, high).
        log_x, log_y: logarithmic axes.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(title, 7.2, 4.2)
        for index, (name, points) in enumerate(series.items()):
            colour = COLOURS[index % len(COLOURS)]
            x = [point[0] for point in points]
            y = [point[1] for point in points]
            dashes = DASHES[index // len(COLOURS) % len(DASHES)]
            axes.plot(x, y, dashes, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5, label=name)
            band = [point for point in points if len(point) == 4 and None not in point]
            if band:
                x, _, low, high = zip(*band, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        if len(series) > 1:
            # Beside the lines: a legend among them hides what it explains.
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return _svg(figure)


def bars(title: str, y_label: str, values: Mapping[str, Sequence[float | None]], *, log: bool = False) -> str:
    """A bar for each name with its value, and a whisker where it has an interval; bars lie, so that names have room.

    Args:
        y_label: what is measured, with its unit.
        values: name -> (value, low, high); low and high None, or (value,), where there is no interval.
        log: a logarithmic axis.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(title, 7.2, 1.1 + 0.36 * len(values))
        for index, (value, *interval) in enumerate(values.values()):
            axes.barh(index, value, color=COLOURS[0], height=0.62)
            end = value
            if len(interval) == 2 and None not in interval:
                low, high = interval
                # No errorbar: it refuses an interval that its value lies outside of.
                axes.plot((low, high), (index, index), color="#333333", marker="|", markersize=7)
                end = max(value, high) if value >= 0 else min(value, low)
            axes.annotate(_number(value), (end, index), xytext=(5 if value >= 0 else -5, 0),
                          textcoords="offset points", va="center", ha="left" if value >= 0 else "right")  # fmt: skip
        axes.set_yticks(range(len(values)), [fill(name, 38) for name in values])
        axes.invert_yaxis()
        if not log:
            axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_xlabel(y_label)
        axes.grid(visible=False, axis="y")
        if log:
            axes.set_xscale("log")
        else:
            axes.margins(x=0.2 if any(value < 0 for value, *_ in values.values()) else 0.14)  # room for figures
        return _svg(figure)


def points(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A cloud of points (x, y) for each name."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(title, 7.2, 4.2)
        for index, (name, rows) in enumerate(series.items()):
            x, y = zip(*rows, strict=True) if rows else ((), ())
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.plot(x, y, linestyle="", markersize=3.5, alpha=0.6, label=name, **style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return _svg(figure)


def _axes(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, inches; no pyplot, so nothing is kept between charts."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(fill(title, 90), x=0.01, ha="left", fontsize=11)
    return figure, figure.add_subplot()


def _number(value: float) -> str:
    """Three digits or so, without an exponent."""
    return f"{value:,.{3 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _svg(figure: Figure) -> str:
    text = StringIO()
    # Neither day nor version: a chart is new only where its figures are.
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
