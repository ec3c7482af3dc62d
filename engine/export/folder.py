"""Writes an export's folder whole or not at all; replaces nothing but an older export."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ka2l.errors import RunDirectoryError

#: What marks a folder as an export.
MARK = "export.json"


def check_out(out: str, overwrite: bool) -> Path:
    """The folder to write, as an absolute path; raises RunDirectoryError where it may not be written."""
    if "://" in out:
        raise RunDirectoryError(
            f"--out {out} is not a local folder", hint="Export to a local folder and copy it, or use --push-to-hub."
        )
    folder = Path(out).expanduser().absolute()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunDirectoryError(f"{folder} is not a folder", hint="Choose another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise RunDirectoryError(f"{folder} is not empty", hint="Choose another --out, or replace it: --overwrite.")
    if not (folder / MARK).is_file():
        raise RunDirectoryError(
            f"{folder} holds something other than an export, which --overwrite would delete",
            hint="Choose another --out, or empty it yourself.",
        )
    return folder


@contextlib.contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, which takes the place of ``folder`` at the end of the block and is gone where that
    failed.

    Raises:
        RunDirectoryError: there is no permission or no space.
    """
    token = uuid.uuid4().hex[:8]
    temporary, old = (folder.with_name(f".tmp-{token}-{what}{folder.name}") for what in ("", "old-"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(
            f"cannot write {folder}: {reason}", hint="Choose another --out, or make room or permission there."
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
