"""Reads and writes files on a local disk or behind a URL: whole or not at all, with retries."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from ka2l.errors import RunDirectoryError, StorageError, StorageFullError

#: Bytes that are copied or hashed at once.
PIECE_BYTES = 8 * 2**20
_T = TypeVar("_T")
#: Seconds between two tries of what the storage refused.
_PAUSES_S = (0.2, 1.0, 5.0)
#: What no further try would change.
_PERMANENT_ERRORS = frozenset({
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
    errno.EROFS, errno.ENAMETOOLONG,
})  # fmt: skip


def filesystem(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or a URL (s3://, gs://, any fsspec scheme), and the path inside it."""
    if "://" not in url:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    try:
        return pafs.FileSystem.from_uri(url)
    except (ValueError, pa.ArrowInvalid):
        import fsspec

        handler, path = fsspec.core.url_to_fs(url)
        return pafs.PyFileSystem(pafs.FSSpecHandler(handler)), path


def with_retries(work: Callable[[], _T], path: str) -> _T:
    """What ``work`` returns, tried again where the storage fails: four times in about six seconds.

    Raises:
        StorageError: it failed each time.
        StorageFullError: there is no space left.
        RunDirectoryError: it is not permitted.
        OSError: no further try would change it, as with a file that is not there.
    """
    pauses_s = iter(_PAUSES_S)
    with clear_storage_errors(path):
        while True:
            try:
                return work()
            except OSError as error:
                if error.errno in _PERMANENT_ERRORS or _is_full(error):
                    raise
                pause_s = next(pauses_s, None)
                if pause_s is None:
                    raise StorageError(
                        f"the storage failed {len(_PAUSES_S) + 1} times over {path}: {error}",
                        hint="What is committed is safe: go on with `ka2l resume` once the storage works again.",
                    ) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


@contextlib.contextmanager
def clear_storage_errors(path: str) -> Iterator[None]:
    """Turn "no space left" and "not permitted" into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise StorageFullError(
                f"no space left while writing {path}",
                hint="Free space or move the run directory, then `ka2l resume` it; what is committed is safe.",
            ) from error
        if isinstance(error, PermissionError):
            raise RunDirectoryError(f"not allowed to write {path}", hint="Choose another --run-dir.") from error
        raise


def write_bytes(filesystem_: pafs.FileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; raises as `with_retries` does."""
    with_retries(lambda: _write(filesystem_, path, content), path)


def _write(filesystem_: pafs.FileSystem, path: str, content: bytes) -> None:
    with written_whole(filesystem_, path) as temporary, filesystem_.open_output_stream(temporary) as stream:
        stream.write(content)


@contextlib.contextmanager
def written_whole(filesystem_: pafs.FileSystem, path: str) -> Iterator[str]:
    """Yields where to write a file; it is moved to its place at the end of the block, and is gone where that failed."""
    folder, name = path.rsplit("/", 1)
    temporary = f"{folder}/.tmp-{uuid.uuid4().hex[:8]}-{name}"
    try:
        filesystem_.create_dir(folder, recursive=True)
        yield temporary
        filesystem_.move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem_.delete_file(temporary)
        raise


def read_bytes(filesystem_: pafs.FileSystem, path: str) -> bytes | None:
    """Content of a file, or None where there is none; raises as `with_retries` does."""
    return with_retries(lambda: _read(filesystem_, path), path)


def _read(filesystem_: pafs.FileSystem, path: str) -> bytes | None:
    if filesystem_.get_file_info(path).type != pafs.FileType.File:
        return None
    with filesystem_.open_input_stream(path) as stream:
        return stream.read()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the name of a new file in a local folder durable; nothing where the system has no such thing."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
