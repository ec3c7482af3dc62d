"""How well would a benchmark of 9 models, 3 data sets and 3 seeds fill 8, 64 and 512 GPUs? A discrete-event model.

The queue is the real one (`actors.workers.leases`), the engines' sizes are those that `ka2l.model.sizing` gives each
model on cards of 80 GiB; what is modelled is how long a stage takes: a start, and work that several engines share. The
bound is that of list scheduling: no schedule ends before all work is done by all GPUs, nor before the longest chain of
stages.

Takes seconds, needs no cluster:

    python benchmarks/bench_schedule.py
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from machine import write_result

from actors.workers.lease_queue import Capacity, LeaseQueue, Request
from engine.execution.remaining import EXTRACT_S, OBSERVE_S, REHEARSE_S, TUNE_S, RunSize, work_left
from ka2l.model.sizing import ModelNeeds, engine_shape

GIB = 2**30
#: Parameters (billions), bytes of KV cache a token and attention heads, by the published configs.
MODELS = {
    "llama-2-7b": (6.74, 524_288, 32),
    "llama-3.1-8b": (8.03, 131_072, 32),
    "mistral-7b-v0.1": (7.24, 131_072, 32),
    "mistral-7b-v0.3": (7.25, 131_072, 32),
    "qwen1.5-7b": (7.72, 524_288, 32),
    "qwen2.5-7b": (7.62, 57_344, 28),
    "glm-4-9b": (9.40, 40_960, 32),
    "gemma-2-9b": (9.24, 344_064, 16),
    "phi-3.5-mini": (3.82, 393_216, 32),
}
#: Questions of a pool.
DATA = {"small": 5_000, "medium": 20_000, "large": 80_000}
SEEDS = (0, 1, 2)
ROUNDS = 3
#: Seconds of an engine's start, assumed. What work takes is assumed in `engine.execution.remaining`.
START_S = 60.0
ANNOTATE_S = 120.0
NUM_SEED, BUDGET_SHARE = 1_500, 0.05
MAX_ENGINES = 8


class Stage(NamedTuple):
    """Work of one stage of one cell."""

    gpus: float
    """Of each engine; 0 for what needs none."""
    work_s: float
    """Engine-seconds, shared by as many engines as there are."""
    start_s: float
    max_engines: int
    round_index: int

    def seconds(self, engines: int) -> float:
        return self.start_s + self.work_s / engines


def stages(model: str, num_questions: int) -> Iterator[Stage]:
    """What a cell does, one after the other."""
    billions, kv_bytes, heads = MODELS[model]
    needs = ModelNeeds(int(billions * 1e9), int(2e9 * billions), kv_bytes, heads)
    gpus = engine_shape(needs, 80, num_tokens=64 * 1024).gpus
    # A part of a GPU is slower by as much: what is fixed is the work of the whole card.
    slow = billions / 7 / min(1.0, gpus)
    budget = BUDGET_SHARE * num_questions
    for index in range(ROUNDS + 1):
        asked = OBSERVE_S * NUM_SEED + (REHEARSE_S * num_questions if index == 0 else 0)
        yield Stage(gpus, asked * slow, START_S, MAX_ENGINES, index)
        if index == ROUNDS:
            return
        yield Stage(gpus, EXTRACT_S * num_questions * slow, START_S / 2, MAX_ENGINES, index)
        yield Stage(0, ANNOTATE_S, 0, 1, index)
        # Training holds whole GPUs: weights, gradients of the adapter and activations. As many rows are rehearsed.
        yield Stage(1.0, TUNE_S * 2 * budget * (index + 1) * billions / 7, START_S, MAX_ENGINES, index)


def sliced(stage: Stage, slice_s: float) -> list[Stage]:
    """The stage in parts of at most ``slice_s`` engine-seconds, each with a start of its own."""
    parts = max(1, math.ceil(stage.work_s / slice_s))
    return [stage._replace(work_s=stage.work_s / parts)] * parts


def simulate(cells: dict[str, list[Stage]], num_gpus: int) -> dict[str, float]:
    """Makespan and busy GPU-seconds of all cells on nodes of eight GPUs."""
    clock = [0.0]
    nodes = {f"node-{index}": Capacity(1e9, 8) for index in range(num_gpus // 8)}
    queue = LeaseQueue(nodes, patience_s=300, clock=lambda: clock[0])
    at = dict.fromkeys(cells, 0)
    ends: list[tuple[float, str]] = []
    busy = 0.0

    def left(cell: str) -> float:
        """What the run itself says that it has left."""
        model, data, _ = cell.split("|")
        questions = DATA[data]
        size = RunSize(MODELS[model][0], questions, NUM_SEED, questions, round(BUDGET_SHARE * questions), ROUNDS)
        return work_left(size, cells[cell][at[cell]].round_index)

    def ask(cell: str) -> None:
        if at[cell] == len(cells[cell]):
            queue.forget(cell)
            return
        stage = cells[cell][at[cell]]
        if not stage.gpus:
            heapq.heappush(ends, (clock[0] + stage.seconds(1), cell))
            return
        queue.ask(Request(cell, Capacity(0, stage.gpus), stage.max_engines, 1, left=left(cell)))

    for cell in cells:
        ask(cell)
    while True:
        for grant in queue.grants():
            stage = cells[grant.key][at[grant.key]]
            seconds = stage.seconds(len(grant.nodes))
            busy += seconds * stage.gpus * len(grant.nodes)
            heapq.heappush(ends, (clock[0] + seconds, grant.key))
        if not ends:
            return {"makespan_s": clock[0], "busy_gpu_s": busy}
        clock[0], cell = heapq.heappop(ends)
        queue.give_back(cell)
        at[cell] += 1
        ask(cell)


def replay(cells: dict[str, list[tuple[float, float]]], cpus: float) -> float:
    """Makespan of runs on one node, by the same queue, from what their stages took alone: (CPUs held, seconds) each.

    Checks the model against a benchmark that was really run: `bench_nine.py` writes both.
    """
    clock = [0.0]
    queue = LeaseQueue({"node": Capacity(cpus, 0)}, clock=lambda: clock[0])
    at = dict.fromkeys(cells, 0)
    ends: list[tuple[float, str]] = []

    def ask(cell: str) -> None:
        if at[cell] < len(cells[cell]):
            held, seconds = cells[cell][at[cell]]
            if held:
                queue.ask(Request(cell, Capacity(held, 0), 1, 1))
            else:
                heapq.heappush(ends, (clock[0] + seconds, cell))

    for cell in cells:
        ask(cell)
    while True:
        for grant in queue.grants():
            heapq.heappush(ends, (clock[0] + cells[grant.key][at[grant.key]][1], grant.key))
        if not ends:
            return clock[0]
        clock[0], cell = heapq.heappop(ends)
        queue.give_back(cell)
        at[cell] += 1
        ask(cell)


def bounds(cells: dict[str, list[Stage]], num_gpus: int) -> dict[str, float]:
    """No schedule ends before either."""
    work = sum(stage.seconds(1) * stage.gpus for chain in cells.values() for stage in chain) / num_gpus
    chain = max(sum(stage.seconds(stage.max_engines) for stage in chain) for chain in cells.values())
    return {"all_work_s": work, "longest_chain_s": chain}


def main() -> None:
    """Simulate, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", type=float, default=3600.0, help="engine-seconds after which a stage asks again")
    parser.add_argument("--out", help="result file; in benchmarks/results/schedule where not given")
    arguments = parser.parse_args()
    whole = {f"{m}|{d}|{seed}": list(stages(m, size)) for m in MODELS for d, size in DATA.items() for seed in SEEDS}
    cells = {
        cell: [part for stage in chain for part in sliced(stage, arguments.slice)] for cell, chain in whole.items()
    }
    found: dict[str, Any] = {}
    for num_gpus in (8, 64, 512):
        limits = bounds(whole, num_gpus)
        outcome = simulate(cells, num_gpus)
        bound = max(limits.values())
        found[str(num_gpus)] = (
            outcome
            | limits
            | {
                "bound_over_makespan": bound / outcome["makespan_s"],
                "busy_share": outcome["busy_gpu_s"] / num_gpus / outcome["makespan_s"],
                "limited_by": max(limits, key=lambda name: limits[name]),
            }
        )
        print(num_gpus, json.dumps(found[str(num_gpus)]))
    path = write_result(
        "schedule", {"num_cells": len(cells), "slice_s": arguments.slice, "by_num_gpus": found}, arguments.out
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
