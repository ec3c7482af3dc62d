"""Reads a question pool with Ray Data: workers read and clean, the driver decides duplicates and splits from keys.

The text stays in Ray's object store (which spills to disk) until workers write it as shards. The driver holds 26 bytes
a row and never a text: two or three 64-bit hashes, a split and whether the row is usable. Deciding takes as much again
for a moment, so that ten million rows come to about half a GiB.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from actors.pool_blocks import Blocks, WriteShard
from actors.workers.ray_data import quiet_data_context
from ka2l.errors import PoolError
from ka2l.pool import sources
from ka2l.pool.config import ColumnsConfig, PoolConfig
from ka2l.pool.rows import CLEAN, RowMapper, clean_table, quarantine_table
from ka2l.pool.sources import Piece
from ka2l.pool.splits import Repeats, assign_splits, find_duplicates
from ka2l.schemas import SPLITS

_CHUNK_ROWS = 4096
_BIN_BYTES = 64 * 2**20
_MAX_BINS = 200


class PoolTables(NamedTuple):
    """A split pool."""

    write_shards: Callable[[WriteShard], Iterator[tuple[int, int]]]
    """Has workers write (questions, references) tables of the same rows, in source order; yields each shard's index
    and rows when it is written. To be called once."""
    counts: dict[str, int]
    """``rows`` read, ``usable``, one entry a split, ``quarantined`` and ``quarantined_<reason>``."""


@dataclass
class _Keys:
    """What the driver holds of a pool: one entry a row, in source order."""

    question: NDArray[np.uint64]
    id: NDArray[np.uint64]
    group: NDArray[np.uint64]
    """The same array as ``question`` where every question is a group of its own."""
    split: NDArray[np.int8]
    usable: NDArray[np.bool_]
    reasons: Counter[str]
    """Rejected rows by the word before the colon."""
    examples: dict[str, str]
    """The first full reason of each kind."""


def read_pool(
    config: PoolConfig, seed: int, *, write_quarantine: Callable[[Iterator[pa.Table]], str], shard_rows: int = 2000
) -> PoolTables:
    """Read, check, quarantine and split the pool. Ray must be initialised.

    Args:
        config: the pool; ``testbed`` must have been resolved to a path before.
        seed: the run's seed, from which splits are drawn.
        write_quarantine: writes tables with the schema ``schemas.QUARANTINE`` as they come and returns where, for
            error messages. Not called where no row is quarantined. It is called before this function returns, and
            before it raises because too few rows are usable.
        shard_rows: rows of the tables handed out; the last has fewer.

    Raises:
        PoolError: nothing at the path, an unreadable file, a missing column, no usable row, or too few for the splits.
    """
    with quiet_data_context():
        dataset = _clean_dataset(config).materialize()
        blocks = Blocks(dataset.to_arrow_refs())
    keys = _collect_keys(blocks, dataset.count(), config)
    _refuse_unreadable(keys)
    by_question, by_id = find_duplicates(keys.question, keys.id, keys.split, keys.usable)
    del keys.id
    counts = _counts(keys, by_question, by_id)
    written = _write_quarantine(blocks, keys, by_question, by_id, write_quarantine)
    is_kept = keys.usable
    for repeats in (by_question, by_id):
        is_kept[repeats.rows] = False
    if not is_kept.any():
        raise _no_usable_row(keys, config.path, written)
    _keep(keys, is_kept)
    _refuse_unused_group(keys, config)
    try:
        assigned = assign_splits(
            keys.question, keys.group, keys.split, num_seed=config.num_seed, num_eval=config.num_eval, seed=seed
        )
    except PoolError as err:
        where = f"; {counts['quarantined']} rows were quarantined: {written}" if written else ""
        raise PoolError(err.message + where, hint=err.hint) from None
    counts["usable"] = len(assigned)
    counts |= {name: int((assigned == index).sum()) for index, name in enumerate(SPLITS)}
    splits = np.full(len(is_kept), -1, dtype=np.int8)
    splits[is_kept] = assigned
    return PoolTables(partial(blocks.write_shards, splits, shard_rows), counts)


# ---------------------------------------------------------------------------------------------------- reading


def _clean_dataset(config: PoolConfig) -> ray.data.Dataset:
    columns = config.columns or ColumnsConfig()
    required = [columns.question, columns.answers, columns.group, columns.fact, columns.split]
    names = tuple(name for name in required if name is not None)
    if sources.is_dataset(config.path):
        dataset = _read_hub(config, columns, names)
    else:
        bins = _bins(sources.find_pieces(config.path, names))
        items = [{"pieces": json.dumps(pieces)} for pieces in bins]
        read = partial(_clean_pieces, columns=columns, config=config)
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_format="pyarrow")
    return dataset.limit(config.limit) if config.limit else dataset


def _bins(pieces: list[Piece]) -> list[list[Piece]]:
    """Cut the pieces into runs of about the same size: one task each, few for many small files."""
    total = sum(piece.num_bytes for piece in pieces)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    num_bins = max(1, min(len(pieces), _MAX_BINS * cpus, max(2 * cpus, total // _BIN_BYTES)))
    target = total / num_bins
    bins: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if bins[-1] and filled >= target * len(bins):
            bins.append([])
        bins[-1].append(piece)
        filled += piece.num_bytes
    return bins


def _clean_pieces(batch: pa.Table, columns: ColumnsConfig, config: PoolConfig) -> Iterator[pa.Table]:
    tables = [CLEAN.empty_table()]
    for text in batch["pieces"].to_pylist():
        for fields in json.loads(text):
            piece = Piece(*fields)
            rows = sources.read_piece(piece)
            while chunk := list(islice(rows, _CHUNK_ROWS)):
                tables.append(clean_table(chunk, columns, config, piece.path))
                if sum(map(len, tables)) >= _CHUNK_ROWS:
                    yield pa.concat_tables(tables).combine_chunks()
                    tables = []
    if tables:
        yield pa.concat_tables(tables).combine_chunks()


def _read_hub(config: PoolConfig, columns: ColumnsConfig, required: tuple[str, ...]) -> ray.data.Dataset:
    loaded = sources.load_dataset(config.path, config.hf_name, config.hf_split)
    if config.limit:
        loaded = loaded.select(range(min(config.limit, len(loaded))))
    known = sources.KNOWN_DATASETS.get(config.path)
    # Columns named by the user beyond the standard ones refer to the published layout.
    mapper = known.mapper if known and (columns.question, columns.answers) == ("question", "answers") else None
    if mapper is None:
        sources.check_columns(loaded.column_names, required, config.path)
    source = f"{config.path}[{config.hf_split}]"
    blocks: list[Any] = []
    first_row = 0
    # One block at a time goes from the memory-mapped data set to the object store.
    for table in loaded.with_format("arrow").iter(_CHUNK_ROWS):
        numbered = pa.table({"row": table.to_struct_array(), "position": np.arange(first_row, first_row + len(table))})
        blocks.append(ray.put(numbered))
        first_row += len(table)
    if not blocks:
        raise PoolError(f"{source} has no rows", hint="choose another pool.hf_split")
    clean = partial(_clean_numbered, columns=columns, config=config, source=source, mapper=mapper)
    return ray.data.from_arrow_refs(blocks).map_batches(clean, batch_format="pyarrow")


def _clean_numbered(
    batch: pa.Table, columns: ColumnsConfig, config: PoolConfig, source: str, mapper: RowMapper | None
) -> pa.Table:
    rows = zip(batch["position"].to_pylist(), batch["row"].to_pylist(), strict=True)
    return clean_table(rows, columns, config, source, mapper)


# ---------------------------------------------------------------------------------------------------- deciding


def _collect_keys(blocks: Blocks, num_rows: int, config: PoolConfig) -> _Keys:
    if not num_rows:
        raise PoolError(f"the pool {config.path!r} has no rows", hint="give files with at least one question")
    keys = _Keys(
        question=np.empty(num_rows, np.uint64),
        id=np.empty(num_rows, np.uint64),
        group=np.empty(0, np.uint64),
        split=np.empty(num_rows, np.int8),
        usable=np.empty(num_rows, np.bool_),
        reasons=Counter(),
        examples={},
    )
    start = 0
    for part in blocks.each_keys():
        rows = slice(start, start + len(part.question))
        keys.question[rows], keys.id[rows] = part.question, part.id
        keys.split[rows], keys.usable[rows] = part.split, part.usable
        if part.group is not None and not len(keys.group):
            keys.group = keys.question.copy()
        if len(keys.group):
            keys.group[rows] = part.question if part.group is None else part.group
        keys.reasons.update(part.reasons)
        keys.examples = part.examples | keys.examples
        start = rows.stop
    keys.group = keys.group if len(keys.group) else keys.question
    return keys


def _keep(keys: _Keys, is_kept: NDArray[np.bool_]) -> None:
    """Leave the rows that are kept, one array after the other."""
    if is_kept.all():
        return
    alone = keys.group is keys.question
    keys.question = keys.question[is_kept]
    keys.group = keys.question if alone else keys.group[is_kept]
    keys.split = keys.split[is_kept]


def _refuse_unreadable(keys: _Keys) -> None:
    # One damaged file is not one bad row: going on would silently lose all its questions.
    if "unreadable" in keys.examples:
        detail = keys.examples["unreadable"].removeprefix("unreadable: ")
        raise PoolError(f"a file of the pool cannot be read to its end: {detail}", hint="repair or remove it")


def _refuse_unused_group(keys: _Keys, config: PoolConfig) -> None:
    # A misspelt group would silently let one subject into eval and candidates. Only JSONL comes so far unchecked.
    named = config.columns and (config.columns.group or config.columns.fact)
    if named and (keys.group == keys.question).all():
        raise PoolError(f"no row of the pool {config.path!r} has a value in {named!r}", hint="check pool.columns")


def _counts(keys: _Keys, by_question: Repeats, by_id: Repeats) -> dict[str, int]:
    keys.reasons["duplicate"] = len(by_question.rows)
    keys.reasons["duplicate_id"] = len(by_id.rows)
    quarantined = {f"quarantined_{kind}": number for kind, number in sorted(keys.reasons.items()) if number}
    return {"rows": len(keys.usable), "usable": 0, "quarantined": sum(quarantined.values()), **quarantined}


def _no_usable_row(keys: _Keys, path: str, written: str) -> PoolError:
    kind, number = keys.reasons.most_common(1)[0]
    return PoolError(
        f"the pool {path!r} has no usable row: {number} of {len(keys.usable)} are {keys.examples[kind]}",
        hint=f"see all quarantined rows with their reasons in {written}; columns are set by pool.columns",
    )


# ---------------------------------------------------------------------------------------------------- quarantine


def _write_quarantine(
    blocks: Blocks,
    keys: _Keys,
    by_question: Repeats,
    by_id: Repeats,
    write: Callable[[Iterator[pa.Table]], str],
) -> str:
    bad = np.sort(np.concatenate([np.flatnonzero(~keys.usable), by_question.rows, by_id.rows]))
    return write(_quarantined(blocks, bad, by_question, by_id)) if len(bad) else ""


def _quarantined(blocks: Blocks, bad: NDArray[np.int64], by_question: Repeats, by_id: Repeats) -> Iterator[pa.Table]:
    place = blocks.places(np.concatenate([by_question.kept, by_id.kept]))
    for rows, chosen in blocks.take(bad):
        same_question, same_id = by_question.among(rows), by_id.among(rows)
        reasons = []
        for index, reason in zip(rows.tolist(), chosen["reason"].to_pylist(), strict=True):
            if index in same_question:
                reason = f"duplicate: same question as {place[same_question[index]]}"
            elif index in same_id:
                reason = f"duplicate_id: same id as {place[same_id[index]]}, another question"
            reasons.append(reason)
        yield quarantine_table(chosen, reasons)
