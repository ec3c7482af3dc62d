"""How truly a decoder reads hidden states, what passes its gates, and whether its questions help.

Fidelity, for each kind of decoder: one round of the quickstart up to the questions that it decodes.

    inversion       a small encoder-decoder, trained from scratch
    self_inversion  the testbed's own model through a LoRA adapter
    last_token      inversion from the last token's state alone

Help: the same number of annotations in one round on a testbed that leaves two fifths of its facts out of the pool.

    pool_only       selected questions of the pool
    half_decoded    half of them decoded, as far as enough pass the gates
    all_decoded     all of them decoded, as far as enough pass the gates
    random          random questions of the pool

Accuracy is measured on unseen paraphrases of what the pool asks for, and on facts about the same people that it does
not ask for. Takes about 25 minutes a seed on two cores.

    python benchmarks/bench_decoder.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from arms import run_arm
from machine import write_result

#: What differs from the quickstart in every arm.
COMMON = [
    "rounds=1",
    "selection.budget=200",
    "testbed.outside_share=0.2",
    "extraction.position=last_and_mean",
    "annotator.reference_table=testbed",
    "decoder.kind=inversion",
    "decoder.corpus=testbed",
    "decoder.learning_rate=0.01",
    "decoder.num_epochs=5",
    "decoder.max_tokens=32",
    "decoder.cpus_per_worker=1.8",
]
HELP_COMMON = ["selection.budget=400", "testbed.outside_share=0.4"]
ARMS: dict[str, list[str]] = {
    "inversion": [],
    "self_inversion": ["decoder.kind=self_inversion", "decoder.learning_rate=0.002"],
    "last_token": ["extraction.position=last_token"],
    "pool_only": [*HELP_COMMON, "decoder.kind=none"],
    "half_decoded": [*HELP_COMMON, "decoder.share=0.5"],
    "all_decoded": [*HELP_COMMON, "decoder.share=1.0"],
    "random": [*HELP_COMMON, "decoder.kind=none", "selection.kind=random"],
}


def finished(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The figures of one run; goes on with what is committed in ``work``."""
    folder = work / f"seed-{seed}" / arm
    run_arm(folder, [f"seed={seed}", f"testbed.seed={seed}", *COMMON, *ARMS[arm]])
    return digest(folder)


def digest(folder: Path) -> dict[str, Any]:
    """The figures that are compared."""

    def metrics(stage: str, index: int) -> dict[str, Any]:
        path = folder / f"round-{index:03d}" / stage / "manifest.json"
        found: dict[str, Any] = json.loads(path.read_text())["metrics"] if path.exists() else {}
        return found

    decoder, decoded = metrics("decoder", 0), metrics("decode", 0)
    accuracy = ("accuracy", "accuracy_in_pool", "accuracy_outside", "num_outside")
    fidelity = ("layer", "exact_match", "token_f1", "bleu", "num_held_out", "num_pairs", "training_seconds")
    return {
        "num_annotated": metrics("annotate", 0)["num_annotated"],
        "probe_auroc": metrics("probe", 0)["auroc"],
        "before": {key: metrics("cluster", 0).get(key) for key in accuracy},
        "after": {key: metrics("cluster", 1).get(key) for key in accuracy},
        "decoder": {key: decoder.get(key) for key in fidelity} if decoder else None,
        "decoded": decoded or None,
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/bench_decoder"), help="where the runs go; kept")
    parser.add_argument("--out", help="result file; benchmarks/results/decoder.json where not given")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    per_seed: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            found = finished(arm, seed, arguments.work)
            per_seed.setdefault(str(seed), {})[arm] = found
            print(seed, arm, json.dumps(found), flush=True)
    path = write_result("decoder", {"by_seed": per_seed}, arguments.out)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
