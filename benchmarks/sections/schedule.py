"""How well a benchmark fills its GPUs, by a model."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, percent, table

TITLE = "How well many runs fill many GPUs (modelled)"
COMMAND = "python benchmarks/bench_schedule.py"
LIMITS = {"all_work_s": "all work by all GPUs", "longest_chain_s": "the longest chain of stages"}


def section(result: dict[str, Any]) -> Section:
    """Makespan against what no schedule can beat."""
    rows = [
        [gpus, figure(found["makespan_s"] / 3600, 1), figure(found[found["limited_by"]] / 3600, 1),
         figure(found["bound_over_makespan"], 2), LIMITS.get(found["limited_by"], found["limited_by"]),
         percent(found["busy_share"])]
        for gpus, found in result["by_num_gpus"].items()
    ]  # fmt: skip
    headers = ["GPUs", "makespan, h", "bound, h", "bound / makespan", "the bound is", "GPUs busy"]
    text = f"""How well would {result["num_cells"]} cells (models x data sets x seeds) fill a cluster? A
discrete-event model with the real queue and modelled stages: no GPU was used. The bound is what no schedule can
beat.

{table(headers, rows)}"""
    losses = [
        f"Modelled, a benchmark on {gpus} GPUs takes {1 / found['bound_over_makespan']:.2f} times what no schedule "
        "can beat"
        + (
            f", and {percent(1 - found['busy_share'])} of the GPUs' time idles: there are more GPUs than the longest "
            "chain of stages lets work."
            if found["limited_by"] == "longest_chain_s"
            else f"; {percent(1 - found['busy_share'])} of the GPUs' time idles."
        )
        for gpus, found in result["by_num_gpus"].items()
        if found["bound_over_makespan"] < 0.95
    ]
    return Section(text, {}, losses)
