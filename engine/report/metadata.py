"""Shares of known and unknown questions by the pool's own columns."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.report.data import GroupShare

MAX_VALUES = 30
NUM_BINS = 5
#: Numbers from which the edges of bins are taken, at most.
_MAX_NUMBERS = 2**17


class _Cells(NamedTuple):
    """One column of a shard: values that are there, and which one each row has."""

    name: str
    values: list[Any]
    codes: NDArray[np.int64]
    """Index into ``values``, or -1 where the row has none; shape (num_rows,)."""


class _Numbers:
    """Numbers for quantiles: all up to a limit, from there on every second, fourth ... of all."""

    def __init__(self) -> None:
        self.kept: NDArray[np.float64] = np.zeros(0)
        self._seen, self._step = 0, 1

    def add(self, values: NDArray[np.float64]) -> None:
        self.kept = np.concatenate([self.kept, values[-self._seen % self._step :: self._step]])
        self._seen += len(values)
        while len(self.kept) > _MAX_NUMBERS:
            self.kept, self._step = self.kept[::2], 2 * self._step


@dataclass
class _Column:
    distinct: set[Any] = field(default_factory=set)
    """At most MAX_VALUES + 1 of them."""
    numeric: bool = True
    numbers: _Numbers = field(default_factory=_Numbers)

    def put(self, cells: _Cells) -> bool:
        """Take in a shard's values; False where the column has become one of too many texts."""
        for value in cells.values:
            self.numeric = self.numeric and isinstance(value, int | float) and not isinstance(value, bool)
            if len(self.distinct) <= MAX_VALUES:
                self.distinct.add(value)
        if self.numeric:
            self.numbers.add(np.array(cells.values, np.float64)[cells.codes[cells.codes >= 0]])
        return self.numeric or len(self.distinct) <= MAX_VALUES

    def grouping(self) -> _Grouping:
        """The groups that the values fall into."""
        if len(self.distinct) <= MAX_VALUES:
            order = sorted(self.distinct) if self.numeric else sorted(self.distinct, key=str)
            labels = [f"{value:g}" if isinstance(value, float) else str(value) for value in order]
            return _Grouping(labels, self.numeric, {value: place for place, value in enumerate(order)}, np.zeros(0))
        edges = np.unique(np.quantile(self.numbers.kept, np.linspace(0, 1, NUM_BINS + 1)))
        labels = [f"{low:,.6g} – {high:,.6g}" for low, high in itertools.pairwise(edges)]
        return _Grouping(labels, self.numeric, {}, edges)


class _Grouping(NamedTuple):
    labels: list[str]
    numeric: bool
    places: dict[Any, int]
    """Group of each value; empty for numbers in bins."""
    edges: NDArray[np.float64]
    """Of the bins."""

    def groups(self, cells: _Cells) -> NDArray[np.int64]:
        """Group of each row, -1 where it has no value; shape (num_rows,)."""
        if self.places:
            of_value = np.array([self.places[value] for value in cells.values], dtype=np.int64)
        else:
            found = np.searchsorted(self.edges, np.array(cells.values, np.float64), side="right") - 1
            of_value = np.clip(found, 0, max(len(self.labels) - 1, 0))
        return np.append(of_value, -1)[cells.codes]


class MetadataColumns:
    """The columns of a pool that questions can be grouped by: ``group`` and the keys of ``metadata``.

    A column of texts with more than 30 values is dropped as soon as that is seen; numbers with more values are cut into
    five equal parts. Goes through the pool shard by shard, and keeps of it only what is named here.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self._dropped: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self._columns)

    def add(self, questions: pa.Table) -> None:
        """Take in a shard of the ``questions`` table: group and metadata."""
        for cells in _cells(questions, self._dropped):
            if not self._columns.setdefault(cells.name, _Column()).put(cells):
                self._dropped.add(cells.name)
                del self._columns[cells.name]

    def shares(self) -> MetadataShares:
        """Counts what is unknown, once all shards have been added."""
        return MetadataShares({name: column.grouping() for name, column in self._columns.items()}, self._dropped)


class MetadataShares:
    """The share of unknown questions by value, for every column with 2 to 30 values or with numbers."""

    def __init__(self, columns: dict[str, _Grouping], dropped: set[str]) -> None:
        self._columns = columns
        self._dropped = dropped
        self._sums = {name: np.zeros((3, len(column.labels))) for name, column in columns.items()}
        """By column: questions, unknown questions and their P(unknown), by group."""

    def add(self, questions: pa.Table, question_ids: pa.ChunkedArray, p_unknown: NDArray[np.float32]) -> None:
        """Take in a shard.

        Args:
            questions: question_id, group and metadata.
            question_ids: those of the shard that were judged, shape (n,).
            p_unknown: shape (n,).
        """
        rows = pc.index_in(questions["question_id"], value_set=question_ids.combine_chunks()).fill_null(-1).to_numpy()
        for cells in _cells(questions, self._dropped):
            if cells.name not in self._columns:
                continue
            groups = self._columns[cells.name].groups(cells)
            there = (groups >= 0) & (rows >= 0)
            codes, values = groups[there], p_unknown[rows[there]]
            for sums, weights in zip(self._sums[cells.name], (None, values >= 0.5, values), strict=True):
                sums += np.bincount(codes, weights=weights, minlength=len(sums))

    def found(self) -> list[GroupShare]:
        """Texts by falling share of unknown questions, numbers by value."""
        found: list[GroupShare] = []
        for name, column in self._columns.items():
            counts, unknown, sums = self._sums[name]
            if np.count_nonzero(counts) < 2:
                continue
            shares = [
                GroupShare(name, column.labels[i], int(counts[i]), int(unknown[i]), float(sums[i] / counts[i]))
                for i in np.flatnonzero(counts)
            ]
            if not column.numeric:
                shares.sort(key=lambda share: (-share.num_unknown / share.num_questions, share.value))
            found += shares
        return found


def _cells(questions: pa.Table, dropped: set[str]) -> Iterator[_Cells]:
    """The columns of a shard. Texts are parsed once, however many rows have them."""
    encoded = pc.dictionary_encode(questions["metadata"].combine_chunks())
    texts, codes = encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy()
    by_name: dict[str, dict[int, Any]] = {}
    for code, text in enumerate(texts):
        for name, value in _parsed(text).items():
            if name not in dropped and _is_usable(value):
                by_name.setdefault(name, {})[code] = value
    if "group" not in dropped:
        own = by_name.pop("group", {})
        encoded = pc.dictionary_encode(questions["group"].combine_chunks())
        groups, group_codes = encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy()
        # The metadata's own value goes before.
        values = [*groups, *own.values()]
        places = np.full(len(texts) + 1, -1)
        places[list(own)] = np.arange(len(groups), len(values))
        both = np.where(places[codes] >= 0, places[codes], group_codes)
        usable = np.append([_is_usable(value) for value in values], False).astype(bool)
        yield _compact("group", values, np.where(usable[both], both, -1))
    for name, of_text in by_name.items():
        places = np.full(len(texts) + 1, -1)
        places[list(of_text)] = np.arange(len(of_text))
        yield _Cells(name, list(of_text.values()), places[codes])


def _compact(name: str, values: list[Any], codes: NDArray[np.int64]) -> _Cells:
    """Without the values that no row has."""
    present = np.unique(codes[codes >= 0])
    places = np.full(len(values) + 1, -1)
    places[present] = np.arange(len(present))
    return _Cells(name, [values[code] for code in present], places[codes])


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text) if text else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _is_usable(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else isinstance(value, int | float) and math.isfinite(value)
