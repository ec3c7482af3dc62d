"""Nine models at once on one machine: does it complete, what memory does it take, and what does it save?

Tiny random models of the nine architectures of `nine.yaml` (those of the tests) map what they know of invented
questions, have some annotated, are tuned on them and measured again: every stage of a campaign, vLLM and Ray Train
included. First all nine by `ka2l benchmark`, all of them under way at the same time, with two CPUs that the queue hands
out; then one after the other, each by `ka2l run` with a Ray of its own.

Memory is the proportional set size (PSS) of all processes that the command has started, Ray's included, added up every
second: a page that several share counts once. RSS beside it counts it once for each.

Takes about half an hour on two cores:

    python benchmarks/bench_nine.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from bench_schedule import replay
from machine import write_result

from engine.config import parse_config
from engine.stages import room_of
from engine.store.ledger import committed_stages
from engine.store.run_directory import RunDirectory

HERE = Path(__file__).resolve().parent
#: Kind of question -> its answer for everything: what a random model cannot know, and tuning can teach.
ANSWERS = {"colour": "red", "size": "big", "taste": "sweet", "shape": "round"}
NUM_QUESTIONS = 240
CONFIG: dict[str, Any] = {
    "rounds": 1,
    "shard_rows": 120,
    "model": {"dtype": "float32"},
    "pool": {"columns": {"group": "subject"}, "num_seed": 60, "num_eval": 60},
    "prompt": {"template": "plain", "instruction": "", "num_shots": 0},
    "sampler": {"num_samples": 5, "temperature": 0.15, "max_tokens": 8, "max_model_len": 128, "cpu_kv_cache_gib": 0.25},
    "probe": {"kind": "linear", "num_epochs": 20, "num_bootstrap": 100},
    "selection": {"budget": 40},
    "tuning": {"max_steps": 30, "batch_size": 16, "learning_rate": 0.01, "num_rehearsal_samples": 2, "max_length": 64},
}
RAY: dict[str, Any] = {"address": "local", "num_cpus": 2}


def build_models(folder: Path) -> dict[str, Path]:
    """The tests' tiny models, by architecture."""
    spec = importlib.util.spec_from_file_location("tiny_models", HERE.parent / "tests" / "helpers" / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: module.build_tiny_model(name, folder / name) for name in module.ARCHITECTURES}


