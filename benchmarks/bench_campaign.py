"""Do rounds earn their keep, and does selection? Five arms on the testbed, for several seeds.

    three_rounds  the quickstart without its decoder: 3 rounds of 250, probe, rehearsal
    one_round     the same 750 annotations in one round
    one_entropy   the same, chosen by the semantic entropy of samples of every candidate: what the probe predicts
    random        750 random annotations, no rehearsal
    everything    all 1,500 candidates annotated

Every seed has a testbed of its own. Round 0 asks the same base model in three_rounds, one_round and everything, so
its observation and probe are made once and shared. Takes about 17 minutes a seed on two cores.

    python benchmarks/bench_campaign.py --seeds 0 1 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from arms import WITHOUT_DECODER, run_arm, seeded_parser
from machine import write_result

ARMS: dict[str, list[str]] = {
    "three_rounds": [],
    "one_round": ["rounds=1", "selection.budget=750"],
    "one_entropy": ["rounds=1", "selection.budget=750", "selection.kind=semantic_entropy"],
    "random": ["rounds=1", "selection.budget=750", "selection.kind=random", "tuning.rehearsal=0"],
    "everything": ["rounds=1", "selection.budget=1500"],
}


def finished(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The summary of one run; reuses what is committed in ``work``."""
    folder = work / f"seed-{seed}" / arm
    base = work / f"seed-{seed}" / "three_rounds" if arm in ("one_round", "everything") else None
    run_arm(folder, [f"seed={seed}", f"testbed.seed={seed}", *WITHOUT_DECODER, *ARMS[arm]], base)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def digest(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures that are compared."""
    rounds = summary["rounds"]
    return {
        "num_annotated": rounds[-1]["num_annotated"],
        "num_candidates": rounds[0]["num_candidates"],
        "accuracy": [row["accuracy"] for row in rounds],
        "accuracy_ci": rounds[-1]["accuracy_ci"],
        "kept": None if rounds[-1]["forgetting"] is None else 1 - rounds[-1]["forgetting"],
        "probe_auroc": [(row["probe"] or {}).get("auroc") for row in rounds[:-1]],
        "auroc_wrong_unannotated": [(row["probe"] or {}).get("auroc_wrong") for row in rounds[:-1]],
        "seconds": summary["total_seconds"],
    }


def compare(per_seed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the differences that matter."""
    final = {arm: np.array([arms[arm]["accuracy"][-1] for arms in per_seed.values()]) for arm in ARMS}
    base = np.array([arms["three_rounds"]["accuracy"][0] for arms in per_seed.values()])
    way = (final["three_rounds"] - base) / (final["everything"] - base)
    return {
        "base": base.mean(),
        "final_accuracy": {arm: {"mean": values.mean(), "by_seed": values} for arm, values in final.items()},
        "three_rounds_minus_one_round": {
            "mean": (final["three_rounds"] - final["one_round"]).mean(),
            "by_seed": final["three_rounds"] - final["one_round"],
        },
        "three_rounds_minus_random": {
            "mean": (final["three_rounds"] - final["random"]).mean(),
            "by_seed": final["three_rounds"] - final["random"],
        },
        "share_of_the_way_to_everything": {"mean": way.mean(), "by_seed": way},
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    arguments = seeded_parser(__doc__, "campaign").parse_args()
    per_seed: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        per_seed[str(seed)] = {}
        for arm in ARMS:
            per_seed[str(seed)][arm] = digest(finished(arm, seed, arguments.work))
            print(seed, arm, json.dumps(per_seed[str(seed)][arm]), flush=True)
    path = write_result("campaign", {"by_seed": per_seed, "comparison": compare(per_seed)}, arguments.out)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
