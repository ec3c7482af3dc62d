"""The folder of one stage of one round, which is committed as a whole.

Workers write shards into it, each under a temporary name that is renamed when the file is whole. The driver commits the
stage by writing ``manifest.json`` last; readers open only what a manifest lists. A folder without a manifest is
unfinished work: its whole shards are kept and only the missing ones are made again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from engine.store.manifest import FileEntry, Manifest, add_up, git_revision, json_bytes, versions
from engine.store.shards import Failure, read_shard, shard_failures, shard_stats
from engine.store.storage import PIECE_BYTES, with_retries, write_bytes, written_whole
from ka2l.errors import DamagedShardError, RunDirectoryError, StaleStageError
from ka2l.evaluation.statistics import json_safe
from ka2l.tuning.checkpoints import CheckpointFolder

if TYPE_CHECKING:
    from engine.store.run_directory import RunDirectory

MANIFEST = "manifest.json"
PLAN = "plan.json"
ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"


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
        """What the unfinished stage is being made from and has ``spent`` so far (engine.execution.meter); None where it
        is not begun, or committed."""
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
        """Note what the unfinished stage is being made from, so that resume can tell, and remove broken files.

        Returns:
            What earlier attempts at it have spent.
        """
        self._remove_leftovers()
        spent: dict[str, float] = (self.plan() or {}).get("spent", {})
        self._plan = {"fingerprint": wanted, "config": dict(config), "inputs": dict(inputs)}
        self.note_spent(spent)
        return spent

    def note_spent(self, spent: Mapping[str, float]) -> None:
        """Note what the unfinished stage has spent so far, with all attempts, in case this one is killed."""
        write_bytes(self.run.fs, f"{self.path}/{PLAN}", json_bytes(self._plan | {"spent": dict(spent)}))

    def finished_shards(self) -> set[str]:
        """Names of the whole shards of an unfinished stage."""
        shards = (info for info in self.run.list_files(self.path) if info.base_name.startswith("part-"))
        return {info.base_name for info in shards if self._is_whole(info.path)}

    def _remove_leftovers(self) -> None:
        """Remove what an attempt that died left behind: temporary files and unreadable shards."""
        for info in self.run.list_files(self.path):
            is_broken = info.base_name.startswith("part-") and not self._is_whole(info.path)
            if is_broken or info.base_name.startswith(".tmp-"):
                with contextlib.suppress(FileNotFoundError):  # the meter of this process renames its own
                    self.run.fs.delete_file(info.path)

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
                footer = pq.read_metadata(info.path, filesystem=self.run.fs)
                found += shard_failures(footer)
        return found

    def forget_attempts(self, prefix: str = "") -> None:
        """Forget what was begun and did not end: nobody died over it."""
        for info in self.run.list_files(f"{self.path}/{ATTEMPTS}"):
            if info.base_name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    self.run.fs.delete_file(info.path)

    def begun_shards(self) -> dict[str, dict[str, float]]:
        """Shards of an unfinished stage with what they took."""
        found = {}
        for info in self.run.list_files(self.path):
            if info.base_name.startswith("part-"):
                with contextlib.suppress(pa.ArrowInvalid, OSError):
                    found[info.base_name] = shard_stats(pq.read_metadata(info.path, filesystem=self.run.fs))
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
                shutil.copyfileobj(reader, writer, PIECE_BYTES)

        with_retries(copy, path)

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
                rows, stats = parquet.num_rows, shard_stats(parquet)
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


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before!r}, now {after!r}"
