"""Finds questions that break the work on a shard by halving it, sets them aside with the reason, counts them."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from actors.host import Stats
from engine.store.manifest import add_up
from engine.store.shards import Failure
from engine.store.stage_folder import ATTEMPTS
from engine.store.storage import filesystem, read_bytes, write_bytes
from ka2l.errors import KA2LError, first_line

#: Deaths of workers over the same questions before these are halved, and over one question before it is set aside.
_DEATHS = 2
#: So many questions that fail one after the other are not to blame: it is the model, the machine or the endpoint.
_HOPELESS = 16

#: One shard's tables in, its output and what that took out.
Process = Callable[[Mapping[str, pa.Table]], tuple[pa.Table, Stats]]


class Isolated(NamedTuple):
    """What became of a shard."""

    table: pa.Table
    stats: Stats
    failures: list[Failure]


class Attempts:
    """Over which questions of a shard workers have died: kept in a file, because the process that knew has died.

    Args:
        folder_url: of the stage.
        shard: its name.
    """

    def __init__(self, folder_url: str, shard: str) -> None:
        self._fs, folder = filesystem(folder_url)
        self._path = f"{folder}/{ATTEMPTS}/of-{shard}.json"
        content = read_bytes(self._fs, self._path)
        said = json.loads(content) if content else {"deaths": {}, "at_work": None}
        self._deaths: Counter[str] = Counter(said["deaths"])
        if said["at_work"] is not None:
            self._deaths[said["at_work"]] += 1

    @property
    def num_deaths(self) -> int:
        """Workers that died over this shard."""
        return self._deaths.total()

    def deaths(self, start: int, stop: int) -> int:
        """Workers that died over these rows."""
        return self._deaths[f"{start}-{stop}"]

    def begin(self, start: int, stop: int) -> None:
        """Work on these rows begins: who finds this note later knows that it did not end."""
        said = {"deaths": self._deaths, "at_work": f"{start}-{stop}"}
        write_bytes(self._fs, self._path, json.dumps(said).encode())

    def forget(self) -> None:
        """The shard is made."""
        self._fs.delete_file(self._path)


class OpenAttempts:
    """Counts workers that died while they loaded their model, which no shard is to blame for."""

    def __init__(self, folder_url: str) -> None:
        self._fs, folder = filesystem(folder_url)
        self._folder = f"{folder}/{ATTEMPTS}"
        self._path = f"{self._folder}/open-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def begin(self) -> int:
        """Returns how many others have begun and not ended, dead or at it."""
        infos = self._fs.get_file_info(pafs.FileSelector(self._folder, allow_not_found=True))
        write_bytes(self._fs, self._path, b"")
        return sum(info.base_name.startswith("open-") for info in infos)

    def end(self) -> None:
        """The model is loaded."""
        self._fs.delete_file(self._path)


def isolate(process: Process, tables: Mapping[str, pa.Table], attempts: Attempts) -> Isolated:
    """Process a shard; where that raises, or has killed workers before, in halves of its questions, and their halves.

    Args:
        process: raises KA2LError for what is wrong with all questions alike.
        tables: ``questions``, which are halved, and others, of which go along the rows of the same ``question_id``.

    Raises:
        KA2LError: as ``process`` raised it.
        Exception: as ``process`` raised it for one question after the other, so that questions are not to blame.
    """
    work = _Isolation(process, tables, attempts)
    work.run(0, tables["questions"].num_rows)
    if not work.parts:
        work.parts.append(process({name: table.slice(0, 0) for name, table in tables.items()}))
    made = pa.concat_tables([table for table, _ in work.parts])
    return Isolated(made, add_up(stats for _, stats in work.parts), work.failures)


class _Isolation:
    def __init__(self, process: Process, tables: Mapping[str, pa.Table], attempts: Attempts) -> None:
        self.process = process
        self.tables = tables
        self.attempts = attempts
        self.parts: list[tuple[pa.Table, Stats]] = []
        self.failures: list[Failure] = []
        self.num_in_a_row = 0

    def run(self, start: int, stop: int) -> None:
        """Rows from ``start`` up to ``stop``."""
        num_rows = stop - start
        whole = num_rows == self.tables["questions"].num_rows
        num_deaths = self.attempts.deaths(start, stop)
        # A half of what has killed workers is suspect from the first death on.
        if num_deaths < (_DEATHS if whole or num_rows == 1 else 1):
            self.attempts.begin(start, stop)
            try:
                self.parts.append(self.process(self._rows(start, stop)))
                self.num_in_a_row = 0
                return
            except KA2LError:
                raise
            except Exception as error:
                if num_rows <= 1:
                    self._set_aside(start, f"{type(error).__name__}: {first_line(error, 'no message')}", error)
                    return
        elif num_rows <= 1:
            reason = f"{num_deaths} workers died over it: killed, out of memory, or longer than faults.deadline_s"
            self._set_aside(start, reason, None)
            return
        middle = start + num_rows // 2
        self.run(start, middle)
        self.run(middle, stop)

    def _rows(self, start: int, stop: int) -> dict[str, pa.Table]:
        if stop - start == self.tables["questions"].num_rows:
            return dict(self.tables)
        questions = self.tables["questions"].slice(start, stop - start)
        ids = questions["question_id"].combine_chunks()
        others = {
            name: table.filter(pc.is_in(table["question_id"], ids))
            for name, table in self.tables.items()
            if name != "questions"
        }
        return {"questions": questions} | others

    def _set_aside(self, row: int, reason: str, error: Exception | None) -> None:
        self.num_in_a_row += 1
        if error is not None and self.num_in_a_row >= _HOPELESS:
            raise error
        self.failures.append(Failure(self.tables["questions"]["question_id"][row].as_py(), reason[:500]))
