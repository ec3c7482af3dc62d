"""What all hosts share: the one-method interface, threads, and the log of a worker's output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ka2l.errors import ResourcesBusyError

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


def wait_for_gpu_memory(share: float, timeout_s: float = 120.0) -> None:
    """Wait until ``share`` of this process's first GPU is free; no-op without one.

    Ray gives a GPU to the next worker as soon as the last one is told to end; its memory comes free a little later.

    Raises:
        ResourcesBusyError: still taken after ``timeout_s`` seconds.
    """
    import torch

    if not torch.cuda.is_available():
        return
    deadline = time.monotonic() + timeout_s
    while True:
        free, total = torch.cuda.mem_get_info()
        if free >= share * total:
            return
        if time.monotonic() > deadline:
            raise ResourcesBusyError(
                f"{free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB are free, {share:.0%} are wanted",
                hint="See nvidia-smi for who holds it; end that, or lower sampler.gpu_memory_utilization.",
            )
        time.sleep(0.5)