def write_pool(path: Path) -> None:
    """Invented questions, in an order that no kind of question follows."""
    rows = [
        {"id": f"q{index:04d}", "question": f"What is the {kind} of thing {thing}?", "answers": [answer],
         "subject": f"thing {thing}"}
        for index, (thing, (kind, answer)) in enumerate(
            (thing, item) for thing in range(NUM_QUESTIONS // len(ANSWERS)) for item in ANSWERS.items()
        )
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Watched(NamedTuple):
    """A command that has ended, and what its processes held."""

    seconds: float
    peak_pss_gib: float
    peak_rss_gib: float
    peak_processes: int
    at_peak: dict[str, float]
    """Kind of process -> GiB of PSS at the peak."""


def watch(command: list[str], log: Path) -> Watched:
    """Run a command to its end; raises SystemExit with the end of its log where it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    peak: list[Any] = [0.0, 0.0, 0, {}]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, stdin=subprocess.DEVNULL)
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(1.0):
                found = list(memory_of_tree(process.pid))
                pss = sum(item[1] for item in found)
                if pss > peak[0]:
                    by_kind: dict[str, float] = {}
                    for kind, own, _ in found:
                        by_kind[kind] = by_kind.get(kind, 0.0) + own
                    peak[0], peak[3] = pss, by_kind
                peak[1] = max(peak[1], sum(item[2] for item in found))
                peak[2] = max(peak[2], len(found))

        thread = threading.Thread(target=sample)
        thread.start()
        code = process.wait()
        ended.set()
        thread.join()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
    seconds = time.monotonic() - started
    at_peak = {kind: round(gib, 3) for kind, gib in sorted(peak[3].items(), key=lambda item: -item[1])}
    return Watched(round(seconds, 1), round(peak[0], 3), round(peak[1], 3), peak[2], at_peak)


def memory_of_tree(root: int) -> Iterator[tuple[str, float, float]]:
    """Kind, PSS and RSS (GiB) of a process and of all that descend from it."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name, in brackets, may hold anything; the parent is the second field after it.
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                # A forked process has the command line of the one that it was forked from, but a name of its own.
                name = (folder / "comm").read_text().strip()
                names[int(folder.name)] = name if name == "ka2l-cell" else command
            except (OSError, IndexError):
                continue
    wanted = {root}
    while more := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= more
    for pid in wanted & parents.keys():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines() if line.endswith("kB")}
        yield kind_of(names[pid]), sizes.get("Pss", 0) / 2**20, sizes.get("Rss", 0) / 2**20


def kind_of(command: str) -> str:
    """What a process is for, from its command line."""
    if command.startswith("ray::"):
        return command.split()[0].split("(")[0]
    if command.startswith("ka2l-cell") or "engine.cli run" in command:
        return "driver of a cell"
    if "multiprocessing.forkserver" in command:
        return "what cells are forked from"
    if "engine.cli benchmark" in command:
        return "coordinator"
    return "Ray itself"


def run_together(models: dict[str, Path], pool: Path, work: Path) -> tuple[Watched, Path]:
    """All nine by `ka2l benchmark`."""
    matrix = {
        "name": "nine",
        "models": {name: {"model": {"path": str(path)}} for name, path in models.items()},
        "data": {"things": {"pool": {"path": str(pool)}}},
        "common": CONFIG,
        "max_running": len(models),
        "ray": RAY,
    }
    (work / "nine.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    run_dir = work / "together"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "engine.cli", "benchmark", str(work / "nine.yaml"), "--run-dir", str(run_dir)]
    return watch(command, work / "together.log"), run_dir


def run_alone(name: str, model: Path, pool: Path, work: Path) -> Watched:
    """One of them by `ka2l run`."""
    values = CONFIG | {
        "name": name,
        "model": CONFIG["model"] | {"path": str(model)},
        "pool": CONFIG["pool"] | {"path": str(pool)},
        "ray": RAY,
    }
    (work / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run_dir = work / "alone" / name
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "engine.cli", "run", str(work / f"{name}.yaml"), "--run-dir", str(run_dir)]
    return watch(command, work / f"{name}.log")


def most_at_once(run_dir: Path) -> int:
    """Cells whose processes ran at the same time."""
    running = most = 0
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        running += {"cell_started": 1, "cell_ended": -1}.get(event["event"], 0)
        most = max(most, running)
    return most


def stages_of(run_dir: Path, seconds: float) -> list[tuple[float, float]]:
    """(CPUs that workers held, seconds) of each stage of a run that took ``seconds``, what lies between them first."""
    run = RunDirectory(run_dir)
    config = parse_config((run_dir / "config.yaml").read_text())
    chain = []
    for stage in committed_stages(run):
        manifest = stage.require()
        held = stage.name in ("observe", "cluster", "extract", "feedback", "tune")
        chain.append((room_of(stage.name, config).cpus if held else 0.0, manifest.seconds))
    return [(0.0, max(0.0, seconds - sum(item[1] for item in chain))), *chain]


def main() -> None:
    """Build, run, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_nine"), help="where the runs go; kept")
    parser.add_argument("--only", nargs="+", help="architectures; all nine where not given")
    parser.add_argument("--out", help="result file; in benchmarks/results/nine where not given")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    models, pool = build_models(work / "models"), work / "pool.jsonl"
    models = {name: path for name, path in models.items() if not arguments.only or name in arguments.only}
    write_pool(pool)
    together, run_dir = run_together(models, pool, work)
    print("together", together, flush=True)
    alone = {}
    for name, path in models.items():
        alone[name] = run_alone(name, path, pool, work)
        print("alone", name, alone[name], flush=True)
    report = json.loads((run_dir / "benchmark.json").read_text())
    in_sum = sum(item.seconds for item in alone.values())
    modelled = replay({name: stages_of(work / "alone" / name, alone[name].seconds) for name in models}, RAY["num_cpus"])
    path = write_result(
        "nine",
        {
            "num_cells": len(models),
            "config": CONFIG,
            "makespan_s": together.seconds,
            "sum_alone_s": round(in_sum, 1),
            "makespan_over_sum_alone": round(together.seconds / in_sum, 4),
            "makespan_modelled_s": round(modelled, 1),
            "most_cells_at_once": most_at_once(run_dir),
            "memory": "PSS of all processes of the tree, sampled every second; RSS counts shared pages repeatedly",
            "peak_pss_gib": together.peak_pss_gib,
            "peak_rss_gib": together.peak_rss_gib,
            "peak_processes": together.peak_processes,
            "pss_gib_at_peak_by_kind": together.at_peak,
            "num_complete": sum(cell["status"] == "complete" for cell in report["cells"]),
            "num_curves": sum(len(item["curve"]) > 1 for item in report["combinations"]),
            "by_cell": {
                cell["model"]: {
                    "together_s": round(cell["wall_seconds"], 1),
                    "alone_s": alone[cell["model"]].seconds,
                    "alone_peak_pss_gib": alone[cell["model"]].peak_pss_gib,
                    "accuracy": [point["accuracy"] for point in cell["curve"]],
                }
                for cell in report["cells"]
            },
        },
        arguments.out,
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
