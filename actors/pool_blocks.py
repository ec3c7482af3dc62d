"""Works on blocks of a cleaned pool where they lie; only keys, counts and bad rows return to the driver."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from actors.workers.ray_data import original_error
from ka2l.pool.rows import questions_table, references_table

#: Rows that a task writes at least, so that small shards do not cost a task each.
_TASK_ROWS = 16_384

#: (index of the shard, questions, references), called in a worker.
WriteShard = Callable[[int, pa.Table, pa.Table], object]


class BlockKeys(NamedTuple):
    """Of one block, a row each; see ``ka2l.pool.rows.CLEAN``."""

    question: NDArray[np.uint64]
    id: NDArray[np.uint64]
    group: NDArray[np.uint64] | None
    """None where every row is a group of its own: then its key is that of the question."""
    split: NDArray[np.int8]
    usable: NDArray[np.bool_]
    reasons: Counter[str]
    """Rejected rows by the word before the colon."""
    examples: dict[str, str]
    """The first full reason of each kind."""


class _Part(NamedTuple):
    """Rows of a block that a shard takes."""

    block: int
    splits: NDArray[np.int8]
    """Index into ``schemas.SPLITS``, or -1 for rows that are left out, from row ``first`` on."""
    first: int


class Blocks:
    """The blocks of a cleaned pool, in source order.

    Args:
        refs: tables with the schema ``ka2l.pool.rows.CLEAN``.
    """

    def __init__(self, refs: Sequence[Any]) -> None:
        self.refs = refs
        self.starts: NDArray[np.int64] = np.zeros(len(refs) + 1, np.int64)
        """Index of each block's first row, and of the end; known when the keys are."""
        self._at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def each_keys(self) -> Iterator[BlockKeys]:
        """Keys of one block after the other; they are to be read to the end before anything else is asked."""
        for index, keys in self._each(_keys, [(ref,) for ref in self.refs]):
            self.starts[index + 1] = self.starts[index] + len(keys.question)
            yield keys

    def places(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Where rows, by their index, stand in the source."""
        asked = [(self.refs[block], inside) for block, inside in self._by_block(np.unique(rows))]
        found: list[str] = []
        for _, places in self._each(_places, asked):
            found += places
        return dict(zip(np.unique(rows).tolist(), found, strict=True))

    def take(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """Rows with these indices (sorted), block by block: their indices, and the rows."""
        blocks = list(self._by_block(rows))
        asked = [(self.refs[block], inside) for block, inside in blocks]
        for index, table in self._each(_take, asked):
            block, inside = blocks[index]
            yield self.starts[block] + inside, table

    def write_shards(self, splits: NDArray[np.int8], shard_rows: int, write: WriteShard) -> Iterator[tuple[int, int]]:
        """Hand every row with a split >= 0 to ``write``, in a worker, in shards of ``shard_rows`` rows; the last has
        fewer. Yields (index of the shard, its rows), in order.

        Raises:
            KA2LError: as ``write`` raised it.
        """
        runs = [
            (write, first, shard_rows, [part._replace(block=0) for part in parts], *(self.refs[p.block] for p in parts))
            for first, parts in self._runs(splits, shard_rows)
        ]
        for _, written in self._each(_write, runs):
            yield from written

    def _runs(self, splits: NDArray[np.int8], shard_rows: int) -> Iterator[tuple[int, list[_Part]]]:
        """Runs of whole shards: the index of the first one, and the rows of all."""
        wanted = shard_rows * max(1, _TASK_ROWS // shard_rows)
        parts: list[_Part] = []
        missing, shard = wanted, 0
        for block in range(len(self.refs)):
            inside = splits[self.starts[block] : self.starts[block + 1]]
            kept = np.flatnonzero(inside >= 0)
            while len(kept):
                taken, kept = kept[:missing], kept[missing:]
                first, end = int(taken[0]), int(taken[-1]) + 1
                parts.append(_Part(block, inside[first:end].copy(), first))
                missing -= len(taken)
                if not missing:
                    yield shard, parts
                    parts, missing, shard = [], wanted, shard + wanted // shard_rows
        if parts:
            yield shard, parts

    def _by_block(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Sorted indices of rows as (block, rows within it), for blocks that hold some."""
        ends = np.searchsorted(rows, self.starts)
        for block in np.flatnonzero(np.diff(ends)).tolist():
            yield block, rows[ends[block] : ends[block + 1]] - self.starts[block]

    def _each(self, task: Any, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Results of a task for each of the arguments, in order; a few are under way at any time."""
        waiting: deque[Any] = deque()
        try:
            for index, of_one in enumerate(arguments):
                waiting.append(task.remote(*of_one))
                if len(waiting) >= self._at_once:
                    yield index + 1 - len(waiting), ray.get(waiting.popleft())
            while waiting:
                yield len(arguments) - len(waiting), ray.get(waiting.popleft())
        except ray.exceptions.RayError as error:
            raise original_error(error) from error


@ray.remote
def _keys(block: pa.Table) -> BlockKeys:
    question, group = block["question_key"].to_numpy(), block["group_key"].to_numpy()
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reason in block["reason"].drop_null().to_pylist():
        kind = reason.split(":", 1)[0]
        reasons[kind] += 1
        examples.setdefault(kind, reason)
    return BlockKeys(
        question,
        block["id_key"].to_numpy(),
        None if (group == question).all() else group,
        block["split_index"].to_numpy(),
        pc.is_null(block["reason"]).to_numpy(),
        reasons,
        examples,
    )


@ray.remote
def _places(block: pa.Table, rows: NDArray[np.int64]) -> list[str]:
    chosen = block.select(["source", "row"]).take(pa.array(rows)).to_pylist()
    return [f"row {row['row']} of {row['source']}" for row in chosen]


@ray.remote
def _take(block: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    return block.take(pa.array(rows))


@ray.remote
def _write(
    write: WriteShard, first_shard: int, shard_rows: int, parts: list[_Part], *blocks: pa.Table
) -> list[tuple[int, int]]:
    tables, splits = [], []
    for part, block in zip(parts, blocks, strict=True):
        rows, kept = block.slice(part.first, len(part.splits)), part.splits >= 0
        tables.append(rows if kept.all() else rows.filter(pa.array(kept)))
        splits.append(part.splits[kept])
    table, assigned = pa.concat_tables(tables), np.concatenate(splits)
    written = []
    for index, start in enumerate(range(0, len(table), shard_rows), first_shard):
        rows = table.slice(start, shard_rows).combine_chunks()
        inside = assigned[start : start + shard_rows]
        write(index, questions_table(rows, inside), references_table(rows))
        written.append((index, len(rows)))
    return written
