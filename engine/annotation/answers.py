"""Answers from the annotation page: append-only JSON lines, each on disk before it is acknowledged.

The lines are what :func:`ka2l.annotation.task_files.read_answers` reads.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from engine.store.storage import clear_storage_errors, sync_folder
from ka2l.annotation.people import HumanAnswer


class AnswerStore:
    """Answers by question and person. Any number of threads may use one; one process at a time may write.

    A person's later answer to a question replaces the earlier one; all lines stay in the file. Answers of two people
    to one question are two answers.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it; a last line that was cut off by a crash is closed and skipped.

        Raises:
            RunDirectoryError: the file cannot be made or written.
        """
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], HumanAnswer] = {}
        with clear_storage_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                os.write(self._file, b"\n")
            os.fsync(self._file)
            sync_folder(path.parent)
        for line in content.split(b"\n"):
            if (answer := _parse(line)) is not None:
                self._keep(answer)

    def append(self, answer: HumanAnswer) -> None:
        """Returns once the answer is on disk; raises with nothing kept where it cannot be.

        Raises:
            StorageFullError: no space is left.
        """
        line = (json.dumps(answer._asdict(), ensure_ascii=False, default=datetime.isoformat) + "\n").encode()
        with self._lock, clear_storage_errors(str(self.path)):
            size = os.fstat(self._file).st_size
            try:
                left = line
                while left:
                    left = left[os.write(self._file, left) :]
                os.fsync(self._file)
            except OSError:
                # Half a line would spoil the next one, and a whole one was not acknowledged.
                os.ftruncate(self._file, size)
                raise
            self._keep(answer)

    def answers(self) -> list[HumanAnswer]:
        """What counts, oldest first; a correction counts from when it was made."""
        with self._lock:
            return list(self._answers.values())

    def close(self) -> None:
        """Closes the file; nothing is written by it."""
        os.close(self._file)

    def _keep(self, answer: HumanAnswer) -> None:
        key = (answer.question_id, answer.annotator)
        self._answers.pop(key, None)
        self._answers[key] = answer


def _parse(line: bytes) -> HumanAnswer | None:
    """One line's answer; None for a blank or damaged line."""
    try:
        row = json.loads(line)
        when = datetime.fromisoformat(row["answered_at"]).astimezone(UTC)
        answers = [str(answer) for answer in row["answers"]]
        return HumanAnswer(str(row["question_id"]), answers, str(row["annotator"]), when, bool(row["skipped"]))
    except (ValueError, KeyError, TypeError):
        return None
