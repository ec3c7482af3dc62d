"""Metrics of runs, which every Ray node exports to Prometheus as ``ray_NAME``.

Counters and gauges with the same tags throughout (`Tags`). Where Ray is not running they do nothing, and no error of
theirs ends a run. cluster/grafana-dashboard.json plots them.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge

_log = logging.getLogger(__name__)

ROWS = "ka2l_rows_total"
SHARDS = "ka2l_shards_total"
SHARD_SECONDS = "ka2l_shard_seconds_total"
SHARDS_MISSING = "ka2l_shards_missing"
TOKENS_PROMPT = "ka2l_tokens_prompt_total"
TOKENS_GENERATED = "ka2l_tokens_generated_total"
TOKENS_TRAINED = "ka2l_tokens_trained_total"
FORWARD_PASSES = "ka2l_forward_passes_total"
LEASES_WAITING = "ka2l_leases_waiting"
LEASES_HELD = "ka2l_leases_held"
GPU_MEMORY = "ka2l_gpu_memory_bytes"
FAILED_ROWS = "ka2l_failed_rows_total"
WORKER_RESTARTS = "ka2l_worker_restarts_total"

#: Every metric with its description. Names of counters end in ``_total``.
METRICS = {
    ROWS: "Rows that stages have written.",
    SHARDS: "Shards that stages have written.",
    SHARD_SECONDS: "Seconds that workers were at work on the shards they have written.",
    SHARDS_MISSING: "Shards that a stage at work has still to make.",
    TOKENS_PROMPT: "Tokens read: in annotate by the teacher, else by the model.",
    TOKENS_GENERATED: "Tokens written: in annotate by the teacher, else by the model.",
    TOKENS_TRAINED: "Tokens trained on, each time that they were.",
    FORWARD_PASSES: "Prompts that the model under study has read.",
    LEASES_WAITING: "Stages of a benchmark's cells that wait for workers.",
    LEASES_HELD: "Stages of a benchmark's cells that have workers.",
    GPU_MEMORY: "Bytes in use, by whomever, on the GPUs that a worker sees.",
    FAILED_ROWS: "Rows that were given up.",
    WORKER_RESTARTS: "Workers that died or hung and were replaced.",
}
#: What stats and costs call what these counters count.
COUNTED_ITEMS = {
    "tokens_prompt": TOKENS_PROMPT,
    "tokens_generated": TOKENS_GENERATED,
    "tokens_trained": TOKENS_TRAINED,
    "forward_passes": FORWARD_PASSES,
}


class Tags(NamedTuple):
    """Whose figure it is."""

    run: str
    """Last part of the run directory; of a cell, the benchmark's."""
    cell: str = ""
    """Of a benchmark; empty for a run of its own."""
    round: str = ""
    """Empty for the pool's stages."""
    stage: str = ""


_made: dict[str, Any] = {}
_lock = threading.Lock()


def count(name: str, tags: Tags, amount: float = 1.0) -> None:
    """Add to one of the counters in METRICS; 0 or less adds nothing."""
    if amount > 0:
        _record(name, tags, float(amount))


def show(name: str, tags: Tags, value: float) -> None:
    """Set one of the gauges in METRICS. It is exported until this process ends."""
    _record(name, tags, float(value))


def count_shard(tags: Tags, num_rows: int, stats: Mapping[str, float]) -> None:
    """A shard has been written: its rows, and what it took as its `Stats` say."""
    count(ROWS, tags, num_rows)
    count(SHARDS, tags)
    count(SHARD_SECONDS, tags, stats.get("seconds", 0.0))
    count_cost(tags, stats)


def count_cost(tags: Tags, cost: Mapping[str, float]) -> None:
    """Tokens and forward passes; other items are not counted here."""
    for item, name in COUNTED_ITEMS.items():
        count(name, tags, cost.get(item, 0.0))


def count_failed_rows(tags: Tags, num_rows: int) -> None:
    """Rows were given up: nothing of them will be in the stage's table."""
    count(FAILED_ROWS, tags, num_rows)


def count_worker_restarts(tags: Tags, num_workers: int = 1) -> None:
    """Workers died or hung and were replaced."""
    count(WORKER_RESTARTS, tags, num_workers)


def show_gpu_memory(tags: Tags | None) -> None:
    """In a worker: how much of its GPUs is in use; nothing without CUDA, or where no tags are given."""
    if tags is not None and (used := gpu_memory_bytes()) is not None:
        show(GPU_MEMORY, tags, used)


def gpu_memory_bytes() -> int | None:
    """Bytes in use on all GPUs that this process sees, as nvidia-smi says; None without CUDA.

    An engine may hold its memory in a process of its own, so what torch has allocated here would say too little.
    """
    torch = sys.modules.get("torch")  # a worker that has not imported it uses no GPU
    try:
        if torch is None or not torch.cuda.is_available():
            return None
        return sum(torch.cuda.device_memory_used(index) for index in range(torch.cuda.device_count()))
    except Exception:
        _log.debug("GPU memory cannot be read", exc_info=True)
        return None


def _record(name: str, tags: Tags, value: float) -> None:
    try:
        if not ray.is_initialized():
            return
        with _lock:
            if name not in _made:
                kind = Counter if name.endswith("_total") else Gauge
                _made[name] = kind(name, METRICS[name], Tags._fields)
        metric = _made[name]
        (metric.inc if isinstance(metric, Counter) else metric.set)(value, tags._asdict())
    except Exception:
        _log.debug("%s was not recorded", name, exc_info=True)
