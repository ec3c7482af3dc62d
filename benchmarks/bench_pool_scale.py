"""How does a campaign grow with its pool? See ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from machine import write_result

EXPLANATION = """How does a campaign grow with its pool: seconds, rows a second, memory?

For every size the real stages `pool`, `extract`, `probe`, `knowledge` and `select` (by `probe` and by `probe_diverse`,
the sampled k-centre) and the report run on so many synthetic questions, each size in a process of its own. No model is
asked: a host derives hidden states (2 layers of 16 values) from the questions' ids, so that all that is measured is
what the engine itself takes. Memory is sampled every second:

  driver RSS        of the driver alone, with pages of Ray's object store that it has looked at; the highest value
                    since its start, as the kernel keeps it, is `driver_max_rss_mib`
  driver's own      the same without those shared pages
  whole tree        proportional set sizes of the driver and all its descendants, Ray's processes and workers, added up:
                    pages that several share, such as the object store in /dev/shm, count once

"Further rows" is the rate at which the rows are done that a size has more than the one before. Without what takes the
same for every pool (starting processes, importing libraries, training the probe on its 2,000 seed questions) it says
whether seconds grow in proportion to the pool. Of sizes up to 10^6, where that is much of all, the median of --repeats
runs is taken, after a run that only warms the file cache.

With --kill SIZE the stages of that size are made once more: the driver and all its descendants are killed (SIGKILL)
when half of the shards of `extract` are written, and resumed, killed again in the middle of `knowledge` and resumed
again. Shards that were begun twice are counted, and what is selected must be the same as without a kill.

    python benchmarks/bench_pool_scale.py                       # 10^4 to 10^7, and kills at 10^6 and 10^7
    python benchmarks/bench_pool_scale.py --sizes 20000 --shard-rows 1000 --kill 20000 --out /tmp/pool_scale.json
"""
HERE = Path(__file__).resolve()
STAGES = ("pool", "extract", "probe", "knowledge", "select probe", "select probe_diverse", "report")
_MIB = 2**20


class Watch(threading.Thread):
    """Samples the memory of a process and its descendants every second, until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.done = threading.Event()
        self.samples: list[dict[str, float]] = []

    def run(self) -> None:
        while not self.done.wait(1.0):
            if (sample := memory(self.pid)) is not None:
                self.samples.append(sample)


def memory(pid: int) -> dict[str, float] | None:
    """MiB of a process and of all its descendants; None where it has ended."""
    try:
        driver = psutil.Process(pid)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        sample = {
            "time": time.time(),
            "driver_rss": int(status["VmRSS"].split()[0]) / 1024,
            "driver_own": (int(status["RssAnon"].split()[0]) + int(status["RssFile"].split()[0])) / 1024,
        }
        family = [driver, *driver.children(recursive=True)]
    except (psutil.Error, OSError, KeyError):
        return None
    total = 0.0
    for process in family:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return sample | {"tree": total}


