"""Reads parts of a run directory for its report: what is missing is empty, what is damaged is noted and empty."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from engine.store.manifest import Manifest
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.errors import KA2LError

#: What reading a damaged file may raise.
UNREADABLE = (KA2LError, OSError, pa.ArrowException, ValueError, KeyError)


class Reader:
    """Reads parts of a run. ``problems`` says what could not be read, one sentence each."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.problems: list[str] = []
        self._stages: dict[tuple[str, int | None], Stage] = {}

    def note(self, what: str, error: Exception) -> None:
        message = error.message if isinstance(error, KA2LError) else f"{type(error).__name__}: {error}"
        problem = f"{what}: {message.splitlines()[0] if message else type(error).__name__}"
        if problem not in self.problems:
            self.problems.append(problem)

    def stage(self, name: str, round_index: int | None) -> Stage:
        key = (name, round_index)
        if key not in self._stages:
            self._stages[key] = self.run.stage(name, round_index)
        return self._stages[key]

    def manifest(self, name: str, round_index: int | None) -> Manifest | None:
        stage = self.stage(name, round_index)
        try:
            return stage.manifest()
        except UNREADABLE as error:
            self.note(stage.label, error)
            return None

    def shards(self, name: str, round_index: int | None, columns: list[str]) -> Iterator[pa.Table]:
        """The shards of a committed table, one at a time."""
        stage = self.stage(name, round_index)
        try:
            if stage.manifest() is None:
                return
            stage.verify()
            for shard in stage.shard_names():
                yield read_shard(stage.url, shard, columns)
        except UNREADABLE as error:
            self.note(stage.label, error)

    def rows(self, name: str, round_index: int | None, columns: list[str], ids: Iterable[str]) -> list[dict[str, Any]]:
        """The rows of some questions."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        found: list[dict[str, Any]] = []
        if len(wanted):
            for table in self.shards(name, round_index, columns):
                found += table.filter(pc.is_in(table["question_id"], value_set=wanted)).to_pylist()
        return found

    def table(self, name: str, round_index: int | None, columns: list[str]) -> pa.Table | None:
        """A whole table; None where it is not there."""
        tables = list(self.shards(name, round_index, columns))
        return pa.concat_tables(tables) if tables else None

    def text(self, name: str) -> str:
        """A file at the top of the run; empty where it is not there."""
        try:
            return self.run.read_text(name) or ""
        except UNREADABLE as error:
            self.note(name, error)
            return ""

    def parsed(self, config: str) -> dict[str, Any]:
        """The config's keys; empty where it is no YAML mapping."""
        try:
            value = yaml.safe_load(config)
        except yaml.YAMLError as error:
            self.note("config.yaml", error)
            value = None
        return value if isinstance(value, dict) else {}

    def json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.text(name) or "{}")
        except UNREADABLE as error:
            self.note(name, error)
            value = None
        return value if isinstance(value, dict) else {}


class Sample:
    """A sample of a knowledge table that comes shard by shard: the same questions in every round.

    Args:
        limit: rows at most.
        shown: ids of the first round's sample; None in the first round.
    """

    def __init__(self, reader: Reader, index: int, limit: int, shown: pa.Array | None) -> None:
        manifest = reader.manifest("knowledge", index)
        num_rows = sum(entry.num_rows or 0 for entry in manifest.files) if manifest else 0
        self._places = np.arange(min(num_rows, limit))
        if num_rows > limit:
            self._places = np.sort(np.random.default_rng(0).choice(num_rows, limit, replace=False, shuffle=False))
        self._shown = shown
        self._tables: list[pa.Table] = []
        self.num_seen = 0
        """Rows so far."""

    def add(self, shard: pa.Table) -> None:
        """Take in the next shard."""
        if self._shown is None:
            start, end = np.searchsorted(self._places, [self.num_seen, self.num_seen + shard.num_rows])
            chosen = shard.take(pa.array(self._places[start:end] - self.num_seen))
        else:
            chosen = shard.filter(pc.is_in(shard["question_id"], value_set=self._shown))
        self.num_seen += shard.num_rows
        self._tables.append(chosen)

    def table(self) -> pa.Table:
        """The rows with a place in the plane."""
        table = pa.concat_tables(self._tables)
        return table.filter(pc.and_(pc.is_finite(table["pca_0"]), pc.is_finite(table["pca_1"])))

    def ids(self) -> pa.Array:
        """Ids of all that was drawn."""
        return pa.concat_tables(self._tables)["question_id"].combine_chunks()
