"""Where the model is sure and wrong."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, interval, mean, table

TITLE = "Sure and wrong: the second axis"
COMMAND = "python benchmarks/bench_axes.py --seeds 0 1 2"
ARMS = {"probe": "`probe`, three rounds", "one_round": "`probe`, one round", "two_axis": "`two_axis`, three rounds"}


def section(result: dict[str, Any]) -> Section:
    """Facts learnt wrongly that were found, and accuracy."""
    seeds = [result["by_seed"][seed] for seed in sorted(result["by_seed"], key=int)]
    compared = result["comparison"]
    rows = [
        [
            name,
            ", ".join(str(run[arm]["found"][-1]) for run in seeds),
            figure(mean(run[arm]["accuracy"][-1] for run in seeds)),
            figure(mean(run[arm]["seconds"] for run in seeds), 0),
        ]
        for arm, name in ARMS.items()
    ]
    wrong = ", ".join(str(run["probe"]["num_learnt_wrongly"]) for run in seeds)
    differences = table(
        ["final accuracy, paired over eval questions", "difference"],
        [
            [name, interval(compared[key]["mean"], compared[key]["ci"], sign=True)]
            for key, name in (
                ("two_axis_minus_probe", "`two_axis` less `probe`"),
                ("two_axis_minus_one_round", "`two_axis` less `probe` in one round"),
                ("probe_minus_one_round", "`probe` less `probe` in one round"),
            )
        ],
    )
    text = f"""Does asking where the model may be sure and wrong pay? {len(seeds)} testbeds that have learnt
{wrong} facts wrongly, {seeds[0]["probe"]["num_annotated"]} annotations; found: candidates of such facts that
were annotated, by testbed.

{table(["strategy", "found", "accuracy", "seconds"], rows)}

{differences}"""
    curves = {}
    for arm in ("probe", "two_axis"):
        by_round = list(zip(*(run[arm]["accuracy"] for run in seeds), strict=True))
        step = seeds[0][arm]["num_annotated"] / (len(by_round) - 1)
        curves[arm] = [(step * at, mean(found), min(found), max(found)) for at, found in enumerate(by_round)]
    chart = lines("Accuracy by annotations, mean and range over testbeds", "annotations", "accuracy", curves)
    return Section(text, {"accuracy": chart}, losses(curves, compared))


def losses(curves: dict[str, list[tuple[float, ...]]], compared: dict[str, Any]) -> list[str]:
    """Where the second axis is behind on the way, or in the end."""
    behind = [
        f"{mine[1]:.3f} against {other[1]:.3f} after {mine[0]:.0f} annotations"
        for mine, other in zip(curves["two_axis"], curves["probe"], strict=True)
        if mine[1] < other[1]
    ]
    found = []
    if behind:
        found.append(
            f"`two_axis` is behind `probe` on the way: {', '.join(behind)}. What it explores among what looks known "
            "mostly is known; that is the price of finding what was learnt wrongly."
        )
    rounds = compared["probe_minus_one_round"]
    if rounds["ci"][0] <= 0:
        found.append(
            "Where facts were learnt wrongly, three rounds by `probe` are not shown to be better than one: "
            f"{interval(rounds['mean'], rounds['ci'], sign=True)} in accuracy, since entropy does not show these facts "
            "in any round."
        )
    return found
