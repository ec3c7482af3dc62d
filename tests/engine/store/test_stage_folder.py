"""The run directory: a stage is there whole or not at all, and what is committed is never trusted unchecked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from engine.config import RunConfig
from engine.store.events import Events, read_events
from engine.store.manifest import Manifest, fingerprint
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from engine.store.storage import filesystem, write_bytes
from ka2l.errors import (
    DamagedShardError,
    RunDirectoryError,
    RunInUseError,
    StaleStageError,
    StorageError,
    StorageFullError,
)
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.model.loading import ModelConfig, model_identity
from ka2l.sampling.sampler import SamplerConfig
from ka2l.section import Section
from ka2l.tuning.sft import TuningConfig


def rows(*ids: str) -> pa.Table:
    return pa.table({"question_id": list(ids), "score": [float(len(name)) for name in ids]})


def commit(stage: Stage, wanted: str = "f0", **changes: Any) -> Manifest:
    arguments: dict[str, Any] = {
        "wanted": wanted,
        "config": {"a": 1},
        "inputs": {},
        "metrics": {},
        "cost": {},
        "seed": 0,
        "seconds": 1.5,
    }
    return stage.commit(**(arguments | changes))


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunDirectory]:
    """A run directory on the local disk and one behind an fsspec URL."""
    if request.param == "local":
        yield RunDirectory(tmp_path / "run")
        return
    directory = RunDirectory(f"memory://{uuid.uuid4().hex}/run")
    yield directory
    directory.fs.delete_dir(directory.path.rsplit("/", 1)[0])


@pytest.fixture
def stage(run: RunDirectory) -> Stage:
    return run.stage("knowledge", 3)


@pytest.fixture
def committed(stage: Stage) -> Stage:
    """Two shards and a file in a folder."""
    write_shard(stage.url, shard_name(0), rows("a", "bb"), {"seconds": 2.0, "tokens_prompt": 7.0})
    write_shard(stage.url, shard_name(1), rows("ccc"), {"seconds": 3.0})
    stage.write_file("adapter/weights.bin", b"\x00\x01")
    commit(stage, cost={"money": 4.0}, metrics={"auroc": math.nan})
    return stage


def write(stage: Stage, name: str, content: bytes) -> None:
    """Put bytes into a stage's folder behind its back."""
    with stage.run.fs.open_output_stream(f"{stage.path}/{name}") as stream:
        stream.write(content)


# -- commit ------------------------------------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_with_its_rows_bytes_and_checksum(committed: Stage) -> None:
    manifest = committed.require()
    entries = {entry.path: entry for entry in manifest.files}
    assert list(entries) == ["adapter/weights.bin", "part-00000.parquet", "part-00001.parquet"]
    assert [entry.num_rows for entry in manifest.files] == [None, 2, 1]
    for name, entry in entries.items():
        content = committed.run.read_bytes(f"{committed.path}/{name}")
        assert content is not None
        assert entry.num_bytes == len(content)
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert (manifest.stage, manifest.round, manifest.fingerprint) == ("knowledge", 3, "f0")
    assert manifest.metrics == {"auroc": None}
    assert {"python", "pyarrow", "ray"} <= manifest.versions.keys()


def test_what_the_shards_took_is_summed_into_the_manifest(committed: Stage) -> None:
    assert committed.require().cost == {"money": 4.0, "seconds": 5.0, "tokens_prompt": 7.0}


def test_a_committed_table_reads_back_in_shard_order(committed: Stage) -> None:
    assert committed.table().equals(rows("a", "bb", "ccc"))
    assert committed.table(["question_id"]).column_names == ["question_id"]
    assert committed.shard_names() == ["part-00000.parquet", "part-00001.parquet"]


def test_readers_open_only_what_the_manifest_lists(committed: Stage) -> None:
    write_shard(committed.url, shard_name(2), rows("intruder"), {})
    assert committed.table()["question_id"].to_pylist() == ["a", "bb", "ccc"]


def test_a_stage_without_a_manifest_is_not_readable(stage: Stage) -> None:
    write_shard(stage.url, shard_name(0), rows("a"), {})
    assert stage.manifest() is None
    with pytest.raises(RunDirectoryError, match="round-003/knowledge is not committed"):
        stage.table()


def test_a_commit_leaves_no_trace_of_the_work(stage: Stage) -> None:
    stage.begin("f0", {"a": 1}, {})
    write_shard(stage.url, shard_name(0), rows("a"), {})
    write(stage, ".tmp-1234-part-00001.parquet", b"half")
    commit(stage)
    names = {info.base_name for info in stage.run.list_files(stage.path)}
    assert names == {"manifest.json", "part-00000.parquet"}


def test_a_removed_stage_can_be_made_again(committed: Stage) -> None:
    committed.remove()
    assert committed.manifest() is None
    assert committed.run.list_files(committed.path) == []
    write_shard(committed.url, shard_name(0), rows("new"), {})
    commit(committed, "f1")
    assert committed.table()["question_id"].to_pylist() == ["new"]


