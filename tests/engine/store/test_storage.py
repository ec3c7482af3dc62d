"""Storage that fails for a moment is tried again; what will not change is said at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from engine.store import storage
from engine.store.storage import filesystem, read_bytes, with_retries, write_bytes
from ka2l.errors import RunDirectoryError, StorageError, StorageFullError


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    return waited


def failing(*numbers: int | None) -> tuple[Callable[[], str], list[int]]:
    """Work that fails with these error numbers in turn, and how often it was tried."""
    tries: list[int] = []

    def work() -> str:
        tries.append(1)
        if len(tries) <= len(numbers):
            number = numbers[len(tries) - 1]
            raise OSError("AWS Error NETWORK_CONNECTION") if number is None else OSError(number, os.strerror(number))
        return "done"

    return work, tries


def test_errors_that_pass_are_waited_out(pauses: list[float]) -> None:
    work, tries = failing(errno.EIO, None, errno.ETIMEDOUT)
    assert with_retries(work, "somewhere") == "done"
    assert len(tries) == 4
    assert len(pauses) == 3
    assert pauses == sorted(pauses)


def test_storage_that_goes_on_failing_is_an_error_that_names_the_file_and_the_way_on() -> None:
    work, tries = failing(*[errno.EIO] * 10)
    with pytest.raises(StorageError, match=r"failed 4 times over s3://runs/x.*Input/output error") as caught:
        with_retries(work, "s3://runs/x")
    assert "ka2l resume" in str(caught.value.hint)
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, StorageFullError), (errno.EACCES, RunDirectoryError), (errno.ENOENT, FileNotFoundError)],
)
def test_what_no_further_try_would_change_is_raised_at_once(number: int, expected: type[Exception]) -> None:
    work, tries = failing(number)
    with pytest.raises(expected):
        with_retries(work, "somewhere")
    assert len(tries) == 1


def test_a_write_that_failed_half_way_leaves_nothing_and_the_next_try_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, folder = filesystem(str(tmp_path))
    whole, tries = storage._write, []
    (tmp_path / "stage").mkdir()

    def half(filesystem_: pafs.FileSystem, path: str, content: bytes) -> None:
        tries.append(1)
        if len(tries) == 1:
            with filesystem_.open_output_stream(f"{path}.half") as stream:
                stream.write(content[:2])
            filesystem_.delete_file(f"{path}.half")
            raise OSError(errno.EIO, "Input/output error")
        whole(filesystem_, path, content)

    monkeypatch.setattr(storage, "_write", half)
    write_bytes(disk, f"{folder}/stage/part", b"content")
    assert read_bytes(disk, f"{folder}/stage/part") == b"content"
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["part"]


def test_a_file_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    disk, folder = filesystem(str(tmp_path))
    assert read_bytes(disk, f"{folder}/none") is None
