"""What every stage costs as its work grows, beside what it cannot cost less than.

One factor at a time around 2,000 questions, 10 samples, 5 layers and width 192 (the testbed's model): questions in
the pool, samples a question, layers kept, width of the model, workers. Stages run as the engine's hosts and functions
do, in one process a stage and model, without Ray, on tables in Parquet. The floors are measured just before:

  sample                    tokens generated / the same engine's pace with 256 long answers at once
  extract, probe, tune      FLOPs (2 x weights x tokens forward, 6 x in training, 4 x with LoRA, whose frozen weights
                            need no gradient) / FLOP/s of a large float32 matrix product on the same threads
  cluster, label,           bytes read and written / bandwidth of the disk, written through to it and read back without
  knowledge, select         the cache

A ratio to the floor says how much of a stage is not the work itself. Seconds are medians of three where a measurement
takes under 5 s; memory is the rise of the highest resident set during it (Linux). Questions are the testbed's
and, beyond them, of its background crowd; other widths are random weights, whose answers never end before 16 tokens,
and are measured with 500 questions and 4 samples. The probe makes 20 epochs without early stopping; tuning is one
epoch.

    python benchmarks/bench_costs.py                                  # 15 minutes or so on two cores
    python benchmarks/bench_costs.py --stages tune --out FILE         # that stage again; FILE keeps the others

Give --stages in the order of the default: later ones read tables that earlier ones left in --work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_public import testbed_of
from machine import command, write_result

HERE = Path(__file__).resolve()
STAGES = ("sample", "cluster", "extract", "label", "probe", "knowledge", "select", "tune", "workers")
DEFAULT = {"num_questions": 2000, "num_samples": 10, "num_layers": 5, "width": 192}
POOLS = (500, 1000, 2000, 4000, 8000)
#: Factors that a stage's cost can depend on, with the values to try. Where a stage is slow, fewer.
FACTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "sample": {"num_questions": POOLS[:-1], "num_samples": (2, 5, 10, 20)},
    "cluster": {"num_questions": POOLS[:-1], "num_samples": (2, 5, 10, 20)},  # of what `sample` has answered
    "extract": {"num_questions": POOLS, "num_layers": (1, 2, 5)},
    "label": {"num_questions": POOLS},
    "probe": {"num_questions": POOLS, "num_layers": (1, 2, 5), "width": (96, 192, 384, 768)},
    "knowledge": {"num_questions": POOLS, "num_layers": (1, 2, 5), "width": (96, 192, 384, 768)},
    "select": {"num_questions": POOLS},
    "tune": {"num_questions": POOLS[:-1]},
}
#: Stages that run a model are measured on models of other widths, too, at this size.
WIDTHS = (96, 192, 384)
WIDTH_POINT = {"num_questions": 500, "num_samples": 4, "num_layers": 5}
MODEL_STAGES = ("sample", "extract", "tune")


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2, help="of every process (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_costs"), help="where tables and models go; kept")
    parser.add_argument("--out", help="result file; benchmarks/results/costs/ where not given")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    points: list[dict[str, Any]] = []
    if options.out and Path(options.out).exists():
        before = json.loads(Path(options.out).read_text())["points"]
        points = [point for point in before if point["job"] not in options.stages]
    models = prepare(options.work)
    floors = {"flop_per_s": matmul_flop_per_s(options.threads), "bytes_per_s": disk_bytes_per_s(options.work)}
    print(f"{floors['flop_per_s'] / 1e9:.0f} GFLOP/s, {floors['bytes_per_s'] / 1e6:.0f} MB/s", file=sys.stderr)
    common = floors | {"threads": options.threads, "questions": str(options.work / "questions.parquet")}
    for stage in options.stages:
        for model, wanted in jobs(stage, models):
            spec = common | {
                "stage": stage, "model": model, "points": wanted, "work": str(options.work), "largest": max(POOLS),
                "keep": model == models[0],
            }  # fmt: skip
            made = run_process(spec, options.work)
            points += [{"job": stage, "stage": stage, "threads": options.threads} | floors | point for point in made]
            for point in made:
                print(stage, {key: round(v, 3) if isinstance(v, float) else v for key, v in point.items()},
                      file=sys.stderr, flush=True)  # fmt: skip
            # After every process: one that fails later takes nothing with it.
            points.sort(key=lambda point: STAGES.index(point["job"]))
            result: dict[str, Any] = {"default": DEFAULT, "points": points}
            if {point["job"] for point in points} == set(STAGES):  # whatever stages were measured last
                result["command"] = command([sys.argv[0]])
            path = write_result("costs", result, options.out)
    print(f"written: {path}")


def jobs(stage: str, models: dict[int, str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(model, points to measure with it); the model of width 0 is the testbed's."""
    if stage == "workers":
        return [(models[0], [{"factor": "workers", "workers": n, "num_questions": 2000} for n in (1, 2)])]
    wanted: list[dict[str, Any]] = [{"factor": "default"} | DEFAULT]
    for factor, values in FACTORS[stage].items():
        wanted += [DEFAULT | {"factor": factor, factor: value} for value in values if value != DEFAULT[factor]]
    found = [(models[0], wanted)]
    if stage in MODEL_STAGES:
        found += [(models[width], [WIDTH_POINT | {"factor": "width", "width": width}]) for width in WIDTHS]
    return found


def run_process(spec: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """One stage's measurements; raises SystemExit with the end of its log where it fails."""
    threads = str(spec["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    (work / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(HERE.with_name("costs_process.py")), str(work / "spec.json")]
    with (work / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment, check=False, text=True)
    if done.returncode:
        sys.exit(f"the process of {spec['stage']!r} failed:\n{(work / 'log.txt').read_text()[-3000:]}")
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


def prepare(work: Path) -> dict[int, str]:
    """Questions of the pool in ``work``; the testbed's model (0), and random ones by width."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    testbed = testbed_of("200:0")
    lines = [testbed.pool.read_text(), (testbed.directory / "background.jsonl").read_text()]
    texts = [json.loads(line)["question"] for part in lines for line in part.splitlines()]
    texts = list(dict.fromkeys(texts))[: max(POOLS)]
    if len(texts) < max(POOLS):
        sys.exit(f"the testbed and its background have {len(texts)} questions, {max(POOLS)} are needed")
    columns = {
        "question_id": [f"q{i:06d}" for i in range(len(texts))],
        "question": texts,
        "split": ["seed"] * len(texts),
    }
    pq.write_table(pa.table(columns), work / "questions.parquet")
    models = {0: str(testbed.model)}
    for width in WIDTHS:
        folder = work / f"model-{width}"
        if not (folder / "config.json").exists():
            settings = AutoConfig.from_pretrained(testbed.model)
            heads = width // 32
            settings.update(
                {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": heads,
                 "num_key_value_heads": heads, "head_dim": 32}
            )  # fmt: skip
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
            AutoTokenizer.from_pretrained(testbed.model).save_pretrained(folder)
        models[width] = str(folder)
    return models


def matmul_flop_per_s(threads: int) -> float:
    """Of a float32 product of two 2048 x 2048 matrices, the best of ten."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def disk_bytes_per_s(folder: Path) -> float:
    """Of 256 MiB written through to the disk and read back, the cache dropped between; bytes both ways / seconds."""
    file, data = folder / "disk.bin", np.random.default_rng(0).bytes(2**28)
    start = time.perf_counter()
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    with file.open("rb") as back:
        os.posix_fadvise(back.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while back.read(2**24):
            pass
    seconds = time.perf_counter() - start
    file.unlink()
    return 2 * len(data) / seconds


if __name__ == "__main__":
    main()
