"""What a worker does with a shard: read its input tables, work on them within a deadline, write its output."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from actors.host import Host, Stats
from actors.metrics import Tags, show_gpu_memory
from actors.workers.faults import FaultsConfig, deadline
from engine.execution.isolation import Attempts, OpenAttempts, isolate
from engine.store.shards import read_shard, write_shard
from ka2l.errors import StageFailedError

#: Stats of every shard.
FAILED, DEATHS = "num_failed", "num_worker_deaths"
_OPEN_DEATHS = 3


class ShardInput(NamedTuple):
    """One table that a job reads, shard by shard."""

    folder_url: str
    columns: list[str] | None = None
    eval_only: bool = False
    """Only rows of eval questions: the answers of all others stay unread."""


@dataclass
class HostJob:
    """Runs a host over shards: the same shard of every input in, one shard out."""

    make_host: Callable[[], Host]
    inputs: dict[str, ShardInput]
    folder_url: str
    replicas: int = 1
    """Workers that may load the model at the same time."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tags: Tags | None = None
    """Of the workers' metrics."""
    host: Host | None = field(default=None, init=False)

    def open(self) -> None:
        """Load the host's model.

        Raises:
            StageFailedError: workers have died over this, again and again.
        """
        attempts = OpenAttempts(self.folder_url)
        others = attempts.begin()
        if others >= _OPEN_DEATHS + self.replicas - 1:
            raise StageFailedError(
                f"{others} workers died while they loaded their model",
                hint="Out of memory, or slower than faults.deadline_s? The end of the stage's log tells more.",
            )
        try:
            with deadline(self.faults.deadline_s):
                self.host = self.make_host()
        finally:  # of this process, which lives
            attempts.end()

    def run(self, name: str) -> tuple[int, Stats]:
        """Make one shard; questions that break it are left out of it and noted in its footer."""
        assert self.host is not None
        started = time.perf_counter()
        tables = {key: read_shard(item.folder_url, name, item.columns) for key, item in self.inputs.items()}
        for key, item in self.inputs.items():
            if item.eval_only:
                questions = tables["questions"]
                ids = questions.filter(pc.equal(questions["split"], "eval"))["question_id"]
                tables[key] = tables[key].filter(pc.is_in(tables[key]["question_id"], ids.combine_chunks()))
        attempts = Attempts(self.folder_url, name)
        table, stats, failures = isolate(self._process, tables, attempts)
        show_gpu_memory(self.tags)
        stats = {"seconds": time.perf_counter() - started} | stats
        stats |= {FAILED: float(len(failures)), DEATHS: float(attempts.num_deaths)}
        write_shard(self.folder_url, name, table, stats, failures)
        attempts.forget()
        return tables["questions"].num_rows, stats

    def _process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        assert self.host is not None
        with deadline(self.faults.deadline_s):
            return self.host.process(tables)
