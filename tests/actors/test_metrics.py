"""Figures for Ray's metrics: what is counted, that it is exported, and that nothing of it can end a run."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors import metrics
from actors.metrics import METRICS, Tags
from actors.workers import leases
from actors.workers.lease_queue import Capacity, Request
from actors.workers.leases import LeaseHost

TAGS = Tags("mine", "a-cell", "1", "observe")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tags, float]]:
    """What is handed to Ray, in order."""
    calls: list[tuple[str, Tags, float]] = []
    monkeypatch.setattr(metrics, "_record", lambda *call: calls.append(call))
    return calls


def exported(wanted: set[str], run: str, timeout_s: float = 60.0) -> dict[str, list[Any]]:
    """Samples of one run by name, as this node exports them, once all wanted names are there."""
    import ray

    (node,) = [node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(url, timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
        found = {name: [sample for sample in samples if sample.name == name] for name in wanted}
        if all(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def test_a_shard_is_counted_with_its_rows_its_time_and_its_tokens(recorded: list[Any]) -> None:
    stats = {"seconds": 2.5, "tokens_prompt": 30.0, "tokens_generated": 12.0, "generate_seconds": 1.0}
    metrics.count_shard(TAGS, 20, stats)
    assert recorded == [
        (metrics.ROWS, TAGS, 20.0),
        (metrics.SHARDS, TAGS, 1.0),
        (metrics.SHARD_SECONDS, TAGS, 2.5),
        (metrics.TOKENS_PROMPT, TAGS, 30.0),
        (metrics.TOKENS_GENERATED, TAGS, 12.0),
    ]


def test_failures_are_counted_by_stage(recorded: list[Any]) -> None:
    metrics.count_failed_rows(TAGS, 3)
    metrics.count_worker_restarts(TAGS)
    assert recorded == [(metrics.FAILED_ROWS, TAGS, 3.0), (metrics.WORKER_RESTARTS, TAGS, 1.0)]


def test_the_queue_of_a_benchmark_says_how_many_hold_and_wait(
    recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "alive_nodes", lambda: {"node": Capacity(1, 0)})

    async def two_stages_want_one_worker() -> None:
        host = LeaseHost(60.0, "nine")
        await host.acquire(Request("first/1", Capacity(1, 0), 1, 1))
        second = asyncio.create_task(host.acquire(Request("second/1", Capacity(1, 0), 1, 1)))
        await asyncio.sleep(0)
        await host.give_back("first/")
        await second

    asyncio.run(two_stages_want_one_worker())
    said = [(name, value) for name, tags, value in recorded if tags == Tags("nine")]
    held = [int(value) for name, value in said if name == metrics.LEASES_HELD]
    waiting = [int(value) for name, value in said if name == metrics.LEASES_WAITING]
    assert list(zip(held, waiting, strict=True)) == [(1, 0), (1, 1), (1, 0)]


def test_gpu_memory_is_that_of_all_gpus_of_the_worker(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 1000 + index)
    metrics.show_gpu_memory(TAGS)
    assert recorded == [(metrics.GPU_MEMORY, TAGS, 2001.0)]


def test_without_a_gpu_there_is_no_gpu_memory(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    metrics.show_gpu_memory(TAGS)
    monkeypatch.delitem(sys.modules, "torch")  # as in a worker that has not imported it
    metrics.show_gpu_memory(TAGS)
    assert recorded == []


def test_a_gpu_that_cannot_be_read_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(_: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_memory_used", fail)
    assert metrics.gpu_memory_bytes() is None


def test_no_error_of_metrics_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def broken(name: str, *_: Any) -> Any:
        made.append(name)
        raise RuntimeError("no metrics today")

    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "_made", {})
    monkeypatch.setattr(metrics, "Counter", broken)
    monkeypatch.setattr(metrics, "Gauge", broken)
    metrics.count(metrics.ROWS, TAGS)
    metrics.show(metrics.SHARDS_MISSING, TAGS, 3)
    assert made == [metrics.ROWS, metrics.SHARDS_MISSING]


def test_without_ray_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_made", {})
    metrics.count(metrics.ROWS, TAGS)
    assert metrics._made == {}


@pytest.mark.slow
def test_ray_exports_what_driver_and_workers_say_under_the_names_that_the_dashboard_asks_for(ray_session: None) -> None:
    import ray

    run = f"run-{time.time_ns()}"
    tags = [Tags(run, stage=stage) for stage in ("observe", "extract")]

    @ray.remote(num_cpus=0)
    class Worker:
        def show(self, tags: Tags) -> None:
            metrics.show(metrics.GPU_MEMORY, tags, 2.0**33)

    worker = Worker.remote()
    ray.get(worker.show.remote(tags[0]))  # it lives until its gauge has been seen
    for name in METRICS:
        if name != metrics.GPU_MEMORY:
            for own in tags:
                (metrics.count if name.endswith("_total") else metrics.show)(name, own, 5)
    metrics.count(metrics.ROWS, tags[0], 2)
    found = exported({f"ray_{name}" for name in METRICS}, run)
    assert all(found.values()), [name for name, samples in found.items() if not samples]
    rows = {sample.labels["stage"]: sample.value for sample in found[f"ray_{metrics.ROWS}"]}
    assert rows == {"observe": 7, "extract": 5}
    assert [sample.value for sample in found[f"ray_{metrics.GPU_MEMORY}"]] == [2.0**33]
    assert {*Tags._fields} <= found[f"ray_{metrics.SHARDS_MISSING}"][0].labels.keys()
