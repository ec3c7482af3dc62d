"""Campaigns whose processes are killed."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, mean, percent, table

TITLE = "Faults at random times"
COMMAND = "python benchmarks/bench_chaos.py --faults 100 --seed 0"
KINDS = {
    "worker": "an engine's worker killed",
    "driver": "the driver killed",
    "raylet": "a raylet killed",
    "node": "a node killed",
    "trainer": "a training worker killed",
    "storage": "writes fail, then succeed again",
    "storm": "writes fail again and again",
    "hang": "a worker hangs",
}


def section(result: dict[str, Any]) -> Section:
    """How many faults of which kind, and what became of the runs."""
    kinds = sorted(result["faults"].items(), key=lambda item: -item[1])
    bad, orphans = result["num_runs_with_problems"], result["orphans"]
    left = "not looked at" if orphans is None else str(len(orphans))
    seconds = [trial["seconds"] for trial in result["trials"]]
    struck = ", ".join(f"{name} {number}" for name, number in sorted(result["stages_struck"].items()))
    text = f"""Does a campaign come to the same tables and adapters whatever happens to it? {result["num_runs"]}
small campaigns, {result["num_faults"]} faults; a driver that ended was followed by `ka2l resume`,
{result["num_resumed"]} times.

{table(["fault", "times"], [[KINDS.get(kind, kind), number] for kind, number in kinds])}

Runs with another result than an undisturbed one, or that paid twice or left something behind: {bad}. Processes
left: {left}. Faults by the stage they struck: {struck}. A run took {mean(seconds):.0f} s on average,
{min(seconds):.0f} to {max(seconds):.0f} s; undisturbed {result["undisturbed_s"]:.0f} s."""
    faults = result["num_faults"] / result["num_runs"]
    losses = [
        f"With {faults:.1f} faults a run, campaigns take {figure(mean(seconds) / result['undisturbed_s'], 1)} times "
        "as long as undisturbed: Ray and engines start again, and what was not committed is made again."
    ]
    if bad:
        losses.append(f"{percent(bad / result['num_runs'])} of the campaigns under faults had problems.")
    return Section(text, {}, losses)
