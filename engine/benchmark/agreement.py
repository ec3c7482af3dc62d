"""Compares the knowledge maps of several models on one data set, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.benchmark.data import Agreement, Pair
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage

_UNKNOWN = 0.5


class KnowledgeMap(NamedTuple):
    """The committed table ``knowledge`` of a base model."""

    model: str
    stage: Stage
    fingerprint: str


class Counts(NamedTuple):
    """Questions by who knows them, of shards of any number: they add up."""

    num_questions: int
    num_left_out: int
    both_unknown: NDArray[np.int64]
    """Shape (num_models, num_models); the diagonal says how many each model does not know."""
    known_by: NDArray[np.int64]
    """Shape (num_models + 1,)."""

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(
            self.num_questions + other.num_questions,
            self.num_left_out + other.num_left_out,
            self.both_unknown + other.both_unknown,
            self.known_by + other.known_by,
        )


def agreement(data: str, strategy: str, seed: int, maps: Sequence[KnowledgeMap]) -> Agreement:
    """Compare the maps of two models or more; holds one shard of each at a time.

    Raises:
        KA2LError: a map is damaged.
    """
    counts = count_unknown(np.zeros((len(maps), 0), bool))
    for unknown, num_left_out in _shards(maps):
        counts = counts.plus(count_unknown(unknown)._replace(num_left_out=num_left_out))
    names = [each.model for each in maps]
    total = max(1, counts.num_questions)
    return Agreement(
        data=data,
        strategy=strategy,
        seed=seed,
        maps={each.model: each.fingerprint for each in maps},
        num_questions=counts.num_questions,
        num_left_out=counts.num_left_out,
        unknown={name: int(counts.both_unknown[index, index]) / total for index, name in enumerate(names)},
        pairs=[_pair(names, counts, *places) for places in combinations(range(len(names)), 2)],
        known_by=counts.known_by.tolist(),
    )


def count_unknown(unknown: NDArray[np.bool_]) -> Counts:
    """Count who does not know what.

    Args:
        unknown: shape (num_models, num_questions).
    """
    num_models, num_questions = unknown.shape
    as_numbers = unknown.astype(np.float64)  # exact up to 2**53, and multiplied faster than integers
    return Counts(
        num_questions,
        0,
        (as_numbers @ as_numbers.T).astype(np.int64),
        np.bincount((~unknown).sum(axis=0), minlength=num_models + 1),
    )


def cohen_kappa(both_unknown: float, both_known: float, first_unknown: float, second_unknown: float) -> float | None:
    """Agreement of two maps beyond chance, from shares of the questions; None where chance would agree on all."""
    by_chance = first_unknown * second_unknown + (1 - first_unknown) * (1 - second_unknown)
    return None if by_chance >= 1 - 1e-12 else (both_unknown + both_known - by_chance) / (1 - by_chance)


def _pair(names: Sequence[str], counts: Counts, first: int, second: int) -> Pair:
    total = max(1, counts.num_questions)
    unknown = [int(counts.both_unknown[place, place]) for place in (first, second)]
    both_unknown = int(counts.both_unknown[first, second])
    both_known = counts.num_questions - sum(unknown) + both_unknown
    shares = (both_unknown / total, both_known / total, unknown[0] / total, unknown[1] / total)
    return Pair(
        first=names[first],
        second=names[second],
        kappa=cohen_kappa(*shares) if counts.num_questions else None,
        both_known=shares[1],
        both_unknown=shares[0],
        differ=(sum(unknown) - 2 * both_unknown) / total,
    )


def _shards(maps: Sequence[KnowledgeMap]) -> Iterator[tuple[NDArray[np.bool_], int]]:
    """For each shard: unknown or not, shape (num_models, num_questions), and questions that not all maps hold there.

    Shard k holds the same questions in every run of a data set, as long as ``shard_rows`` is the same.
    """
    for each in maps:
        each.stage.verify()
    names = [each.stage.shard_names() for each in maps]
    for shard in sorted(set().union(*names)):
        tables = [
            read_shard(each.stage.url, shard, ["question_id", "p_unknown"]).sort_by("question_id")
            for each, there in zip(maps, names, strict=True)
            if shard in there
        ]
        held = [table["question_id"].combine_chunks() for table in tables]
        if len(tables) < len(maps):
            yield np.zeros((len(maps), 0), bool), len(pc.unique(pa.chunked_array(held)))
            continue
        common = held[0]
        for ids in held[1:]:
            if not ids.equals(common):
                common = common.filter(pc.is_in(common, ids))
        num_left_out = 0
        if any(len(ids) > len(common) for ids in held):
            tables = [table.filter(pc.is_in(table["question_id"], common)) for table in tables]
            num_left_out = len(pc.unique(pa.chunked_array(held))) - len(common)
        yield np.stack([table["p_unknown"].to_numpy() >= _UNKNOWN for table in tables]), num_left_out
