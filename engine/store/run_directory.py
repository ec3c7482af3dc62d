"""The run directory: the folders of its stages, and the files at its top."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from engine.store.manifest import json_bytes
from engine.store.stage_folder import Stage
from engine.store.storage import (
    PIECE_BYTES,
    clear_storage_errors,
    filesystem,
    read_bytes,
    with_retries,
    write_bytes,
    written_whole,
)
from ka2l.errors import RunInUseError


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
                shutil.copyfileobj(reader, writer, PIECE_BYTES)

        with_retries(copy, path)

    def checksum(self, path: str) -> tuple[int, str] | None:
        """Size in bytes and SHA-256 of a file, read piece by piece; None where there is none."""
        return with_retries(lambda: self._checksum(path), path)

    def _checksum(self, path: str) -> tuple[int, str] | None:
        if self.fs.get_file_info(path).type != pafs.FileType.File:
            return None
        digest, num_bytes = hashlib.sha256(), 0
        with self.fs.open_input_stream(path) as stream:
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
                num_bytes += len(piece)
        return num_bytes, digest.hexdigest()

    def list_files(self, path: str) -> list[pafs.FileInfo]:
        """Files below a folder; empty where the folder is not there."""
        selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = with_retries(lambda: self.fs.get_file_info(selector), path)
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
        write_bytes(self.fs, f"{self.path}/{name}", json_bytes(value))

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
