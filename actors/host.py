"""What all hosts share: the one-method interface, threads, and where a worker's chatter goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pyarrow as pa

#: What making a shard took: seconds, tokens, forward passes ... summed over shards by the driver.
Stats = dict[str, float]


class Host(Protocol):
    """Turns one shard's input tables into its output table."""

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """The output table and what it took."""


def set_num_threads(cpus: float) -> None:
    """Use as many threads as Ray set cores aside; Ray itself rounds fractions down to one thread."""
    count = max(1, round(cpus))
    os.environ["OMP_NUM_THREADS"] = str(count)
    import torch

    torch.set_num_threads(count)


def redirect_output(log_path: str | None) -> None:
    """Send this process's stdout and stderr to a file, native libraries included. No-op where the folder is absent
    (a worker on another machine keeps writing to Ray's own logs)."""
    if log_path is None or not Path(log_path).parent.is_dir():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
