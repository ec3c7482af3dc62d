"""End to end against the published KA2L code's procedure: same model, same questions, stage by stage.

Two processes go from questions to a probe, --repeats times in alternating order:

  ours    one vLLM session (n samples a prompt in one request, then greedy), a prefill-only forward for the states,
          clusters by representatives, the threshold on the train split, all layers' probes at once
  public  `public_procedure.py`: n passes of one sample with rows looked up by prompt, `generate` with all states of all
          steps kept for the states and the low-temperature answer, every pair of answers compared both ways, the
          threshold by a grid over all rows, one SwiGLU probe (D -> 14336 -> D -> 2) a layer

Both run vLLM with the same engine arguments, in float32, with as many threads, and both put every comparison of answers
to the same small cross-encoder (a tenth of the model's size, as DeBERTa-v2-xlarge is of an 8B model), which has random
weights: it is paid for, and the lexical rule gives the verdict. Left out on the public side: pickles after every pass,
progress bars, baselines, grading by a language model. Its answers end after --max-tokens as ours do, not after 256.

Then the probes: ours and theirs fitted on the same rows and measured on the same questions about other people, over
--probe-seeds and --testbeds. Theirs reads the top layer; ours is shown with the layer that it
chooses on the validation rows, and with the one that scores best over all rows in five folds.

    python benchmarks/bench_public.py                   # half an hour or so on two cores, testbeds not counted
    python benchmarks/bench_public.py --part timing     # or `probes`: one half; the other is taken from --out

Every process runs alone; testbeds are built on first use (minutes) and kept in $KA2L_CACHE or ~/.cache/ka2l.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import RESULTS, command, write_result

HERE = Path(__file__).resolve()
#: People -> what else differs from the quickstart's testbed.
TESTBEDS: dict[str, tuple[str, ...]] = {"200": ("testbed.partly_share=0.2",), "300": ()}
STAGES = ("imports", "engine_start", "sample", "low_temperature", "states_start", "states", "cluster_start", "cluster",
          "label", "probe", "probe_in_proportion")  # fmt: skip
#: What prepares work and does none: left out of "without start-up".
START_UP = ("imports", "engine_start", "states_start", "cluster_start")


def testbed_of(name: str) -> Any:
    """The testbed that ``PEOPLE:SEED`` names: so many people, and 80 whose facts are seed questions."""
    from engine.config import load_config
    from engine.inputs import cache_dir
    from ka2l.testbed.build import cached_testbed

    people, _, seed = name.partition(":")
    changes = ["testbed.outside_share=0", f"testbed.num_people={people}", f"testbed.seed={seed}", *TESTBEDS[people]]
    return cached_testbed(load_config("quickstart", changes).testbed, cache_dir() / "testbeds")


def questions_of(testbed: Any, num_questions: int | None) -> list[dict[str, Any]]:
    """Seed questions and candidates of a testbed: all, or so many drawn."""
    rows = [json.loads(line) for line in testbed.pool.read_text().splitlines()]
    rows = [row for row in rows if row["split"] != "eval"]
    if num_questions is not None:
        if num_questions > len(rows):
            sys.exit(f"the testbed has {len(rows)} questions; --num-questions must not be higher")
        rows = random.Random(0).sample(rows, num_questions)
    return [{key: row[key] for key in ("id", "question", "group", "answers")} for row in rows]


def save_cross_encoder(model: str, folder: Path) -> str:
    """A DeBERTa-v2 of two layers with random weights and the model's own tokenizer."""
    import torch
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=384,
        relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        norm_rel_ebd="layer_norm", share_att_key=True, max_position_embeddings=512, type_vocab_size=0,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
        label2id={"contradiction": 0, "neutral": 1, "entailment": 2},
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_process(side: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side in a process of its own; raises SystemExit with the end of its log where it fails."""
    threads = str(spec["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    spec_path = folder / "spec.json"
    spec_path.write_text(json.dumps(spec))
    command = [sys.executable, str(HERE.with_name("public_processes.py")), side, str(spec_path)]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment, check=False, text=True)
    if done.returncode:
        sys.exit(f"the process {side!r} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def timing(options: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Both sides, in alternating order, beside the runs of ``before``; medians, and whether they came to the same."""
    testbed = testbed_of(options.testbeds[0])
    runs: dict[str, list[dict[str, Any]]] = before["runs"] if before else {"ours": [], "public": []}
    done = len(runs["ours"])
    with tempfile.TemporaryDirectory(prefix="ka2l-bench-") as name:
        folder = Path(name)
        spec = {key: getattr(options, key) for key in ("num_samples", "max_tokens", "threads", "swiglu_hidden")}
        spec |= {
            "model": str(testbed.model),
            "questions": questions_of(testbed, options.num_questions),
            "cross_encoder": save_cross_encoder(str(testbed.model), folder / "cross-encoder"),
        }
        for repeat in range(done, done + options.repeats):
            for side in ("ours", "public") if repeat % 2 == 0 else ("public", "ours"):
                print(f"repeat {repeat + 1}: {side}", file=sys.stderr, flush=True)
                agreement = side == "public" and repeat == done
                made = run_process(side, spec | {"out": str(folder / f"{side}.npz"), "agreement": agreement}, folder)
                print(json.dumps(made["cpu_seconds"]), file=sys.stderr, flush=True)
                runs[side].append(made)
            if repeat == done:
                same = agreements(folder) | {"same_prompt_lengths": runs["public"][-1]["same_prompt_lengths"]}
    return {
        "num_questions": options.num_questions,
        "seconds": medians(runs, "seconds"),
        "cpu_seconds": medians(runs, "cpu_seconds"),
        "num_comparisons": {side: made[0]["num_comparisons"] for side, made in runs.items()},
        "peak_mib": {side: max(run["peak_mib"] for run in made) for side, made in runs.items()},
        "agreement": same,
        "runs": runs,
    }


def medians(runs: dict[str, list[dict[str, Any]]], kind: str) -> dict[str, dict[str, float]]:
    """Of each side's stages, over its runs."""
    return {
        side: {stage: statistics.median(run[kind].get(stage, 0.0) for run in made) for stage in STAGES}
        for side, made in runs.items()
    }


def agreements(folder: Path) -> dict[str, Any]:
    """Where both sides must come to the same: samples of the same seeds, greedy answers, states, clusters."""
    ours, theirs = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "public"))
    with np.load(folder / "ours.npz") as a, np.load(folder / "public.npz") as b:
        gap = float(np.abs(a["states"] - b["states"]).max())

    def share(key: str, other: str) -> float:
        return statistics.fmean(a == b for a, b in zip(ours[key], theirs[other], strict=True))

    alike = [row for row, pair in enumerate(zip(ours["samples"], theirs["samples"], strict=True)) if pair[0] == pair[1]]
    return {
        "share_same_samples": share("samples", "samples"),
        "share_same_greedy": share("greedy", "greedy"),
        "share_low_temperature_greedy": share("greedy", "low"),
        "share_same_clusters": statistics.fmean(ours["clusters"][row] == theirs["clusters"][row] for row in alike),
        "max_state_difference": gap,
    }


