"""A driver that is killed loses nothing that is committed, and makes nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.stages import pool_folders, round_folders
from engine.store.events import read_events
from engine.store.ledger import committed_stages
from engine.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow

#: The pool's stages, killed in the middle and between their two commits.
POOL: list[dict[str, Any]] = [
    {"event": "shard_written", "stage": "references", "count": 3},
    {"event": "stage_committed", "stage": "references"},
]
#: Where a run is killed: with part of a stage's work done, of which there is each kind here, between a stage's files
#: and its manifest, and right after that. benchmarks/bench_chaos.py kills runs anywhere.
POINTS: list[dict[str, Any]] = [
    {"event": "shard_written", "stage": "observe", "round": 1},
    {"event": "shard_written", "stage": "extract", "round": 1},
    {"event": "shard_written", "stage": "feedback", "round": 1, "signal": signal.SIGTERM},
    {"event": "before_commit", "stage": "select", "round": 1},
    {"event": "shard_written", "stage": "annotate", "round": 1, "count": 2},
    {"event": "training_step", "round": 1, "count": 3},
    {"event": "stage_committed", "stage": "tune", "round": 1},
]
#: Stages that go on with their whole shards; all others are made in one go.
BY_SHARD = ("observe", "cluster", "extract", "feedback", "annotate")
#: Events that come while workers are at work, but for annotating, which the driver does itself.
AT_WORK = ("shard_written", "training_step")


def processes_of(session: int) -> dict[int, str]:
    """Processes that are alive in a session, with their names."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
                command = Path(f"/proc/{entry}/cmdline").read_text().split("\0")[0].strip()
            except OSError:
                continue
            state, _, _, sid = stat[stat.rindex(")") + 2 :].split()[:4]
            if int(sid) == session and state != "Z":
                found[int(entry)] = command
    return found


def wait_for_end(session: int, seconds: float) -> None:
    """Wait until no process of a dead driver can write any more.

    Ray's two agents on a node, which know nothing of the run, look for their dead head node for another minute.
    """
    deadline = time.monotonic() + seconds
    while left := {pid: name for pid, name in processes_of(session).items() if "Agent" not in name}:
        assert time.monotonic() < deadline, f"the dead driver left {left} behind"
        time.sleep(0.1)


def fingerprints(run_dir: Path) -> dict[str, tuple[str, int]]:
    """Checksum and time of every whole file of every stage, committed or begun."""
    found = {}
    for path in run_dir.glob("*/*/**/*"):
        if path.is_file() and not path.name.startswith((".tmp-", "plan.json")):
            stat = path.stat()
            found[str(path.relative_to(run_dir))] = (hashlib.sha256(path.read_bytes()).hexdigest(), stat.st_mtime_ns)
    return {
        name: value
        for name, value in found.items()
        # Checkpoints go when their stage is committed.
        if not name.startswith(("logs/", "scratch/")) and "/checkpoints/" not in name
    }


def check_kept(run_dir: Path, before: dict[str, tuple[str, int]], committed: set[str], where: str) -> None:
    """Nothing that was whole has other content now, and what counts as done was not touched."""
    after = fingerprints(run_dir)
    for name, (checksum, changed) in before.items():
        stage = "/".join(name.split("/")[:2])
        assert name in after, f"{where}: {name} is gone"
        assert after[name][0] == checksum, f"{where}: {name} has other content"
        if stage in committed or stage.split("/")[1] in BY_SHARD:
            assert after[name][1] == changed, f"{where}: {name} was written again"


def committed_folders(run_dir: Path) -> set[str]:
    return {stage.label for stage in committed_stages(RunDirectory(run_dir))}


def survive(ka2l: Any, run_dir: Path, kills: list[dict[str, Any]], log: Path, *, on_cluster: list[str]) -> None:
    """Resume a run and kill it at one point after the other; then let it finish.

    Where it dies with workers at work, Ray is its own and must die too; elsewhere, to save Ray's start, it joins one
    that outlives it.
    """
    sessions: list[tuple[float, int]] = []
    for kill in [*kills, None]:
        own_ray = kill is not None and kill["event"] in AT_WORK and kill.get("stage") != "annotate"
        options = ["--set", "ray.address=local"] if own_ray else on_cluster
        before, committed = fingerprints(run_dir), committed_folders(run_dir)
        ended = ka2l("resume", run_dir, *options, kill=kill, log=log)
        where = f"killed at {kill}"
        if kill is None:
            assert ended.returncode == 0, ended.stderr
        else:
            by = kill.get("signal", signal.SIGKILL)
            expected = 143 if by == signal.SIGTERM else -signal.SIGKILL
            assert ended.returncode == expected, f"{where}: it was not: {ended.stderr}"
            wait_for_end(ended.pid, 60)
            sessions.append((time.monotonic(), ended.pid))
            check_partial(run_dir, kill)
        check_kept(run_dir, before, committed, where)
    for died, session in sessions:
        if time.monotonic() - died > 120:
            assert not processes_of(session)


def check_partial(run_dir: Path, kill: dict[str, Any]) -> None:
    """The kill came where it was meant to: with work done and no manifest, or with the manifest."""
    stage = RunDirectory(run_dir).stage(kill.get("stage", "tune"), kill.get("round"))
    if kill["event"] == "stage_committed":
        assert stage.manifest() is not None
        return
    assert stage.manifest() is None
    if kill["event"] == "before_commit":
        plan = stage.plan()
        assert plan is not None
        assert plan["spent"]["seconds"] > 0
        assert plan["spent"]["cpu_seconds"] == pytest.approx(plan["spent"]["seconds"])
    if kill["event"] == "shard_written":
        whole = [path for path in Path(stage.path).glob("part-*")]
        assert 0 < len(whole) < (3 if stage.name == "annotate" else 6)


