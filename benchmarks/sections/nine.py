"""Nine models at once on one machine."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, mean, table

TITLE = "Nine models at once on one machine"
COMMAND = "python benchmarks/bench_nine.py"


def section(result: dict[str, Any]) -> Section:
    """Together against one after the other."""
    cells = result["by_cell"]
    rows = [
        [name, figure(cell["alone_s"], 0), figure(cell["together_s"], 0), figure(cell["alone_peak_pss_gib"], 1),
         *(figure(accuracy, 2) for accuracy in (cell["accuracy"][0], cell["accuracy"][-1]))]
        for name, cell in cells.items()
    ]  # fmt: skip
    headers = ["architecture", "alone, s", "together, s", "alone, GiB", "accuracy before", "after"]
    alone = max(cell["alone_peak_pss_gib"] for cell in cells.values())
    text = f"""Does a benchmark of tiny models of nine architectures complete on one machine, and what does it
save to run them together? {result["num_complete"]} of {result["num_cells"]} completed, at most
{result["most_cells_at_once"]} under way at once. All together took {result["makespan_s"]:.0f} s, one after the
other {result["sum_alone_s"]:.0f} s; memory peaked at {result["peak_pss_gib"]:.1f} GiB together and {alone:.1f}
GiB alone.

{table(headers, rows)}"""
    losses = []
    if result["makespan_s"] > result["makespan_modelled_s"]:
        losses.append(
            f"Nine models at once took {result['makespan_s']:.0f} s, where the same queue replayed with each stage "
            f"as fast as alone comes to {result['makespan_modelled_s']:.0f} s: nine drivers and Ray share the cores "
            "with the work."
        )
    slower = mean(cell["together_s"] / cell["alone_s"] for cell in cells.values())
    if slower > 1:
        losses.append(
            f"A model run with eight others is done {slower:.1f} times as late as alone: the cores are shared, and "
            "only the sum is shorter."
        )
    if result["num_complete"] < result["num_cells"]:
        losses.append(
            f"{result['num_cells'] - result['num_complete']} of {result['num_cells']} models did not complete."
        )
    return Section(text, {}, losses)
