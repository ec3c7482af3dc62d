"""Does `ka2l estimate` predict what a run takes?

Estimates a config, runs it, and compares stage by stage and in all: predicted / measured for tokens, forward passes,
annotations, seconds and money, and whether the measured figure lies in the predicted interval.

    python benchmarks/bench_estimate.py quickstart
    python benchmarks/bench_estimate.py quickstart --estimate estimate.json --run runs/quickstart   # both are there
    python benchmarks/bench_estimate.py quickstart --question estimate_real_facts --set testbed.facts=facts.jsonl

A run that was cut off is gone on with. The quickstart takes two minutes to estimate and five to run on two free cores;
estimate and run must have the machine alike, or the seconds say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arms import ka2l, set_options
from machine import write_result

from engine.store.ledger import committed_stages
from engine.store.manifest import add_up
from engine.store.run_directory import RunDirectory

ITEMS = ("tokens_prompt", "tokens_generated", "forward_passes", "annotations", "seconds", "cpu_seconds", "gpu_seconds",
         "money")  # fmt: skip
#: How far a prediction may be off in all, as a share of what was measured.
LIMITS = {"tokens_prompt": 0.1, "tokens_generated": 0.1, "forward_passes": 0.1, "annotations": 0.0, "seconds": 0.3}
POOL = ("questions", "references", "corpus")


def measured(run_dir: Path) -> dict[tuple[int, str], dict[str, float]]:
    """What each stage has taken, by (round, stage); the pool's stages are one of round -1."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for stage in committed_stages(RunDirectory(run_dir)):
        manifest = stage.require()
        key = (-1, "pool") if stage.name in POOL else (int(stage.round_index or 0), stage.name)
        cost = {item: manifest.cost.get(item, 0.0) for item in ITEMS} | {"seconds": manifest.seconds}
        found[key] = add_up([found.get(key, {}), cost])
    return found


def compared(predicted: Mapping[str, Any], taken: Mapping[str, float]) -> dict[str, Any]:
    """Each item as predicted, as measured, their ratio, and whether the interval covers what was measured."""
    result: dict[str, Any] = {}
    for item in ITEMS:
        expected, actual = predicted[item], taken.get(item, 0.0)
        value, low, high = (
            (expected["value"], expected["low"], expected["high"]) if isinstance(expected, dict) else [expected] * 3
        )
        if value or actual:
            ratio = round(value / actual, 3) if actual else None
            covered = low - 1e-6 <= actual <= high + 1e-6
            result[item] = {"predicted": round(value, 2), "low": round(low, 2), "high": round(high, 2),
                            "measured": round(actual, 2), "ratio": ratio, "in_interval": covered}  # fmt: skip
    return result


def comparison(estimate: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Stage by stage, round by round and in all."""
    taken = measured(run_dir)
    stages = [
        {"round": row["round_index"], "stage": row["stage"]}
        | compared(row, taken.get((row["round_index"], row["stage"]), {}))
        for row in estimate["stages"]
    ]
    rounds = [
        {"round": row["round_index"]}
        | compared(row, add_up(cost for (index, _), cost in taken.items() if index == row["round_index"]))
        for row in estimate["rounds"]
    ]
    everything = compared(estimate["total"], add_up(taken.values()))
    foreseen = {(row["round_index"], row["stage"]) for row in estimate["stages"]}
    within = {item: abs(everything[item]["ratio"] - 1) <= limit for item, limit in LIMITS.items() if item in everything}
    return {
        "total": everything,
        "limits": LIMITS,
        "within_limits": within,
        "not_foreseen": sorted(f"round {index} {name}" for index, name in taken.keys() - foreseen),
        "rounds": rounds,
        "stages": stages,
    }


def main() -> None:
    """Parse arguments, estimate, run, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="preset or file, as for `ka2l run`")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="as for `ka2l run`")
    parser.add_argument("--estimate", type=Path, help="what `ka2l estimate --json` wrote; made where not given")
    parser.add_argument("--run", type=Path, help="run directory; runs/bench_estimate where not given")
    parser.add_argument("--note", help="what else the machine did, for the result file")
    parser.add_argument("--question", default="estimate", help="folder of benchmarks/results (default: %(default)s)")
    parser.add_argument("--out", help="result file; in benchmarks/results/QUESTION where not given")
    arguments = parser.parse_args()
    options = set_options(arguments.overrides)
    run_dir = arguments.run or Path("runs/bench_estimate")
    estimate = arguments.estimate or run_dir.with_name(f"{run_dir.name}.estimate.json")
    if not estimate.exists():
        estimate.parent.mkdir(parents=True, exist_ok=True)
        ka2l("estimate", arguments.config, *options, "--json", str(estimate))
    if not (run_dir / "config.yaml").exists():
        ka2l("run", arguments.config, *options, "--run-dir", str(run_dir))
    summary = run_dir / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "complete":
        ka2l("resume", str(run_dir))
    result = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "note": arguments.note,
        "load_average_at_the_end": os.getloadavg(),
    } | comparison(json.loads(estimate.read_text()), run_dir)
    path = write_result(arguments.question, result, arguments.out)
    for row in [*result["stages"], result["total"]]:
        seconds = row.get("seconds", {})
        print(row.get("round", ""), row.get("stage", "all"), seconds.get("predicted"), seconds.get("measured"),
              {item: row[item]["ratio"] for item in ITEMS if item in row})  # fmt: skip
    print(f"within limits: {result['within_limits']}; written: {path}")


if __name__ == "__main__":
    main()
