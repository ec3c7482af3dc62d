"""How truly a decoder reads hidden states, what passes its gates, and whether its questions help.

Fidelity, for each kind of decoder: one round of the quickstart up to the questions that it decodes.

    inversion       a small encoder-decoder, trained from scratch
    self_inversion  the testbed's own model through a LoRA adapter
    last_token      inversion from the last token's state alone

Help: the same number of annotations in one round on a testbed that leaves two fifths of its facts out of the pool.

    pool_only       selected questions of the pool
    half_decoded    half of them decoded, as far as enough pass the gates
    all_decoded     all of them decoded, as far as enough pass the gates
    paraphrases     half of them selected questions of the pool, the other half the same asked in other words
    random          random questions of the pool

Accuracy is measured on unseen paraphrases of what the pool asks for, and on facts about the same people that it does
not ask for. Takes about 25 minutes a seed on two cores.

    python benchmarks/bench_decoder.py --seeds 0 1 2
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from arms import CAMPAIGN, run_arm, seeded_parser
from machine import write_result

from engine.config import load_config
from engine.inputs import cache_dir
from ka2l.selection.strategies import Candidates, Selected, SelectionConfig
from ka2l.testbed.build import cached_testbed

#: What differs from the quickstart in every arm.
COMMON = [
    *CAMPAIGN,
    "rounds=1",
    # The layer below the top: it tells known from unknown nearly as well, and more of what was asked is left in it.
    "extraction.layers=[3]",
]
HELP_COMMON = ["selection.budget=400", "testbed.outside_share=0.4"]
ARMS: dict[str, list[str]] = {
    "inversion": [],
    "self_inversion": ["decoder.kind=self_inversion", "decoder.learning_rate=0.002"],
    "last_token": ["extraction.position=last_token"],
    "pool_only": [*HELP_COMMON, "decoder.kind=none"],
    "half_decoded": [*HELP_COMMON, "decoder.kind=inversion", "decoder.share=0.5"],
    "all_decoded": [*HELP_COMMON, "decoder.kind=inversion", "decoder.share=1.0"],
    # Each candidate twice, so half of them is as much rehearsal as in the other arms.
    "paraphrases": [
        *HELP_COMMON,
        "decoder.kind=none",
        "annotator.reference_table=null",
        "selection.kind=bench_decoder:both_wordings",
        "tuning.rehearsal=0.5",
    ],
    "random": [*HELP_COMMON, "decoder.kind=none", "selection.kind=random"],
}
#: Arms that ask the base model what another has asked it already. They start from its config, so they say again what it
#: sets otherwise than they do.
BASE_OF = {
    "self_inversion": "inversion",
    "half_decoded": "pool_only",
    "all_decoded": "pool_only",
    "random": "pool_only",
}
AGAIN = ".again"


def both_wordings(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The query strategy of ``paraphrases``: the best questions in the pool's wording, and in another."""
    row_of = {name: row for row, name in enumerate(candidates.question_ids)}
    best = sorted(
        (name for name in row_of if not name.endswith(AGAIN) and name + AGAIN in row_of),
        key=lambda name: (-candidates.score[row_of[name]], name),
    )[: budget // 2]
    rows = np.array([row_of[name + ending] for name in best for ending in ("", AGAIN)])
    return Selected(rows, candidates.score[rows])


def pool_with_paraphrases(settings: list[str], file: Path) -> None:
    """The testbed's pool with a second row for every candidate: the same fact in a wording that nothing else uses."""
    testbed = cached_testbed(load_config("quickstart", settings).testbed, cache_dir() / "testbeds")
    wordings: dict[str, list[str]] = {}
    for row in pq.read_table(testbed.directory / "answers.parquet").to_pylist():
        wordings.setdefault(row["fact"], []).append(row["question"])
    rows = [json.loads(line) for line in testbed.pool.read_text(encoding="utf-8").splitlines()]
    used = {row["question"] for row in rows}
    for row in [row for row in rows if row["split"] == "candidate"]:
        other = next(question for question in wordings[row["fact"]] if question not in used)
        rows.append(row | {"id": row["id"] + AGAIN, "question": other})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def finished(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The figures of one run; goes on with what is committed in ``work``."""
    folder = work / f"seed-{seed}" / arm
    settings = [f"seed={seed}", f"testbed.seed={seed}", *COMMON, *ARMS[arm]]
    if arm == "paraphrases":
        pool = work.resolve() / f"seed-{seed}" / "pool_with_paraphrases.jsonl"
        if not pool.exists():
            pool_with_paraphrases(settings, pool)
        settings.append(f"pool.path={pool}")
    run_arm(folder, settings, folder.parent / BASE_OF[arm] if arm in BASE_OF else None)
    return digest(folder)


def digest(folder: Path) -> dict[str, Any]:
    """The figures that are compared."""

    def metrics(stage: str, index: int) -> dict[str, Any]:
        path = folder / f"round-{index:03d}" / stage / "manifest.json"
        found: dict[str, Any] = json.loads(path.read_text())["metrics"] if path.exists() else {}
        return found

    decoder, decoded = metrics("decoder", 0), metrics("decode", 0)
    accuracy = ("accuracy", "accuracy_in_pool", "accuracy_outside", "num_outside")
    fidelity = ("layer", "noise", "exact_match", "token_f1", "bleu", "num_held_out", "num_pairs", "training_seconds")
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
    parser = seeded_parser(__doc__, "decoder")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    here = str(Path(__file__).resolve().parent)  # where runs find `both_wordings`
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
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
