"""Does asking where the model is sure and wrong pay? Three arms on a testbed that has learnt some facts wrongly.

    probe      3 rounds of 250, by the evidence for unknown
    two_axis   3 rounds of 250, by the probability of being wrong, up to a fifth of each round but the last explored:
               the default
    one_round  the same 750 annotations in one round, by the evidence for unknown: before the first annotation there is
               no second axis

The testbed: 20 % of the people strangers, 20 % partly known, the others well known; of what the well known do for a
living, their employer, 70 % was learnt wrongly. Counted are candidates of such facts that were annotated, by round.
Takes about 15 minutes a seed on two cores.

    python benchmarks/bench_axes.py --seeds 0 1 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from arms import WITHOUT_DECODER, run_arm, seeded_parser
from machine import write_result

from engine.config import load_config
from engine.inputs import cache_dir
from engine.store.run_directory import RunDirectory
from ka2l.evaluation.statistics import mean_with_ci
from ka2l.testbed.build import cached_testbed

COMMON = [
    *WITHOUT_DECODER,
    "testbed.stranger_share=0.2",
    "testbed.partly_share=0.2",
    "testbed.wrong_share=0.7",
    "testbed.wrong_relations=[employer]",
    # More well-known facts than in the quickstart take more steps to learn.
    "testbed.num_steps=600",
]
ARMS: dict[str, list[str]] = {
    "probe": ["selection.kind=probe"],
    "two_axis": [],
    "one_round": ["rounds=1", "selection.budget=750"],
}


def grades(folder: Path, round_index: int) -> dict[str, bool]:
    """Whether each eval question was answered right."""
    table = RunDirectory(folder).stage("cluster", round_index).table(["question_id", "purpose", "correct"])
    return {row["question_id"]: row["correct"] for row in table.to_pylist() if row["purpose"] == "eval"}


def digest(folder: Path, learnt_wrongly: set[str]) -> dict[str, Any]:
    """The figures that are compared.

    Args:
        learnt_wrongly: candidate questions about facts that the model was taught wrongly.
    """
    summary = json.loads((folder / "summary.json").read_text())
    found, num_found = [], 0
    for index in range(len(summary["rounds"]) - 1):
        asked = RunDirectory(folder).stage("annotate", index).table(["question_id"])["question_id"]
        num_found += len(learnt_wrongly & set(asked.to_pylist()))
        found.append(num_found)
    return {
        "num_annotated": summary["rounds"][-1]["num_annotated"],
        "accuracy": [row["accuracy"] for row in summary["rounds"]],
        "num_learnt_wrongly": len(learnt_wrongly),
        "found": found,
        "revealed": [(row["quadrants"] or {}).get("revealed") for row in summary["rounds"]],
        "probe_auroc": [(row["probe"] or {}).get("auroc") for row in summary["rounds"][:-1]],
        "seconds": summary["total_seconds"],
    }


def wrongly_learnt(folder: Path) -> set[str]:
    """Candidate questions about facts that the testbed's model was taught wrongly."""
    testbed = cached_testbed(load_config(str(folder / "config.yaml")).testbed, cache_dir() / "testbeds")
    truth = [json.loads(line) for line in testbed.truth.read_text(encoding="utf-8").splitlines()]
    facts = {row["fact"] for row in truth if "wrong_answer" in row}
    pool = [json.loads(line) for line in testbed.pool.read_text(encoding="utf-8").splitlines()]
    return {row["id"] for row in pool if row["split"] == "candidate" and row["fact"] in facts}


def difference(work: Path, seeds: list[int], arm: str, other: str) -> dict[str, Any]:
    """Final accuracy of ``arm`` minus that of ``other``, over the same eval questions of all seeds."""
    differences, by_seed = [], []
    for seed in seeds:
        now, then = (grades(work / f"seed-{seed}" / name, 1 if name == "one_round" else 3) for name in (arm, other))
        paired = [float(now[name]) - float(then[name]) for name in sorted(now.keys() & then.keys())]
        differences += paired
        by_seed.append(float(np.mean(paired)))
    estimate = mean_with_ci(differences, 0)
    return {"mean": estimate.value, "ci": [estimate.low, estimate.high], "by_seed": by_seed}


def main() -> None:
    """Parse arguments, run, write the result."""
    arguments = seeded_parser(__doc__, "axes").parse_args()
    per_seed: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        base = arguments.work / f"seed-{seed}"
        for arm, settings in ARMS.items():
            shared = None if arm == "probe" else base / "probe"
            run_arm(base / arm, [f"seed={seed}", f"testbed.seed={seed}", *COMMON, *settings], shared)
            figures = digest(base / arm, wrongly_learnt(base / arm))
            per_seed.setdefault(str(seed), {})[arm] = figures
            print(seed, arm, json.dumps(figures), flush=True)
    comparison = {
        "two_axis_minus_probe": difference(arguments.work, arguments.seeds, "two_axis", "probe"),
        "two_axis_minus_one_round": difference(arguments.work, arguments.seeds, "two_axis", "one_round"),
        "probe_minus_one_round": difference(arguments.work, arguments.seeds, "probe", "one_round"),
    }
    path = write_result("axes", {"by_seed": per_seed, "comparison": comparison}, arguments.out)
    print(json.dumps(comparison, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
