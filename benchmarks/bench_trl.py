"""What do our SFT and DPO cost beside plain TRL?

`ka2l.tuning.sft.tune` and `ka2l.tuning.dpo.compare` beside TRL's ``SFTTrainer`` and ``DPOTrainer`` as its documentation
shows them: the testbed's model, the same rows in the same order, LoRA, batch, schedule and dtype, no packing. Each side
stays in a process of its own; they take turns, and a first round does not count. Compared are seconds a step, seconds
from the loading of the model to the saved adapter, and the highest resident memory; equal losses show that both did the
same work. Takes about four minutes on two cores, the building of the testbed apart.

    python benchmarks/bench_trl.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from machine import write_result
from sides import Side, in_turns, speed

from engine.inputs import cache_dir
from ka2l.model.adapter import AdapterConfig
from ka2l.prompts import plain_prompt
from ka2l.testbed.build import Testbed, TestbedConfig, cached_testbed
from ka2l.tuning.config import TuningConfig
from ka2l.tuning.dpo import comparison_rows
from ka2l.tuning.knowtuning import KnowTuningConfig
from ka2l.tuning.sft import training_rows

TESTBED = TestbedConfig(num_people=200, num_seed_people=80, stranger_share=0.25, partly_share=0.20)
CONFIG = TuningConfig(
    adapter=AdapterConfig(r=32, alpha=64),
    learning_rate=0.004,
    num_epochs=4,
    batch_size=64,
    dtype="float32",
    knowtuning=KnowTuningConfig(num_epochs=1, batch_size=16, learning_rate=1e-4),
)


def training_data(testbed: Testbed, config: TuningConfig) -> dict[str, Any]:
    """Rows of SFT and pairs of DPO: each candidate's right answer, and another one's to the same kind of question."""
    rows = [json.loads(line) for line in testbed.pool.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "seed"]
    rng = random.Random(0)
    others = {row["id"]: rng.choice([one for one in rows if one["relation"] == row["relation"]]) for row in rows}
    asked = [(row["id"], plain_prompt(row["question"]), row["answers"][0]) for row in rows]
    pairs = [
        (name, "factuality", prompt, answer, others[name]["answers"][0])
        for name, prompt, answer in asked
        if others[name]["answers"][0] != answer
    ]
    return {
        "rows": training_rows(asked, [], config, 0, chat=False),
        "pairs": comparison_rows(pairs, config.knowtuning, 0, chat=False),
    }


def compared(made: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of both sides over the rounds."""
    steps = {side: results[0]["num_steps"] for side, results in made.items()}
    losses = [made[side][0]["losses"] for side in ("ka2l", "trl")]
    same_length = len(losses[0]) == len(losses[1])
    return {
        "num_steps": steps,
        "step": speed(made, "trl", steps["ka2l"]),
        "total": speed(made, "trl", 1, "total_seconds"),
        "peak_mib": {side: median(result["peak_mib"] for result in results) for side, results in made.items()},
        "losses": {"ka2l": losses[0], "trl": losses[1]},
        "max_abs_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)) if same_length else None,
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="result file; one of this machine and day where not given")
    arguments = parser.parse_args()
    testbed = cached_testbed(TESTBED, cache_dir() / "testbeds")
    data = training_data(testbed, CONFIG)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {}
        for side in ("ka2l", "trl"):
            spec = data | {"model": str(testbed.model), "config": CONFIG.model_dump(), "folder": str(folder / side)}
            (folder / f"{side}.json").write_text(json.dumps(spec), encoding="utf-8")
            script = Path(__file__).with_name("trl_process.py")
            sides[side] = Side([sys.executable, script, side, folder / f"{side}.json"], folder / f"{side}.log")
        trainings = {}
        try:
            for what, options in (("sft", {}), ("dpo", {"adapter": str(folder / "ka2l" / "sft")})):
                asks = {side: partial(one.ask, what=what, **options) for side, one in sides.items()}
                trainings[what] = compared(in_turns(asks.pop("ka2l"), asks, arguments.repeats))
        finally:
            for one in sides.values():
                one.close()
    counts = {"num_rows": len(data["rows"]), "num_pairs": len(data["pairs"]), "repeats": arguments.repeats}
    result = {"settings": counts | {"tuning": CONFIG.model_dump(), "testbed": TESTBED.model_dump()}, **trainings}
    print(json.dumps(trainings, indent=1))
    print(f"written: {write_result('trl', result, arguments.out)}")


if __name__ == "__main__":
    main()