def run_process(spec: Mapping[str, Any], folder: Path, until: Callable[[], bool] | None = None) -> list[dict[str, Any]]:
    """One process from start to end, or until it is to be killed; returns memory samples.

    Raises:
        SystemExit: it failed, or ended before it was to be killed.
    """
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    script = HERE.with_name("pool_scale_process.py")
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(path)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])},
        )
        watch = Watch(process.pid)
        watch.start()
        family: list[psutil.Process] | None = None
        while process.poll() is None:
            time.sleep(0.02 if until else 0.2)
            if until is not None and until():
                family = psutil.Process(process.pid).children(recursive=True)
                for member in [process, *family]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(signal.SIGKILL)
                process.wait()
                break
        watch.done.set()
        watch.join()
    if family is not None:
        while any(is_alive(member) for member in family):
            time.sleep(0.1)
    elif process.returncode or until is not None:
        sys.exit(f"a process ended with {process.returncode}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return watch.samples


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stage_times(path: Path) -> dict[str, dict[str, float]]:
    """Start and seconds of the stages that have ended."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["stage"]: row for row in rows if "seconds" in row}


def summarise(times: Mapping[str, Mapping[str, float]], samples: Sequence[Mapping[str, float]], num: int) -> Any:
    """Seconds, rows a second and peak memory by stage."""
    found = {}
    for name in STAGES:
        start, seconds = times[name]["started"], times[name]["seconds"]
        inside = [item for item in samples if start <= item["time"] <= start + seconds + 1.0]
        found[name] = {"seconds": seconds, "rows_per_s": num / seconds}
        found[name] |= {f"{key}_mib": max((item[key] for item in inside), default=None) for key in samples[0]
                        if key != "time"}  # fmt: skip
    total = sum(item["seconds"] for item in found.values())
    peaks = {f"{key}_mib": max(item[key] for item in samples) for key in samples[0] if key != "time"}
    return {"stages": found, "seconds": total, "rows_per_s": num / total, "peak": peaks}


def num_shards(folder: Path) -> int:
    """Whole shards of a stage so far."""
    return sum(name.startswith("part-") for name in os.listdir(folder)) if folder.is_dir() else 0


def begun(log: Path) -> dict[str, list[str]]:
    """Shards that a stage began, by stage, in order, once for each time."""
    rows = [line.split() for line in log.read_text().splitlines()]
    return {stage: [name for kind, name in rows if kind == stage] for stage in ("extract", "knowledge")}


def run_killed(spec: dict[str, Any], folder: Path, expected: Mapping[str, str]) -> dict[str, Any]:
    """Make all but the pool again, killed in the middle of two stages; returns what was done twice."""
    round_dir = Path(spec["run_dir"]) / "round-000"
    shutil.rmtree(round_dir)
    log = folder / "begun-killed.txt"
    spec = spec | {"log": str(log), "stages": str(folder / "stages-killed.txt"), "profile": None}
    total = num_shards(Path(spec["run_dir"]) / "pool" / "questions")
    kept = {}
    for stage in ("extract", "knowledge"):
        run_process(spec, folder, until=lambda stage=stage: num_shards(round_dir / stage) >= (total + 1) // 2)  # type: ignore[misc]
        kept[stage] = num_shards(round_dir / stage)
    run_process(spec, folder)
    result = json.loads(Path(spec["result"]).read_text())
    names = begun(log)
    twice = {stage: len(names[stage]) - len(set(names[stage])) for stage in names}
    return {
        "num_shards": total,
        "shards_begun": {stage: len(names[stage]) for stage in names},
        "shards_kept": kept,
        "shards_redone": twice,
        "same_results": result["digests"] == expected,
    }


def measure(num: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    with tempfile.TemporaryDirectory(prefix="ka2l-scale-", dir=options.scratch) as name:
        folder = Path(name)
        spec: dict[str, Any] = {
            "num_questions": num,
            "pool": str(folder / "pool.parquet"),
            "run_dir": str(folder / "run"),
            "result": str(folder / "result.json"),
            "stages": str(folder / "stages.txt"),
            "log": str(folder / "begun.txt"),
            "shard_rows": options.shard_rows,
            "workers": options.workers,
            "num_seed": 2_000,
            "num_eval": 1_000,
            "profile": options.profile,
        }
        run_process(spec | {"write_pool": True}, folder)
        spec["write_pool"] = False
        samples = run_process(spec, folder)
        result = json.loads(Path(spec["result"]).read_text())
        found = {"num_questions": num} | summarise(stage_times(folder / "stages.txt"), samples, num) | result
        found["pool_mib"] = Path(spec["pool"]).stat().st_size / _MIB
        found["run_dir_mib"] = sum(file.stat().st_size for file in Path(spec["run_dir"]).rglob("*.*")) / _MIB
        if options.profile:
            shutil.copy(folder / f"run.{options.profile}.prof", options.profile_out)
        if num in options.kill:
            found["killed"] = run_killed(spec, folder, result["digests"])
    return found


def growth(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows a second of the rows that each size has more than the one before, by stage and of all together."""
    found = []
    for before, size in pairwise(sizes):
        rows = size["num_questions"] - before["num_questions"]
        seconds = {name: size["stages"][name]["seconds"] - before["stages"][name]["seconds"] for name in STAGES}
        seconds["all"] = sum(seconds.values())
        rates = {name: rows / taken if taken > 0 else None for name, taken in seconds.items()}
        found.append({"from": before["num_questions"], "to": size["num_questions"], "rows_per_s": rates})
    return found


def print_table(sizes: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", *(f"{size['num_questions']:,}" for size in sizes), title="rows a second")
    for name in STAGES:
        table.add_row(name, *(f"{size['stages'][name]['rows_per_s']:,.0f}" for size in sizes))
    table.add_row("all", *(f"{size['rows_per_s']:,.0f}" for size in sizes))
    for name in (*STAGES, "all"):
        rates = [step["rows_per_s"][name] for step in growth(sizes)]
        table.add_row(f"{name}, further rows", "", *(f"{rate:,.0f}" if rate else "" for rate in rates))
    table.add_row("seconds", *(f"{size['seconds']:,.1f}" for size in sizes))
    for key in ("driver_rss_mib", "driver_own_mib", "tree_mib"):
        table.add_row(f"peak {key}", *(f"{size['peak'][key]:,.0f}" for size in sizes))
    Console(width=120).print(table)
    for size in sizes:
        if "killed" in size:
            Console(width=120).print({"size": size["num_questions"]} | size["killed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=EXPLANATION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="questions")
    parser.add_argument("--kill", type=int, nargs="*", default=[10**6, 10**7], help="sizes that are killed, too")
    parser.add_argument("--shard-rows", type=int, default=50_000, help="questions a shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="workers of extract (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of sizes up to 10^6 (default: %(default)s)")
    parser.add_argument("--scratch", default=None, help="folder for pools and runs; some GB for 10^7")
    parser.add_argument("--profile", default=None, help="stage to profile (cProfile) in the driver")
    parser.add_argument("--profile-out", default="pool_scale.prof", help="where the profile goes")
    parser.add_argument("--out", help="result file; in benchmarks/results/pool_scale where not given")
    options = parser.parse_args()
    sizes = []
    measure(options.sizes[0], options)
    for num in options.sizes:
        print(f"{num:,} questions ...", file=sys.stderr, flush=True)
        runs = [measure(num, options) for _ in range(options.repeats if num <= 10**6 else 1)]
        sizes.append(sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2])
        settings = {key: getattr(options, key) for key in ("shard_rows", "workers")}
        found = {"settings": settings, "growth": growth(sizes), "sizes": sizes}
        write_result("pool_scale", found, options.out)
    print_table(sizes)


if __name__ == "__main__":
    main()
