"""A campaign on a cluster of two nodes, each a raylet of its own, comes to what one node comes to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_tables import check_same_tables
from tensorboard_files import scalars

from actors import metrics
from engine.execution.trackers import round_figures
from engine.store.events import read_events
from engine.store.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.whole]

BIN = Path(sys.executable).parent
#: Each node has one core, and each stage wants two workers of one core. The first round is enough.
SPREAD = [
    "sampler.replicas=2",
    "extraction.replicas=2",
    "ray.address=auto",
    "budget.annotations=12",
    "trackers=[tensorboard]",
]


class Cluster(NamedTuple):
    address: str
    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(cluster: Cluster, code: str) -> Any:
    """What a program that joins the cluster prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=cluster.environment, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


NODES = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([node["NodeID"] for node in ray.nodes() if node["Alive"]]))
"""
ACTORS = """
import collections, json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False)
found = collections.defaultdict(set)
for actor in list_actors(limit=1000, detail=True):
    if actor.node_id:
        found[actor.class_name].add(actor.node_id)
print(json.dumps({name: sorted(nodes) for name, nodes in found.items()}))
"""
ENDPOINTS = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a second node of one core each, with token authentication, apart from any other Ray here."""
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ka2l-two-") as folder:  # a socket's path must be short
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-the-tests-0123456789abcdef",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_ADDRESS": f"127.0.0.1:{port}",
        }
        start = [str(BIN / "ray"), "start", "--num-cpus=1", "--node-ip-address=127.0.0.1", "--block"]
        started = []

        def begin(*words: str) -> None:
            # Ray's agents, which take jobs, would all listen at one port of this machine.
            words = (*words, f"--dashboard-agent-listen-port={free_port()}")
            own = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
            log = (Path(folder) / f"start-{len(started)}.log").open("w")
            started.append(subprocess.Popen([*start, *words], env=own, stdout=log, stderr=log, start_new_session=True))

        try:
            begin("--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
            found = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
            wait_for_nodes(found, 1)
            begin(f"--address=127.0.0.1:{port}")
            wait_for_nodes(found, 2)
            yield found
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            if len(python(cluster, NODES)) == count:
                return
        except subprocess.CalledProcessError:
            pass
        assert time.monotonic() < deadline, "the nodes did not come up"
        time.sleep(1)


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The campaign of `finished`, submitted as a job to two nodes."""
    run_dir = tmp_path_factory.mktemp("two-nodes") / "run"
    options = [word for item in SPREAD for word in ("--set", item)]
    command = [
        *(str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--"),
        *(str(BIN / "ka2l"), "run", str(finished.files.config), "--run-dir", str(run_dir), "--resume", *options),
    ]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            command, env=cluster.environment, capture_output=True, text=True, timeout=500, check=False
        )
        # A node may be there some time before the agent on it that takes jobs.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run_dir


def test_a_submitted_job_comes_to_the_tables_of_one_node(submitted: Path, finished: Any) -> None:
    assert ("tune", 0) in check_same_tables(RunDirectory(submitted), RunDirectory(finished.run_dir))


def test_its_workers_were_placed_on_both_nodes(submitted: Path, cluster: Cluster) -> None:
    nodes = set(python(cluster, NODES))
    workers = {name: set(found) for name, found in python(cluster, ACTORS).items() if "_Worker" in name}
    assert len(nodes) == 2
    assert workers
    assert set.union(*workers.values()) == nodes


def test_rays_metrics_have_counted_the_rows_and_tokens_that_are_committed(submitted: Path, cluster: Cluster) -> None:
    counted: Counter[tuple[str, str, str]] = Counter()
    for endpoint in python(cluster, ENDPOINTS):
        with urllib.request.urlopen(f"{endpoint}/metrics", timeout=30) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        for sample in (sample for family in families for sample in family.samples):
            if sample.labels.get("run") == submitted.name:
                counted[sample.name, sample.labels["round"], sample.labels["stage"]] += sample.value
    for name, index in [("observe", 0), ("extract", 0), ("annotate", 0), ("observe", 1), ("cluster", 1)]:
        manifest = RunDirectory(submitted).stage(name, index).require()
        shards = [entry for entry in manifest.files if entry.num_rows is not None]
        assert counted[f"ray_{metrics.SHARDS}", str(index), name] == len(shards)
        for item, metric in metrics.COUNTED_ITEMS.items():
            assert counted[f"ray_{metric}", str(index), name] == manifest.cost.get(item, 0.0)
        assert counted[f"ray_{metrics.SHARDS_MISSING}", str(index), name] == 0
    assert counted[f"ray_{metrics.ROWS}", "", "references"] == 108


def test_its_tracker_was_told_each_round_as_the_summary_has_it_and_every_training_step(submitted: Path) -> None:
    found = list(scalars(submitted / "tensorboard"))
    rounds = json.loads((submitted / "summary.json").read_text())["rounds"]
    assert len(rounds) == 2
    for row in rounds:
        for key, value in round_figures(row).items():
            told = [told for name, index, told in found if (name, index) == (f"round/{key}", row["round"])]
            assert told == [pytest.approx(value, rel=1e-6)]
    steps = [event for event in read_events(RunDirectory(submitted)) if event["event"] == "training_step"]
    losses = [(index, told) for name, index, told in found if name == "training/loss"]
    assert losses == [(event["step"], pytest.approx(event["loss"])) for event in steps]


def test_without_the_token_the_cluster_is_closed(cluster: Cluster, finished: Any, tmp_path: Path) -> None:
    environment = cluster.environment | {"RAY_AUTH_TOKEN": "another-token-0123456789abcdef0123456789"}
    done = subprocess.run(
        [str(BIN / "ka2l"), "run", str(finished.files.config), "--run-dir", str(tmp_path / "run"), "--set",
         "ray.address=auto"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr
