"""Reads a question pool with Ray Data: workers read and clean, the driver decides duplicates and splits from keys.

The text stays in Ray's object store (which spills to disk); the driver holds about 50 bytes a row and one shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from actors.shards import quiet_data_context
from ka2l import pool, pool_sources, pool_splits
from ka2l.errors import PoolError
from ka2l.pool import ColumnsConfig, PoolConfig, RowMapper
from ka2l.pool_sources import Piece
from ka2l.records import QUARANTINE, SPLITS

_CHUNK_ROWS = 4096
_BIN_BYTES = 64 * 2**20
_MAX_BINS = 200


@dataclass(frozen=True)
class PoolTables:
    """A split pool. ``shards`` can be consumed once."""

    shards: Iterator[tuple[pa.Table, pa.Table]]
    """(questions, references) tables of the same rows, in source order."""
    counts: dict[str, int]
    """``rows`` read, ``usable``, one entry a split, ``quarantined`` and ``quarantined_<reason>``."""


@dataclass
class _Keys:
    """What the driver holds of a pool: one entry a row, in source order."""

    sources: list[str]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    usable: NDArray[np.bool_]
    question: NDArray[np.uint64]
    id: NDArray[np.uint64]
    group: NDArray[np.uint64]
    split: NDArray[np.int8]
    reasons: Counter[str]
    """Rejected rows by the word before the colon."""
    examples: dict[str, str]
    """The first full reason of each kind."""


def read_pool(
    config: PoolConfig, seed: int, *, write_quarantine: Callable[[pa.Table], object], shard_rows: int = 2000
) -> PoolTables:
    """Read, check, quarantine and split the pool. Ray must be initialised.

    Args:
        config: the pool; ``testbed`` must have been resolved to a path before.
        seed: the run's seed, from which splits are drawn.
        write_quarantine: writes one table with the schema ``records.QUARANTINE`` (at most ``shard_rows`` rows) and
            returns where, for error messages. Not called where no row is quarantined. It is called before this
            function returns, and before it raises because too few rows are usable.
        shard_rows: rows of the tables handed out; the last has fewer.

    Raises:
        PoolError: nothing at the path, an unreadable file, a missing column, no usable row, or too few for the splits.
    """
    with quiet_data_context():
        dataset = _clean_dataset(config).materialize()
        keys = _collect_keys(dataset, config)
        _refuse_unreadable(keys)
        by_question, by_id = np.full(len(keys.row), -1), np.full(len(keys.row), -1)
        usable = np.flatnonzero(keys.usable)
        found = pool_splits.find_duplicates(keys.question[usable], keys.id[usable], keys.split[usable])
        for target, winner in zip((by_question, by_id), found, strict=True):
            target[usable] = np.where(winner >= 0, usable[winner], -1)
        kept = np.flatnonzero(keys.usable & (by_question < 0) & (by_id < 0))
        counts = _counts(keys, by_question, by_id)
        written = _write_quarantine(dataset, keys, by_question, by_id, write_quarantine, shard_rows)
        if not len(kept):
            raise _no_usable_row(keys, config.path, written)
        _refuse_unused_group(keys, kept, config)
        try:
            assigned = pool_splits.assign_splits(
                keys.question[kept],
                keys.group[kept],
                keys.split[kept],
                num_seed=config.num_seed,
                num_eval=config.num_eval,
                seed=seed,
            )
        except PoolError as err:
            where = f"; {counts['quarantined']} rows were quarantined: {written}" if written else ""
            raise PoolError(err.message + where, hint=err.hint) from None
        splits = np.full(len(keys.row), -1, dtype=np.int8)
        splits[kept] = assigned
        counts["usable"] = len(kept)
        counts |= {name: int((assigned == index).sum()) for index, name in enumerate(SPLITS)}
        return PoolTables(_shards(dataset, splits, shard_rows), counts)


# ---------------------------------------------------------------------------------------------------- reading


def _clean_dataset(config: PoolConfig) -> ray.data.Dataset:
    columns = config.columns or ColumnsConfig()
    required = [columns.question, columns.answers, columns.group, columns.fact, columns.split]
    names = tuple(name for name in required if name is not None)
    if pool_sources.is_dataset(config.path):
        dataset = _read_hub(config, columns, names)
    else:
        bins = _bins(pool_sources.find_pieces(config.path, names))
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
    tables = [pool.CLEAN.empty_table()]
    for text in batch["pieces"].to_pylist():
        for fields in json.loads(text):
            piece = Piece(*fields)
            rows = pool_sources.read_piece(piece)
            while chunk := list(islice(rows, _CHUNK_ROWS)):
                tables.append(pool.clean_table(chunk, columns, config, piece.path))
                if sum(map(len, tables)) >= _CHUNK_ROWS:
                    yield pa.concat_tables(tables).combine_chunks()
                    tables = []
    if tables:
        yield pa.concat_tables(tables).combine_chunks()


def _read_hub(config: PoolConfig, columns: ColumnsConfig, required: tuple[str, ...]) -> ray.data.Dataset:
    loaded = pool_sources.load_dataset(config.path, config.hf_name, config.hf_split)
    if config.limit:
        loaded = loaded.select(range(min(config.limit, len(loaded))))
    known = pool_sources.KNOWN_DATASETS.get(config.path)
    # Columns named by the user beyond the standard ones refer to the published layout.
    mapper = known.mapper if known and (columns.question, columns.answers) == ("question", "answers") else None
    if mapper is None:
        pool_sources.check_columns(loaded.column_names, required, config.path)
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
    return pool.clean_table(rows, columns, config, source, mapper)


# ---------------------------------------------------------------------------------------------------- deciding


def _collect_keys(dataset: ray.data.Dataset, config: PoolConfig) -> _Keys:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in pool.KEY_COLUMNS}
    sources: dict[str, int] = {}
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    batches = dataset.select_columns(list(pool.KEY_COLUMNS)).iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in cast("Iterator[pa.Table]", batches):
        encoded = pc.dictionary_encode(batch["source"].combine_chunks())
        codes = [sources.setdefault(name, len(sources)) for name in encoded.dictionary.to_pylist()]
        parts["source"].append(np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()])
        parts["reason"].append(pc.is_null(batch["reason"]).to_numpy())
        for name in ("row", "question_key", "id_key", "group_key", "split_index"):
            parts[name].append(batch[name].to_numpy())
        for reason in batch["reason"].drop_null().to_pylist():
            kind = reason.split(":", 1)[0]
            reasons[kind] += 1
            examples.setdefault(kind, reason)
    if not sum(map(len, parts["row"])):
        raise PoolError(f"the pool {config.path!r} has no rows", hint="give files with at least one question")
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return _Keys(
        sources=list(sources),
        source=joined["source"],
        row=joined["row"],
        usable=joined["reason"],
        question=joined["question_key"],
        id=joined["id_key"],
        group=joined["group_key"],
        split=joined["split_index"],
        reasons=reasons,
        examples=examples,
    )


def _refuse_unreadable(keys: _Keys) -> None:
    # One damaged file is not one bad row: going on would silently lose all its questions.
    if "unreadable" in keys.examples:
        detail = keys.examples["unreadable"].removeprefix("unreadable: ")
        raise PoolError(f"a file of the pool cannot be read to its end: {detail}", hint="repair or remove it")


def _refuse_unused_group(keys: _Keys, kept: NDArray[np.int64], config: PoolConfig) -> None:
    # A misspelt group would silently let one subject into eval and candidates. Only JSONL comes so far unchecked.
    named = config.columns and (config.columns.group or config.columns.fact)
    if named and (keys.group[kept] == keys.question[kept]).all():
        raise PoolError(f"no row of the pool {config.path!r} has a value in {named!r}", hint="check pool.columns")


def _counts(keys: _Keys, by_question: NDArray[np.int64], by_id: NDArray[np.int64]) -> dict[str, int]:
    keys.reasons["duplicate"] = int((by_question >= 0).sum())
    keys.reasons["duplicate_id"] = int((by_id >= 0).sum())
    quarantined = {f"quarantined_{kind}": number for kind, number in sorted(keys.reasons.items()) if number}
    return {"rows": len(keys.row), "usable": 0, "quarantined": sum(quarantined.values()), **quarantined}


def _no_usable_row(keys: _Keys, path: str, written: str) -> PoolError:
    kind, number = keys.reasons.most_common(1)[0]
    return PoolError(
        f"the pool {path!r} has no usable row: {number} of {len(keys.row)} are {keys.examples[kind]}",
        hint=f"see all quarantined rows with their reasons in {written}; columns are set by pool.columns",
    )


# ---------------------------------------------------------------------------------------------------- handing out


def _write_quarantine(
    dataset: ray.data.Dataset,
    keys: _Keys,
    by_question: NDArray[np.int64],
    by_id: NDArray[np.int64],
    write: Callable[[pa.Table], object],
    shard_rows: int,
) -> str:
    bad = ~keys.usable | (by_question >= 0) | (by_id >= 0)
    if not bad.any():
        return ""

    def place(index: int) -> str:
        return f"row {keys.row[index]} of {keys.sources[keys.source[index]]}"

    tables = _quarantined(dataset, bad, by_question, by_id, place)
    names = [str(write(table)) for table in _rechunk(tables, shard_rows)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _quarantined(
    dataset: ray.data.Dataset,
    bad: NDArray[np.bool_],
    by_question: NDArray[np.int64],
    by_id: NDArray[np.int64],
    place: Callable[[int], str],
) -> Iterator[pa.Table]:
    for start, batch in _blocks(dataset):
        rows = np.flatnonzero(bad[start : start + len(batch)])
        if not len(rows):
            continue
        chosen = batch.take(pa.array(rows))
        reasons = []
        for index, reason in zip((rows + start).tolist(), chosen["reason"].to_pylist(), strict=True):
            if by_question[index] >= 0:
                reason = f"duplicate: same question as {place(by_question[index])}"
            elif by_id[index] >= 0:
                reason = f"duplicate_id: same id as {place(by_id[index])}, another question"
            reasons.append(reason)
        yield pool.quarantine_table(chosen, reasons)


def _shards(
    dataset: ray.data.Dataset, splits: NDArray[np.int8], shard_rows: int
) -> Iterator[tuple[pa.Table, pa.Table]]:
    def kept() -> Iterator[pa.Table]:
        for start, batch in _blocks(dataset):
            block = splits[start : start + len(batch)]
            rows = np.flatnonzero(block >= 0)
            yield batch.take(pa.array(rows)).append_column("assigned", pa.array(block[rows]))

    for table in _rechunk(kept(), shard_rows):
        yield pool.questions_table(table, table["assigned"].to_numpy()), pool.references_table(table)


def _blocks(dataset: ray.data.Dataset) -> Iterator[tuple[int, pa.Table]]:
    """Blocks of the materialised dataset with the index of their first row, in source order."""
    start = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield start, batch
        start += len(batch)


def _rechunk(tables: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= num_rows:
            joined = pa.concat_tables(waiting)
            full = len(joined) - len(joined) % num_rows
            yield from (joined.slice(start, num_rows) for start in range(0, full, num_rows))
            waiting = [joined.slice(full)]
    rest = pa.concat_tables(waiting) if waiting else QUARANTINE.empty_table()
    if len(rest):
        yield rest.combine_chunks()
