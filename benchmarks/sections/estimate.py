"""What `ka2l estimate` predicts of the quickstart."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, percent, table

TITLE = "Estimates: the quickstart"
COMMAND = "python benchmarks/bench_estimate.py quickstart"
NAMES = {
    "tokens_prompt": "prompt tokens",
    "tokens_generated": "generated tokens",
    "forward_passes": "forward passes",
    "annotations": "annotations",
    "seconds": "seconds",
    "cpu_seconds": "CPU-seconds",
    "gpu_seconds": "GPU-seconds",
    "money": "money",
}


def section(result: dict[str, Any]) -> Section:
    """Predicted against measured, in all and by stage."""
    return compared(result, "the quickstart")


def compared(result: dict[str, Any], what: str) -> Section:
    """The same for any run.

    Args:
        what: the run's name in a sentence.
    """
    total = result["total"]
    rows = [
        [
            name,
            figure(total[item]["predicted"], 0),
            f"{figure(total[item]['low'], 0)} to {figure(total[item]['high'], 0)}",
            figure(total[item]["measured"], 0),
            figure(total[item]["ratio"]),
            "yes" if total[item]["in_interval"] else "no",
        ]
        for item, name in NAMES.items()
        if item in total
    ]
    timed = [row for row in result["stages"] if "seconds" in row]
    within = sum(row["seconds"]["in_interval"] for row in timed)
    headers = ["", "predicted", "interval", "measured", "predicted / measured", "in the interval"]
    text = f"""Does `ka2l estimate` predict what {what}
takes?{f" ({result['note']}.)" if result.get("note") else ""}

{table(headers, rows)}

Of {len(timed)} stages of all rounds, the seconds of {within} lie in their interval."""
    return Section(text, {}, losses(result, what))


def losses(result: dict[str, Any], what: str) -> list[str]:
    """What lies outside its interval or, of seconds, more than 5 % off; and the stage that is furthest off."""
    found = []
    for item, name in NAMES.items():
        cost = result["total"].get(item)
        if cost is None or cost["ratio"] is None:
            continue
        off = abs(cost["ratio"] - 1)
        if not cost["in_interval"] or (item == "seconds" and off > 0.05):
            outside = "" if cost["in_interval"] else ", outside the interval"
            found.append(f"The estimate of {what} is off by {percent(off, 1)} in {name}{outside}.")
    timed = [row for row in result["stages"] if "seconds" in row and not row["seconds"]["in_interval"]]
    if timed:
        worst = max(timed, key=lambda row: abs(row["seconds"]["predicted"] - row["seconds"]["measured"]))
        seconds = worst["seconds"]
        found.append(
            f"Of {what}, the estimate of {len(timed)} stages' seconds is outside its interval, most so of "
            f"`{worst['stage']}` in round {worst['round']}: {seconds['predicted']:.0f} s for "
            f"{seconds['measured']:.0f} s."
        )
    return found
