"""Parquet shards: written whole or not at all, with their costs and failures in the footer."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.store.manifest import FileEntry
from engine.store.storage import filesystem, with_retries, write_bytes

_STATS_KEY = b"ka2l_stats"
_FAILURES_KEY = b"ka2l_failures"


class Failure(NamedTuple):
    """A question that a stage could not work on."""

    question_id: str
    reason: str


def write_shard(
    folder_url: str, name: str, table: pa.Table, stats: Mapping[str, float], failures: Sequence[Failure] = ()
) -> FileEntry:
    """Write one shard atomically; called in workers.

    ``stats``, and the questions that could not be worked on, travel in the Parquet footer, so that resume keeps them.
    """
    filesystem_, folder = filesystem(folder_url)
    footer = {_STATS_KEY: json.dumps(dict(stats)).encode()}
    if failures:
        footer[_FAILURES_KEY] = json.dumps([failure._asdict() for failure in failures]).encode()
    table = table.replace_schema_metadata(footer)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    write_bytes(filesystem_, f"{folder}/{name}", content)
    return FileEntry(
        path=name,
        num_rows=table.num_rows,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        stats=dict(stats),
    )


def read_shard(
    folder_url: str, name: str, columns: list[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """Read one shard; called in workers, for shards that the driver has verified."""
    filesystem_, folder = filesystem(folder_url)
    path = f"{folder}/{name}"
    table = with_retries(lambda: pq.read_table(path, filesystem=filesystem_, columns=columns, filters=where), path)
    return table.replace_schema_metadata(None)


def shard_stats(parquet: pq.FileMetaData) -> dict[str, float]:
    """What making a shard cost, from its footer."""
    stats: dict[str, float] = json.loads((parquet.metadata or {}).get(_STATS_KEY, b"{}"))
    return stats


def shard_failures(parquet: pq.FileMetaData) -> list[Failure]:
    """Questions of a shard that could not be worked on, from its footer."""
    return [Failure(**failure) for failure in json.loads((parquet.metadata or {}).get(_FAILURES_KEY, b"[]"))]


def shard_name(index: int) -> str:
    """``part-00017.parquet``."""
    return f"part-{index:05d}.parquet"
