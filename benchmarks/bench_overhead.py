"""What does the engine cost on top of bare vLLM and of a bare forward loop? See ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import write_result

EXPLANATION = """What does the engine cost on top of bare vLLM and of a bare forward loop, and what does it save?

Three processes do the same work, one after another, --repeats times in alternating order:

  engine        the stages `observe` and `extract` of a real campaign: Ray, shards, seeds, committed tables
  vllm          bare `vllm.LLM.generate`: all prompts in one call with n samples each, with the same engine arguments,
                sampling parameters and seeds; then the same samples as one pass after another with n=1
  transformers  bare forward passes, sorted by length, that keep the last token's state of every layer; then
                `model.generate` that keeps all hidden states of all steps in order to read that one token

The second half of `vllm` and of `transformers` is how KA2L's published code samples and extracts (arXiv 2603.17566).

How to read the table: a ratio above 1 is time lost, 'engine / bare' is the price of the engine, 'public / engine' is
what it saves. Phases exclude loading; bare vLLM makes an unmeasured call first, the engine does not. 'From start' is
the whole process, loading included. Figures are medians; ratios are ratios of medians. Engine and bare vLLM must
generate the same number of tokens, and both extractions must give the same states, or the benchmark fails.

The model is the built-in testbed; it is built on first use (minutes) and kept in $KA2L_CACHE or ~/.cache/ka2l. It is
tiny, so that what is not the model's own work weighs as much as it ever can. Run it on a machine that does nothing
else. Try it: bench_overhead.py --num-questions 100 --repeats 1 --out /tmp/overhead.json

