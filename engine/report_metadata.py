"""Known and unknown by the pool's own columns."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.report_data import GroupShare

MAX_VALUES = 30
NUM_BINS = 5


@dataclass
class _Column:
    rows: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    distinct: set[Any] = field(default_factory=set)
    """At most MAX_VALUES + 1 of them."""
    numeric: bool = True

    def put(self, row: int, value: Any) -> bool:
        """Take in a value; False where the column has become one of too many texts."""
        self.numeric = self.numeric and isinstance(value, int | float) and not isinstance(value, bool)
        if len(self.distinct) <= MAX_VALUES:
            self.distinct.add(value)
        self.rows.append(row)
        self.values.append(value)
        return self.numeric or len(self.distinct) <= MAX_VALUES

    def codes(self) -> tuple[list[str], NDArray[np.int64]]:
        """Labels of the groups and the group of each value, shape (len(values),)."""
        if len(self.distinct) <= MAX_VALUES:
            order = sorted(self.distinct) if self.numeric else sorted(self.distinct, key=str)
            places = {value: place for place, value in enumerate(order)}
            return [f"{value:g}" if isinstance(value, float) else str(value) for value in order], np.array(
                [places[value] for value in self.values], dtype=np.int64
            )
        values = np.asarray(self.values, dtype=np.float64)
        edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_BINS + 1)))
        labels = [f"{low:,.6g} – {high:,.6g}" for low, high in itertools.pairwise(edges)]
        return labels, np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(labels) - 1, 0))


class MetadataColumns:
    """The columns of a pool that questions can be grouped by: ``group`` and the keys of ``metadata``.

    A column of texts with more than 30 values is dropped as soon as that is seen; numbers with more values are kept,
    to be cut into five equal parts.
    """

    def __init__(self) -> None:
        self._ids: list[pa.Array] = []
        self._num_rows = 0
        self._columns: dict[str, _Column] = {}
        self._dropped: set[str] = set()

    def add(self, questions: pa.Table) -> None:
        """Take in a shard of the ``questions`` table: question_id, group and metadata."""
        groups, texts = questions["group"].to_pylist(), questions["metadata"].to_pylist()
        for row, (group, text) in enumerate(zip(groups, texts, strict=True), start=self._num_rows):
            try:
                values = json.loads(text) if text else {}
            except ValueError:
                values = {}
            values = values if isinstance(values, dict) else {}
            if group is not None:
                values.setdefault("group", group)
            for name, value in values.items():
                if name in self._dropped or not _is_usable(value):
                    continue
                if not self._columns.setdefault(name, _Column()).put(row, value):
                    self._dropped.add(name)
                    del self._columns[name]
        self._ids += questions["question_id"].chunks
        self._num_rows += questions.num_rows

    def shares(self, question_ids: pa.ChunkedArray, p_unknown: NDArray[np.float32]) -> list[GroupShare]:
        """The share of unknown questions by value, for every column with 2 to 30 values or with numbers.

        Args:
            question_ids: shape (n,), the questions that were judged.
            p_unknown: shape (n,).

        Returns:
            Texts by falling share of unknown questions, numbers by value.
        """
        if not self._ids:
            return []
        judged_ids = pa.array(question_ids.to_pylist(), pa.string())
        places = pc.index_in(pa.chunked_array(self._ids), value_set=judged_ids).fill_null(-1).to_numpy()
        found: list[GroupShare] = []
        for name, column in self._columns.items():
            labels, codes = column.codes()
            rows = places[np.asarray(column.rows, dtype=np.int64)]
            codes, values = codes[rows >= 0], p_unknown[rows[rows >= 0]]
            counts = np.bincount(codes, minlength=len(labels))
            if np.count_nonzero(counts) < 2:
                continue
            unknown = np.bincount(codes, weights=values >= 0.5, minlength=len(labels))
            sums = np.bincount(codes, weights=values, minlength=len(labels))
            shares = [
                GroupShare(name, labels[i], int(counts[i]), int(unknown[i]), float(sums[i] / counts[i]))
                for i in np.flatnonzero(counts)
            ]
            if not column.numeric:
                shares.sort(key=lambda share: (-share.num_unknown / share.num_questions, share.value))
            found += shares
        return found


def _is_usable(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else isinstance(value, int | float) and math.isfinite(value)
