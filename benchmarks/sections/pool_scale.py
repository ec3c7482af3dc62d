"""How a campaign grows with its pool."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, table

TITLE = "Time and memory against the size of the pool"
COMMAND = "python benchmarks/bench_pool_scale.py"


def section(result: dict[str, Any]) -> Section:
    """Seconds by stage, and memory."""
    sizes = result["sizes"]
    stages = list(sizes[-1]["stages"])
    rows = [[stage, *(figure(size["stages"][stage]["seconds"], 1) for size in sizes)] for stage in stages]
    rows.append(["all", *(figure(size["seconds"], 1) for size in sizes)])
    rows.append(["questions a second", *(f"{size['rows_per_s']:,.0f}" for size in sizes)])
    rows.append(["driver at most, MiB", *(figure(size["peak"]["driver_rss_mib"], 0) for size in sizes)])
    rows.append(["all processes at most, MiB", *(figure(size["peak"]["tree_mib"], 0) for size in sizes)])
    rows.append(["run directory, MiB", *(figure(size["run_dir_mib"], 0) for size in sizes)])
    killed = [size for size in sizes if "killed" in size]
    again = "; ".join(
        f"{size['num_questions']:,} questions: {sum(size['killed']['shards_redone'].values())} of "
        f"{2 * size['killed']['num_shards']} shards made again, results "
        + ("the same" if size["killed"]["same_results"] else "DIFFERENT")
        for size in killed
    )
    text = f"""Does anything grow faster than the pool? Synthetic questions with small states, no model asked,
shards of {result["settings"]["shard_rows"]:,}, {result["settings"]["workers"]} workers; seconds by stage.

{table(["", *(f"{size['num_questions']:,}" for size in sizes)], rows)}

Killed in the middle of `extract` and of `knowledge` and resumed: {again or "not measured"}."""
    curves = {stage: [(size["num_questions"], size["stages"][stage]["seconds"]) for size in sizes] for stage in stages}
    curves["all"] = [(size["num_questions"], size["seconds"]) for size in sizes]
    chart = lines("Seconds by stage and size of the pool", "questions", "seconds", curves, log_x=True, log_y=True)
    return Section(text, {"seconds": chart}, losses(result))


def losses(result: dict[str, Any]) -> list[str]:
    """Where the last further question costs more than those before, and results that a kill changed."""
    found = []
    if len(result["growth"]) > 1:
        before, last = result["growth"][-2], result["growth"][-1]
        slower = [
            f"{stage} by {before['rows_per_s'][stage] / last['rows_per_s'][stage] - 1:.0%}".replace("%", " %")
            for stage in ("all", "pool", "extract", "knowledge", "report")
            if last["rows_per_s"].get(stage, 0) < 0.95 * before["rows_per_s"].get(stage, 0)
        ]
        if slower:
            found.append(
                f"A further question costs more from {last['from']:,} to {last['to']:,} than up to there, in seconds: "
                f"{', '.join(slower)}."
            )
    found += [
        f"A run of {size['num_questions']:,} questions that was killed came to other results."
        for size in result["sizes"]
        if not size.get("killed", {}).get("same_results", True)
    ]
    return found
