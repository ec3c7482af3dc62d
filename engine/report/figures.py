"""The report's figures: plain values in, Plotly figures out. Colours are CSS variables that the page resolves.

Text from data is escaped here too: Plotly reads labels and hover texts as a subset of HTML.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from engine.report.chart import SERIES, error_bars, new_figure, percent, shortened
from engine.report.data import GroupShare, ReportData, RoundReport, StatePoints, finite, forgetting


def learning_curve(data: ReportData) -> go.Figure | None:
    """Accuracy with its CI against annotations, and the base as a line; None before the first measurement."""
    rounds = data.measured()
    if not rounds:
        return None
    values = [item.stage("cluster").metrics["accuracy"] for item in rounds]
    intervals = [item.stage("cluster").interval("accuracy_ci") for item in rounds]
    hover = []
    for item, value in zip(rounds, values, strict=True):
        cluster = item.stage("cluster")
        lines = [f"<b>round {item.round}</b>", f"accuracy {percent(value)}"]
        if interval := cluster.interval("accuracy_ci"):
            lines.append(f"95 % CI {percent(interval[0])} – {percent(interval[1])}")
        lines.append(f"annotations {data.annotated_before(item.round):,}")
        for name, title in (("exact_match", "exact match"), ("token_f1", "token F1")):
            if cluster.number(name) is not None:
                lines.append(f"{title} {percent(cluster.number(name))}")
        if forgetting(item) is not None:
            lines.append(f"forgotten {percent(forgetting(item))} of what the base got right")
        hover.append("<br>".join(lines))
    figure = new_figure("annotations", "accuracy on eval questions", showlegend=False)
    figure.add_scatter(
        x=[data.annotated_before(item.round) for item in rounds],
        y=values,
        mode="lines+markers",
        line={"color": "var(--accent)", "width": 2.5},
        marker={"color": "var(--accent)", "size": 9},
        error_y=error_bars(values, intervals, "var(--accent)"),
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.add_hline(
        y=values[0],
        line={"color": "var(--soft)", "width": 1.2, "dash": "dot"},
        annotation_text=f"base {percent(values[0])}" if rounds[0].round == 0 else "",
        annotation_position="bottom right",
    )
    top = max([*values, *(interval[1] for interval in intervals if interval)])
    right = max(data.annotated_before(rounds[-1].round), 1)
    figure.update_xaxes(range=[-0.06 * right, 1.08 * right])
    figure.update_yaxes(tickformat=".0%", range=[0, min(1.02, top * 1.12 + 0.02)])
    return figure


def transitions(data: ReportData) -> go.Figure | None:
    """Eval questions of each round by what became of them since the base; None without two graded rounds."""
    rounds = [item for item in data.rounds if item.transitions]
    if len(rounds) < 2:
        return None
    figure = new_figure("round", "eval questions", barmode="stack")
    for name, label, color in (
        ("kept", "kept right", "var(--known)"),
        ("learned", "learned", "var(--good)"),
        ("forgotten", "forgotten", "var(--bad)"),
        ("still_wrong", "still wrong", "var(--neutral)"),
    ):
        figure.add_bar(
            x=[item.round for item in rounds],
            y=[getattr(item.transitions, name) for item in rounds],
            name=label,
            marker={"color": color},
            hovertemplate=f"round %{{x}}: %{{y:,}} {label}<extra></extra>",
        )
    figure.update_xaxes(dtick=1)
    return figure


def probe_layers(data: ReportData) -> go.Figure | None:
    """Test AUROC of the probe at every layer, one line a round, the chosen layer marked; None without a sweep."""
    rounds = [item for item in data.probed() if item.stage("probe").metrics.get("by_layer")]
    if not rounds:
        return None
    figure = new_figure("layer", "AUROC, test split")
    for index, item in enumerate(rounds):
        color = SERIES[index % len(SERIES)]
        sweep = [row for row in item.stage("probe").metrics["by_layer"] if finite(row.get("test_auroc")) is not None]
        chosen = item.stage("probe").number("layer")
        figure.add_scatter(
            x=[row["layer"] for row in sweep],
            y=[row["test_auroc"] for row in sweep],
            mode="lines+markers",
            name=f"round {item.round}",
            line={"color": color, "width": 2},
            marker={
                "color": color,
                "size": [13 if row["layer"] == chosen else 5 for row in sweep],
                "symbol": ["star" if row["layer"] == chosen else "circle" for row in sweep],
                "line": {"width": 0},
            },
            customdata=[_digits(row.get("validation_auroc")) for row in sweep],
            hovertemplate=f"round {item.round}, layer %{{x}}<br>test %{{y:.3f}}<br>validation %{{customdata}}"
            "<extra></extra>",
        )
    _chance(figure)
    return figure


def probe_rounds(data: ReportData) -> go.Figure | None:
    """AUROC by round with CIs: the probe's, and the score's for "answers wrongly"; None before the first probe."""
    series = (
        ("probe", "auroc", "unknown, test questions", "var(--accent)", -0.03),
        ("knowledge", "auroc_wrong", "answers wrongly, not annotated", "var(--unknown)", 0.03),
    )
    figure = new_figure("round", "AUROC")
    for stage, name, label, color, shift in series:
        rounds = [item for item in data.rounds if item.stage(stage).number(name) is not None]
        values = [item.stage(stage).metrics[name] for item in rounds]
        intervals = [item.stage(stage).interval(f"{name}_ci") for item in rounds]
        if not values:
            continue
        hover = [
            f"round {item.round}, {label}<br>{_digits(value)}" + (f" ({pair[0]:.3f} – {pair[1]:.3f})" if pair else "")
            for item, value, pair in zip(rounds, values, intervals, strict=True)
        ]
        figure.add_scatter(
            x=[item.round + shift for item in rounds],
            y=values,
            mode="lines+markers",
            name=label,
            line={"color": color, "width": 2},
            marker={"color": color, "size": 8},
            error_y=error_bars(values, intervals, color),
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    if not figure.data:
        return None
    _chance(figure)
    shown = [item.round for item in data.rounds if item.stages.keys() & {"probe", "knowledge"}]
    figure.update_xaxes(dtick=1, range=[min(shown) - 0.4, max(shown) + 0.4])
    return figure


def _chance(figure: go.Figure) -> None:
    """A line at one half, and an axis that shows it whatever the values."""
    lowest = min((value for trace in figure.data for value in trace.y), default=0.5)
    figure.add_hline(
        y=0.5,
        line={"color": "var(--soft)", "width": 1, "dash": "dot"},
        annotation_text="chance",
        annotation_position="bottom right",
    )
    figure.update_yaxes(range=[max(0.0, min(0.44, lowest - 0.1)), 1.02])


def entropy_histogram(item: RoundReport) -> go.Figure | None:
    """Semantic entropy of the seed questions, split at the fitted threshold; None without entropies."""
    entropy = item.entropy[np.isfinite(item.entropy)]
    if not len(entropy):
        return None
    threshold = item.stage("label").number("threshold")
    edges = np.linspace(0.0, max(float(entropy.max()), threshold or 0.0, 1e-3) * 1.001, 29)
    centres = ((edges[1:] + edges[:-1]) / 2).round(4)
    unknown = entropy >= (np.inf if threshold is None else threshold)
    figure = new_figure("semantic entropy, nats", "seed questions", barmode="stack", bargap=0.08)
    names = ("below the threshold: known", "at or above: unknown") if threshold is not None else ("seed questions", "")
    for mask, name, color in ((~unknown, names[0], "var(--known)"), (unknown, names[1], "var(--unknown)")):
        if not mask.any():
            continue
        figure.add_bar(
            x=centres,
            y=np.histogram(entropy[mask], edges)[0],
            name=name,
            marker={"color": color},
            hovertemplate="about %{x:.2f} nats: %{y:,} questions<extra></extra>",
        )
    if threshold is not None:
        figure.add_vline(
            x=threshold,
            line={"color": "var(--ink)", "width": 1.4, "dash": "dash"},
            annotation_text=f"threshold {threshold:.2f}",
            annotation_position="top",
            annotation_font_color="var(--ink)",
        )
        figure.update_layout(margin_t=56, legend_y=1.1)
    return figure


def states(points: StatePoints) -> go.Figure:
    """The states in the plane of two principal components, known against unknown."""
    figure = new_figure("first principal component", "second principal component", height=460, dragmode="zoom")
    unknown = points.p_unknown >= 0.5
    for mask, name, color in ((~unknown, "known", "var(--known)"), (unknown, "unknown", "var(--unknown)")):
        chosen = np.flatnonzero(mask)
        figure.add_scatter(
            x=points.pca[chosen, 0].astype(np.float32),
            y=points.pca[chosen, 1].astype(np.float32),
            mode="markers",
            name=name,
            marker={"color": color, "size": 5.5, "opacity": 0.62},
            text=[_wrapped(points.questions[index]) for index in chosen],
            customdata=points.p_unknown[chosen].astype(np.float32),
            hovertemplate="%{text}<br>P(unknown) %{customdata:.2f}<extra></extra>",
        )
    figure.update_yaxes(zeroline=False)
    return figure


def groups(shares: Sequence[GroupShare]) -> go.Figure:
    """Known and unknown questions of each value of one metadata column, in the order given (first on top)."""
    figure = new_figure("share of questions", "", height=96 + 30 * len(shares), barmode="stack", bargap=0.32)
    # A category axis merges equal labels: keep cut labels apart with their position as the category's key.
    keys = [str(index) for index in range(len(shares))]
    labels = [html.escape(shortened(share.value)) for share in shares]
    rates = [share.num_unknown / share.num_questions for share in shares]
    hover = [
        f"<b>{_wrapped(share.value)}</b><br>{share.num_questions:,} questions, {percent(rate)} unknown"
        f"<br>mean P(unknown) {share.mean_p_unknown:.2f}"
        for share, rate in zip(shares, rates, strict=True)
    ]
    for name, values, color in (
        ("unknown", rates, "var(--unknown)"),
        ("known", [1 - rate for rate in rates], "var(--known)"),
    ):
        figure.add_bar(
            x=np.round(values, 4),
            y=keys,
            orientation="h",
            name=name,
            marker={"color": color},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_scatter(
        x=[round(share.mean_p_unknown, 4) for share in shares],
        y=keys,
        mode="markers",
        name="mean P(unknown)",
        marker={"symbol": "diamond", "size": 9, "color": "var(--card)", "line": {"color": "var(--ink)", "width": 1.5}},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.004])
    figure.update_yaxes(
        type="category", tickmode="array", tickvals=keys, ticktext=labels, autorange="reversed", showgrid=False
    )
    return figure


def _digits(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.3f}"


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(textwrap.shorten(text, 200, placeholder=" …"), 56) or ["(empty)"]
    return "<br>".join(html.escape(line) for line in lines)