def probes(options: argparse.Namespace, found: dict[str, Any], save: Callable[[], object]) -> None:
    """Adds to ``found`` what arms come to on every testbed, number of rows to fit on and split that it lacks."""
    import torch
    from public_probe import compare, ours, public

    torch.set_num_threads(options.threads)
    arms = {
        "public": public(hidden=options.swiglu_hidden, fused=True),
        "mlp": ours(kind="mlp"),
        "linear": ours(kind="linear"),
        # In proportion to the width of 192, and at the best of a few learning rates on the first testbed.
        "swiglu": ours(kind="swiglu", swiglu_hidden=672, learning_rate=1e-4),
    }
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.testbeds:
        file = options.work / f"observed-{name.replace(':', '-')}.npz"
        if not file.exists():
            testbed = testbed_of(name)
            spec = {key: getattr(options, key) for key in ("num_samples", "max_tokens", "threads")}
            spec |= {"model": str(testbed.model), "questions": questions_of(testbed, None), "out": str(file)}
            run_process("observe", spec, options.work)
        for num_fit in options.fit:
            runs = found.setdefault(name, {}).setdefault(str(num_fit), {"arms": {}})
            for split in options.probe_seeds:
                lacking = {
                    arm: fitted
                    for arm, fitted in arms.items()
                    if split not in [run["seed"] for run in runs["arms"].get(arm, [])]
                }
                if lacking:
                    made = compare(file, lacking, [split], num_fit, crossed=["mlp", "linear", "swiglu"])
                    for arm, each in made.pop("arms").items():
                        runs["arms"].setdefault(arm, []).extend(each)
                    runs |= made
                    save()


def main(words: Sequence[str] | None = None) -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "timing", "probes"), default="all")
    parser.add_argument("--num-questions", type=int, default=1400, help="questions (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=10, help="answers a question (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="longest answer, tokens (default: %(default)s)")
    parser.add_argument("--swiglu-hidden", type=int, default=14336, help="of their probe (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of both sides (default: %(default)s)")
    parser.add_argument("--more", action="store_true", help="add runs, or testbeds, to those of --out")
    parser.add_argument("--threads", type=int, default=2, help="of every process (default: %(default)s)")
    parser.add_argument("--testbeds", nargs="+", default=["200:0", "300:0"], help="PEOPLE:SEED; timed is the first")
    parser.add_argument("--probe-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fit", type=int, nargs="+", default=[120, 600], help="questions that probes are fitted on")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_public"), help="what probes read; kept")
    parser.add_argument("--out", help=f"result file; {RESULTS.name}/public/ where not given")
    options = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result: dict[str, Any] = {}
    if options.part != "all" and options.out and Path(options.out).exists():
        before = json.loads(Path(options.out).read_text())
        result = {part: before[part] for part in ("timing", "probes", "settings", "commands") if part in before}
    settings = ["num_samples", "max_tokens", "swiglu_hidden"]
    settings += ["threads"] if options.part != "probes" else []
    result["settings"] = result.get("settings", {}) | {key: getattr(options, key) for key in settings}
    parts = ["timing", "probes"] if options.part == "all" else [options.part]
    result["commands"] = result.get("commands", {}) | dict.fromkeys(parts, command(sys.argv))
    result["command"] = " && ".join(dict.fromkeys(result["commands"].values()))
    if options.part != "probes":
        result["timing"] = timing(options, result.get("timing") if options.more else None)
        result["settings"]["repeats"] = len(result["timing"]["runs"]["ours"])
    if options.part != "timing":
        found = result.setdefault("probes", {}) if options.more else {}
        result["probes"] = found
        probes(options, found, lambda: write_result("public", result, options.out))
    print(f"written: {write_result('public', result, options.out)}")


if __name__ == "__main__":
    main()