Exit code 1 where an 'engine / bare' ratio of a phase is above --limit.
"""
HERE = Path(__file__).resolve()
PHASES = ("engine", "vllm", "transformers")


def run_process(phase: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One phase in a process of its own; raises SystemExit with the end of its log where it fails."""
    threads = str(spec["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    script, spec_path = HERE.with_name("overhead_processes.py"), folder / "spec.json"
    spec_path.write_text(json.dumps(spec))
    command = [sys.executable, str(script), phase, str(spec_path), str(time.time())]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment, check=False, text=True)
    if done.returncode:
        sys.exit(f"the process {phase!r} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_states(spec: dict[str, Any]) -> float:
    """Largest difference between the engine's states and the bare loop's; raises SystemExit where it is not small."""
    import numpy as np

    from engine.store.run_directory import RunDirectory

    table = RunDirectory(spec["run_dir"]).stage("extract", 0).table()
    ours = dict(zip(table["question_id"].to_pylist(), table["states"].combine_chunks().to_pylist(), strict=True))
    ids = [json.loads(line)["id"] for line in Path(spec["pool"]).read_text().splitlines()]
    bare = np.load(spec["states"]).reshape(len(ids), -1)
    difference = float(np.abs(bare - np.array([ours[name] for name in ids])).max())
    if not difference < 1e-3:
        sys.exit(f"engine and bare loop extracted different states: they differ by up to {difference:.3g}")
    return difference


def write_pool(source: Path, target: Path, num_questions: int) -> None:
    """``num_questions`` of the testbed's questions as seed questions, and the one candidate that a pool must have."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    if len(rows) <= num_questions:
        sys.exit(f"the testbed has {len(rows)} questions; --num-questions must be lower")
    chosen = random.Random(0).sample(rows, num_questions + 1)
    for index, row in enumerate(chosen):
        row["split"] = "seed" if index else "candidate"
    target.write_text("".join(json.dumps(row) + "\n" for row in chosen))


def summarise(runs: Sequence[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Medians over the runs, and the ratios they give."""
    median = {
        phase: {key: statistics.median(run[phase][key] for run in runs) for key in runs[0][phase]} for phase in PHASES
    }
    engine, vllm, bare = (median[phase] for phase in PHASES)
    ratios = {
        "generate_engine_over_bare": engine["generate_seconds"] / vllm["generate_seconds"],
        "generate_from_start_engine_over_bare": engine["generate_from_start_seconds"]
        / vllm["generate_from_start_seconds"],
        "generate_public_over_engine": vllm["passes_seconds"] / engine["generate_seconds"],
        "generate_public_over_bare": vllm["passes_seconds"] / vllm["generate_seconds"],
        "extract_engine_over_bare": engine["forward_seconds"] / bare["forward_seconds"],
        "extract_public_over_engine": bare["keep_all_seconds"] / engine["forward_seconds"],
        "extract_public_over_bare": bare["keep_all_seconds"] / bare["forward_seconds"],
    }
    held = {name: ratios[name] <= limit for name in ("generate_engine_over_bare", "extract_engine_over_bare")}
    return {"medians": median, "ratios": ratios, "limit": limit, "within_limit": held}


def print_table(result: dict[str, Any], num_questions: int) -> None:
    from rich.console import Console
    from rich.table import Table

    engine, vllm, bare = (result["medians"][phase] for phase in PHASES)
    ratios = result["ratios"]
    table = Table("", "engine, s", "bare, s", "public, s", "engine / bare", "public / engine",
                  title=f"{num_questions} questions, medians of {len(result['runs'])}")  # fmt: skip
    lines = [
        ("generate", engine["generate_seconds"], vllm["generate_seconds"], vllm["passes_seconds"],
         ratios["generate_engine_over_bare"], ratios["generate_public_over_engine"]),
        ("generate, from start", engine["generate_from_start_seconds"], vllm["generate_from_start_seconds"], None,
         ratios["generate_from_start_engine_over_bare"], None),
        ("extract", engine["forward_seconds"], bare["forward_seconds"], bare["keep_all_seconds"],
         ratios["extract_engine_over_bare"], ratios["extract_public_over_engine"]),
    ]  # fmt: skip
    for name, *numbers in lines:
        table.add_row(name, *("" if number is None else f"{number:.2f}" for number in numbers))
    Console().print(table)
    for name, held in result["within_limit"].items():
        print(f"{name} {ratios[name]:.3f}: {'within' if held else 'ABOVE'} the limit of {result['limit']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=EXPLANATION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=2000, help="questions asked (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=10, help="answers a question (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="longest answer, tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every process (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1.15, help="largest 'engine / bare' (default: %(default)s)")
    parser.add_argument("--out", help="result file; in benchmarks/results/overhead where not given")
    options = parser.parse_args()

    from engine.config import load_config
    from engine.inputs import cache_dir
    from ka2l.testbed.build import cached_testbed

    print("looking for the testbed, building it where it is not in the cache (minutes)", file=sys.stderr, flush=True)
    testbed = cached_testbed(load_config("quickstart", ["testbed.outside_share=0"]).testbed, cache_dir() / "testbeds")
    runs: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ka2l-bench-") as name:
        folder = Path(name)
        write_pool(testbed.pool, folder / "pool.jsonl", options.num_questions)
        spec = {key: getattr(options, key) for key in ("num_questions", "num_samples", "max_tokens", "threads")}
        spec |= {
            "model": str(testbed.model),
            "pool": str(folder / "pool.jsonl"),
            "states": str(folder / "states.npy"),
        }
        for repeat in range(options.repeats):
            spec["run_dir"] = str(folder / f"run-{repeat}")
            run: dict[str, Any] = {}
            for phase in PHASES if repeat % 2 == 0 else PHASES[::-1]:
                print(f"repeat {repeat + 1} of {options.repeats}: {phase}", file=sys.stderr, flush=True)
                run[phase] = run_process(phase, spec, folder)
            run["engine"]["max_state_difference"] = check_states(spec)
            counts = {run["engine"]["tokens_generated"], run["vllm"]["tokens_generated"]}
            if max(counts) > 1.001 * min(counts):  # rounding may turn a token here and there
                sys.exit(f"engine and bare vLLM did not do the same work: {sorted(counts)} tokens")
            runs.append(run)
    settings = {key: spec[key] for key in ("num_questions", "num_samples", "max_tokens", "threads")}
    result = {"load_average_before": load, "settings": settings | {"repeats": options.repeats}}
    result |= summarise(runs, options.limit) | {"runs": runs}
    path = write_result("overhead", result, options.out)
    print_table(result, options.num_questions)
    print(f"written: {path}")
    sys.exit(0 if all(result["within_limit"].values()) else 1)


if __name__ == "__main__":
    main()