# -- whole or absent ---------------------------------------------------------------------------------------------------


def test_unfinished_work_keeps_whole_shards_and_loses_the_rest(stage: Stage) -> None:
    write_shard(stage.url, shard_name(0), rows("a"), {})
    whole = stage.run.read_bytes(f"{stage.path}/part-00000.parquet")
    assert whole is not None
    write(stage, "part-00001.parquet", whole[:-20])
    write(stage, ".tmp-12345678-part-00002.parquet", whole)
    assert stage.finished_shards() == {"part-00000.parquet"}
    assert len(stage.run.list_files(stage.path)) == 3  # a look changes nothing
    stage.begin("fingerprint", {}, {})
    assert {info.base_name for info in stage.run.list_files(stage.path)} == {"part-00000.parquet", "plan.json"}


class FailingFile:
    """Takes a few bytes, then fails as a disk does."""

    def __init__(self, stream: Any, error: OSError) -> None:
        self.stream, self.error = stream, error

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, content: bytes) -> None:
        self.stream.write(content[: len(content) // 2])
        raise self.error


class FailingDisk:
    """A file system on which every write fails half-way."""

    def __init__(self, error: OSError) -> None:
        self.inner, self.error = pafs.LocalFileSystem(), error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open_output_stream(self, path: str) -> FailingFile:
        return FailingFile(self.inner.open_output_stream(path), self.error)


@pytest.mark.parametrize(
    ("number", "raised", "said"),
    [
        (errno.ENOSPC, StorageFullError, "no space left while writing .*part-00000"),
        (errno.EDQUOT, StorageFullError, "no space left"),
        (errno.EACCES, RunDirectoryError, "not allowed to write .*part-00000"),
        (errno.EIO, StorageError, "went wrong"),
    ],
)
def test_a_write_that_fails_half_way_leaves_no_file(
    tmp_path: Path, number: int, raised: type[Exception], said: str
) -> None:
    disk: Any = FailingDisk(OSError(number, "went wrong"))
    with pytest.raises(raised, match=said):
        write_bytes(disk, f"{tmp_path}/part-00000.parquet", b"0123456789")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_from_other_failures(small_disk: Path) -> None:
    run = RunDirectory(small_disk / "run")
    noise = pa.table({"value": np.random.default_rng(0).random(300_000)})
    with pytest.raises(StorageFullError, match="no space left"):
        write_shard(run.stage("observe", 0).url, shard_name(0), noise, {})
    assert run.list_files(run.path) == []
    events = Events(run)
    fill(small_disk)
    with pytest.raises(StorageFullError, match=r"events\.jsonl"):
        events.emit("noise", text="x" * 10_000)


def fill(folder: Path) -> None:
    """Take all space there is."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


# -- damage ------------------------------------------------------------------------------------------------------------


def _flip(content: bytes) -> bytes:
    return content[:10] + bytes([content[10] ^ 1]) + content[11:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "does not have the checksum in its manifest"),
        (lambda content: content[:-1], "bytes, its manifest says"),
        (lambda content: content + b"more", "bytes, its manifest says"),
        (None, "is missing"),
    ],
    ids=["flipped bit", "truncated", "grown", "missing"],
)
def test_a_damaged_file_is_named(committed: Stage, damage: Callable[[bytes], bytes] | None, said: str) -> None:
    fresh = RunDirectory(committed.run.url).stage("knowledge", 3)  # what a process has verified it does not read again
    path = f"{fresh.path}/part-00001.parquet"
    content = fresh.run.read_bytes(path)
    assert content is not None
    fresh.run.fs.delete_file(path)
    if damage is not None:
        write(fresh, "part-00001.parquet", damage(content))
    with pytest.raises(DamagedShardError, match=rf"round-003/knowledge/part-00001\.parquet .*{said}") as caught:
        fresh.table()
    assert "--redo-from knowledge --round 3" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b'{"stage": "knowledge"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_named(committed: Stage, content: bytes) -> None:
    write(committed, "manifest.json", content)
    with pytest.raises(DamagedShardError, match=r"knowledge/manifest\.json is not a manifest"):
        committed.manifest()


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_stage_is_complete_only_with_its_own_fingerprint(committed: Stage) -> None:
    assert committed.is_complete("f0", {"a": 1}, {})
    assert not committed.run.stage("knowledge", 4).is_complete("f0", {"a": 1}, {})


def test_a_stage_made_with_another_config_shows_the_difference(stage: Stage) -> None:
    old = {"probe": {"kind": "mlp", "hidden": 64}, "same": 1}
    new = {"probe": {"kind": "linear", "hidden": 64}, "same": 1}
    stage.begin("f0", old, {"pool/questions": "x"})
    for _ in ("begun", "committed"):
        with pytest.raises(StaleStageError) as caught:
            stage.is_complete("f1", new, {"pool/questions": "y"})
        message = str(caught.value)
        assert "round-003/knowledge" in message
        assert "probe.kind was 'mlp', now 'linear'" in message
        assert "input pool/questions was made anew" in message
        assert "hidden" not in message
        assert "--redo-from knowledge --round 3" in message
        commit(stage, "f0", config=old, inputs={"pool/questions": "x"})


def test_a_begun_stage_goes_on_with_its_own_fingerprint(stage: Stage) -> None:
    stage.begin("f0", {"a": 1}, {})
    assert not stage.is_complete("f0", {"a": 1}, {})


def test_fingerprints_depend_on_content_and_not_on_order() -> None:
    assert fingerprint(a=1, b={"x": 1, "y": 2}) == fingerprint(b={"y": 2, "x": 1}, a=1)
    assert fingerprint(a=1) != fingerprint(a=2)
    assert fingerprint(a=[1, 2]) != fingerprint(a=[2, 1])


@pytest.mark.parametrize(
    ("config", "logistics", "result"),
    [
        (SamplerConfig(), {"replicas": 4, "cpus_per_replica": 3.0, "gpus_per_replica": 1.0}, {"num_samples": 3}),
        (ExtractionConfig(), {"batch_size": 7, "replicas": 2, "device": "cuda:1"}, {"storage_dtype": "float16"}),
        (TuningConfig(), {"workers": 4, "cpus_per_worker": 2.0, "micro_batch_size": 2}, {"learning_rate": 0.5}),
        (ModelConfig(), {"path": "/elsewhere"}, {"dtype": "bfloat16"}),
        (RunConfig(), {"name": "other", "ray": {"address": "local", "num_cpus": 1}}, {"seed": 1}),
    ],
    ids=["sampler", "extraction", "tuning", "model", "run"],
)
def test_worker_counts_and_paths_stay_out_of_fingerprints(
    config: Section, logistics: dict[str, Any], result: dict[str, Any]
) -> None:
    def changed(fields: dict[str, Any]) -> dict[str, Any]:
        return type(config).model_validate(config.model_dump() | fields).result_fields()

    assert changed(logistics) == config.result_fields()
    assert changed(result) != config.result_fields()


def test_a_section_inside_a_section_keeps_its_logistics_out() -> None:
    fields = RunConfig().result_fields()
    assert "replicas" not in fields["sampler"]
    assert fields["sampler"]["num_samples"] == 10


def test_a_model_is_told_by_its_content(tmp_path: Path) -> None:
    for name, weights in (("here", b"one"), ("there", b"one"), ("other", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    identities = {name: model_identity(ModelConfig(path=str(tmp_path / name))) for name in ("here", "there", "other")}
    assert identities["here"] == identities["there"] != identities["other"]


# -- the run directory -------------------------------------------------------------------------------------------------


def test_a_run_in_use_is_refused_to_another_process_until_it_ends(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from engine.store.run_directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).lock():\n"
        "    sys.stdout.write('held\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    repository = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=repository
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunInUseError, match="in use by another ka2l process"), RunDirectory(tmp_path).lock():
            pass
        holder.kill()
    with RunDirectory(tmp_path).lock():  # even a killed process leaves no lock behind
        assert (tmp_path / "run.lock").exists()


def test_files_at_the_top_are_written_and_read(run: RunDirectory) -> None:
    assert run.read_text("config.yaml") is None
    assert not run.exists()
    run.write_text("config.yaml", "name: é\n")
    run.write_json("summary.json", {"accuracy": np.float32(0.5), "ci": (math.nan, math.inf)})
    run.write_table("ledger.parquet", rows("a"))
    assert run.exists()
    assert run.read_text("config.yaml") == "name: é\n"
    assert json.loads(run.read_text("summary.json") or "") == {"accuracy": 0.5, "ci": [None, None]}
    with run.fs.open_input_file(f"{run.path}/ledger.parquet") as file:
        assert pq.read_table(file).equals(rows("a"))


def test_rounds_are_counted_by_their_folders(run: RunDirectory) -> None:
    assert run.num_rounds_begun() == 0
    for index in range(2):
        write_shard(run.stage("observe", index).url, shard_name(0), rows("a"), {})
    assert run.num_rounds_begun() == 2


def test_events_are_one_line_each_and_a_line_cut_off_is_skipped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    events = Events(run)
    events.emit("stage_started", stage="observe", round=0)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ev')
    assert [event["event"] for event in read_events(run)] == ["stage_started"]


def test_a_path_without_a_scheme_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, path = filesystem("some/run")
    assert isinstance(found, pafs.LocalFileSystem)
    assert path == str(tmp_path / "some/run")
    assert RunDirectory("some/run").url == path


def test_shards_read_back_without_the_notes_in_their_footer(run: RunDirectory) -> None:
    entry = write_shard(run.url, shard_name(17), rows("a"), {"seconds": 1.0})
    assert entry.path == "part-00017.parquet"
    assert read_shard(run.url, entry.path).schema.metadata is None
