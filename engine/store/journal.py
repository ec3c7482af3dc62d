"""The journal of paid replies: a record that was put is there after any crash (ka2l.teacher.reply.Journal)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pyarrow import fs as pafs

from engine.store.run_directory import RunDirectory
from engine.store.storage import clear_storage_errors, filesystem, sync_folder, write_bytes
from ka2l.errors import RunDirectoryError


class FileJournal:
    """One append-only file of JSON lines on a local disk. One process writes it; any of its threads may.

    Raises:
        RunDirectoryError: a line before the last is not JSON, so the file was damaged or edited.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._lock = threading.Lock()
        with clear_storage_errors(self.path):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            with contextlib.suppress(OSError):  # not every file system can
                sync_folder(os.path.dirname(self.path))
        self._records, self._size = self._read()

    def _read(self) -> tuple[dict[str, Mapping[str, Any]], int]:
        """Records by key and the file's size. A kill can cut the last line: its record was never reported as stored."""
        with open(self.path, "rb") as stream:
            content = stream.read()
        records: dict[str, Mapping[str, Any]] = {}
        size = 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                entry = json.loads(line)
                key, record = entry["key"], entry["record"]
            except (ValueError, TypeError, KeyError) as error:
                if size + len(line) < len(content):
                    raise RunDirectoryError(
                        f"{self.path}, line {number} is not a journal entry",
                        hint="Restore the file; or delete that line, and its answer is asked and paid again.",
                    ) from error
                break
            records[key] = record
            size += len(line)
        with clear_storage_errors(self.path):
            if size < len(content):
                os.ftruncate(self._file, size)
            elif content and not content.endswith(b"\n"):
                os.write(self._file, b"\n")
                size += 1
            os.fsync(self._file)
        return records, size

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The last record put under the key, or None."""
        return self._records.get(key)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every key with its last record, in the order first put."""
        yield from list(self._records.items())

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Append a record; on return it is on the disk. A failed put leaves the file as it was."""
        line = _entry(key, record) + b"\n"
        with self._lock, clear_storage_errors(self.path):
            try:
                if (written := os.write(self._file, line)) != len(line):
                    raise OSError(28, f"No space left on device ({written} of {len(line)} bytes written)")
                os.fsync(self._file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)
            self._records[key] = json.loads(line)["record"]

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            os.close(self._file)


class RemoteJournal:
    """One small object a record, in a folder behind a URL: object stores cannot append."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = filesystem(url)
        self._lock = threading.Lock()
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        self._names = {info.base_name for info in infos if info.base_name.endswith(".json")}
        self._names = {name for name in self._names if not name.startswith(".tmp-")}
        self._records: dict[str, Mapping[str, Any]] = {}

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The last record put under the key, or None."""
        if key not in self._records and _name(key) in self._names:
            self._read(_name(key))
        return self._records.get(key)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every key with its last record."""
        for name in sorted(self._names):
            self._read(name)
        yield from list(self._records.items())

    def _read(self, name: str) -> None:
        with self.fs.open_input_stream(f"{self.path}/{name}") as stream:
            entry = json.loads(stream.read())
        with self._lock:
            self._records[entry["key"]] = entry["record"]

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Write a record; on return the store holds it."""
        content = _entry(key, record)
        write_bytes(self.fs, f"{self.path}/{_name(key)}", content)
        with self._lock:
            self._names.add(_name(key))
            self._records[key] = json.loads(content)["record"]

    def close(self) -> None:
        """Nothing to give back; journals close alike."""


def open_journal(run: RunDirectory, name: str) -> FileJournal | RemoteJournal:
    """The run's journal of a name: ``NAME.jsonl`` in a local run directory, a folder ``NAME`` behind a URL."""
    return FileJournal(f"{run.path}/{name}.jsonl") if run.is_local else RemoteJournal(f"{run.url}/{name}")


def _entry(key: str, record: Mapping[str, Any]) -> bytes:
    # ASCII: no character of a reply (U+2028, lone surrogates) can then end a line early or fail to encode.
    return json.dumps({"key": key, "record": dict(record)}, allow_nan=False).encode("ascii")


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40] + ".json"