def check_history(run_dir: Path) -> int:
    """A committed stage was never begun again, and no shard was written twice. Returns how many were written."""
    committed: set[tuple[str, int | None]] = set()
    written: Counter[tuple[str, int | None, str]] = Counter()
    for event in read_events(RunDirectory(run_dir)):
        key = (event.get("stage", ""), event.get("round"))
        if event["event"] == "stage_started":
            assert key not in committed, f"{key} was made again"
        elif event["event"] == "stage_committed":
            assert key not in committed
            committed.add(key)
        elif event["event"] == "shard_written" and event["stage"] in BY_SHARD:
            written[*key, event["shard"]] += 1
    assert max(written.values(), default=1) == 1
    return len(written)


def check_reveals(run_dir: Path, asked: list[str]) -> None:
    """Each selected question was asked for once, in the ledger as in the annotator's own log."""
    ledger = pq.read_table(run_dir / "ledger.parquet")
    revealed = ledger.filter(pa.compute.equal(ledger["item"], "reveal"))["question_id"].to_pylist()
    run = RunDirectory(run_dir)
    chosen = [
        name
        for index in range(2)
        for name in run.stage("select", index).table(["question_id"])["question_id"].to_pylist()
    ]
    assert len(set(revealed)) == len(revealed) == 24
    assert sorted(revealed) == sorted(chosen)
    assert sorted(asked) == sorted(run.stage("select", 1).table(["question_id"])["question_id"].to_pylist())


def untimed(value: Any) -> Any:
    """Without what a clock gave."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if "seconds" not in key}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def check_equal(run_dir: Path, reference: Path, rounds: range) -> None:
    """The committed tables, the adapters and the figures are those of the uninterrupted run."""
    from safetensors.torch import load_file

    ours, theirs = RunDirectory(run_dir), RunDirectory(reference)
    assert committed_folders(run_dir) == committed_folders(reference)
    places = [(name, None) for name in pool_folders()] + [(name, index) for index in rounds for name in round_folders()]
    for name, index in places:
        stage, other = ours.stage(name, index), theirs.stage(name, index)
        if other.manifest() is None:
            continue
        mine, their = stage.verify(), other.verify()
        assert [(entry.path, entry.num_rows) for entry in mine.files] == [
            (entry.path, entry.num_rows) for entry in their.files
        ]
        assert mine.fingerprint == their.fingerprint, stage.label
        assert untimed(mine.metrics) == untimed(their.metrics), stage.label
        for item in ("tokens_generated", "annotations", "tokens_trained"):
            assert mine.cost.get(item) == their.cost.get(item), (stage.label, item)
        if stage.shard_names():
            columns = [column for column in other.table().column_names if column != "annotated_at"]
            assert stage.table(columns).equals(other.table(columns)), stage.label
        if name == "tune":
            tensors = [load_file(f"{item.path}/adapter/adapter_model.safetensors") for item in (stage, other)]
            assert tensors[0].keys() == tensors[1].keys()
            assert all((tensors[0][key] - tensors[1][key]).abs().max() < 1e-6 for key in tensors[0])


def copy_of_first_round(finished: Any, run_dir: Path) -> None:
    """The uninterrupted run as it was when its first round had ended."""
    later = shutil.ignore_patterns("round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(finished.run_dir, run_dir, ignore=later)


@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_a_run_killed_in_one_stage_after_the_other_ends_as_if_it_had_not_been(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "asked"
    copy_of_first_round(finished, run_dir)
    survive(ka2l, run_dir, POINTS, log, on_cluster=on_cluster)
    assert check_history(run_dir)
    steps = [event["step"] for event in read_events(RunDirectory(run_dir)) if event["event"] == "training_step"]
    assert steps.count(1) == 1  # killed after its third step, the second training went on from a checkpoint
    assert not list(run_dir.glob("*/*/checkpoints"))
    check_reveals(run_dir, log.read_text().split())
    check_equal(run_dir, finished.run_dir, range(3))
    assert not (run_dir / "scratch").exists()
    mine, theirs = (json.loads((path / "summary.json").read_text()) for path in (run_dir, finished.run_dir))
    assert mine["status"] == theirs["status"] == "complete"
    assert untimed(mine["rounds"]) == untimed(theirs["rounds"])


def test_a_run_killed_while_it_reads_its_pool_splits_it_as_if_it_had_not_been(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = ["run", finished.files.config, "--run-dir", run_dir]
    after = {"event": "stage_started", "stage": "observe"}
    for kill in (*POOL, after):
        before, committed = fingerprints(run_dir), committed_folders(run_dir)
        assert ka2l(*words, *on_cluster, kill=kill).returncode == -signal.SIGKILL
        check_kept(run_dir, before, committed, f"killed at {kill}")
        words = ["resume", run_dir]
    check_history(run_dir)
    for name in ("questions", "references"):
        ours, theirs = (RunDirectory(path).stage(name) for path in (run_dir, finished.run_dir))
        assert ours.table().equals(theirs.table())
        assert ours.require().fingerprint == theirs.require().fingerprint
