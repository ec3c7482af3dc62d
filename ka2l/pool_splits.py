"""Duplicates and splits of a pool, decided from 64-bit keys alone: no text is needed, and no row order matters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ka2l.errors import PoolError
from ka2l.records import SPLITS

SEED, CANDIDATE, EVAL = (SPLITS.index(name) for name in ("seed", "candidate", "eval"))

Keys = NDArray[np.uint64]


def find_duplicates(
    question_keys: Keys, id_keys: Keys, explicit: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows repeat another one's question or id.

    The first row in source order is kept. Where splits are given, a row of the eval split is kept before any other:
    a question that measures must not be tuned on too. Ids are compared among rows with different questions.

    Args:
        question_keys: hash of each row's normalised question, shape (n,), rows in source order.
        id_keys: hash of each row's id, shape (n,).
        explicit: given split of each row as an index into SPLITS, or -1, shape (n,).

    Returns:
        For each row the index of the row kept instead of it because of its question, and because of its id; -1 where
        there is none. Shape (n,) each.
    """
    order = np.lexsort((np.arange(len(question_keys)), explicit != EVAL))
    by_question = np.full(len(order), -1, dtype=np.int64)
    by_question[order] = _repeats(question_keys[order], order)
    kept = order[by_question[order] < 0]
    by_id = np.full(len(order), -1, dtype=np.int64)
    by_id[kept] = _repeats(id_keys[kept], kept)
    return by_question, by_id


def _repeats(keys: Keys, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    winner = rows[first][inverse]
    return np.where(winner == rows, -1, winner)


def assign_splits(
    question_keys: Keys,
    group_keys: Keys,
    explicit: NDArray[np.int8],
    *,
    num_seed: int,
    num_eval: int,
    seed: int,
) -> NDArray[np.int8]:
    """The split of each row as an index into SPLITS, shape (n,).

    Given splits are used as they are. Else rows are ranked by a hash of (seed, key), so that neither their order nor
    their blocks matter. Eval takes whole groups in the order of their rank, leaving out those that would exceed
    ``num_eval``; if one more group brings the number strictly nearer to ``num_eval``, the smallest left out is added.
    Of the rest the first ``num_seed`` rows are seed, all others candidates; these two may share groups.

    Args:
        question_keys: hash of each row's normalised question, without repeats, shape (n,).
        group_keys: hash of each row's group, or its question key where it has none, shape (n,).
        explicit: given splits as indices into SPLITS, or all -1, shape (n,).
        num_seed: rows of the seed split.
        num_eval: rows of the eval split, met as nearly as whole groups allow.
        seed: the run's seed.

    Raises:
        PoolError: the numbers leave no candidate, or given splits leave out one that is needed.
    """
    if (explicit >= 0).all() and len(explicit):
        _check_given(explicit, num_seed, num_eval)
        return explicit
    num_rows = len(question_keys)
    if num_seed + num_eval >= num_rows:
        raise PoolError(
            f"pool.num_seed ({num_seed}) + pool.num_eval ({num_eval}) = {num_seed + num_eval} of {num_rows} usable "
            "questions: no candidate is left",
            hint=f"lower them to less than {num_rows} together, or give a larger pool",
        )
    splits = np.full(num_rows, CANDIDATE, dtype=np.int8)
    splits[_eval_rows(group_keys, num_eval, seed)] = EVAL
    rest = np.flatnonzero(splits != EVAL)
    if len(rest) <= num_seed or (num_eval and len(rest) == num_rows):
        largest = int(np.unique(group_keys, return_counts=True)[1].max())
        raise PoolError(
            f"the groups are too large to split: whole groups near pool.num_eval ({num_eval}) give "
            f"{num_rows - len(rest)} of {num_rows} questions; the largest group has {largest}",
            hint="change pool.num_eval, or name a finer pool.columns.group (or none)",
        )
    ranked = rest[np.argsort(_rank(question_keys[rest], seed, 1), kind="stable")]
    splits[ranked[:num_seed]] = SEED
    return splits


def _check_given(splits: NDArray[np.int8], num_seed: int, num_eval: int) -> None:
    wanted = {"seed": num_seed, "candidate": 1, "eval": num_eval}
    absent = [name for name, number in wanted.items() if number and not (splits == SPLITS.index(name)).any()]
    if absent:
        raise PoolError(
            f"the given splits hold no usable row for: {', '.join(absent)}",
            hint="mark rows with these splits, or leave pool.columns.split out to have splits drawn",
        )


def _eval_rows(group_keys: Keys, num_eval: int, seed: int) -> NDArray[np.bool_]:
    groups, inverse, sizes = np.unique(group_keys, return_inverse=True, return_counts=True)
    taken = np.zeros(len(groups), dtype=bool)
    missing = num_eval
    smallest = int(sizes.min())
    ranked = np.argsort(_rank(groups, seed, 0), kind="stable")
    for group in ranked.tolist():
        if missing < smallest:
            break
        if sizes[group] <= missing:
            taken[group] = True
            missing -= int(sizes[group])
    left_out = ranked[~taken[ranked]]
    if missing and len(left_out):
        nearest = left_out[np.argmin(sizes[left_out])]
        taken[nearest] = sizes[nearest] - missing < missing
    return taken[inverse]


def _rank(keys: Keys, seed: int, salt: int) -> Keys:
    """Keyed 64-bit mixing (the finaliser of splitmix64, Steele et al. 2014), shape (n,)."""
    start = (seed * 2 + salt) % 2**64
    return _mix(keys ^ _mix(np.array([start], dtype=np.uint64)))


def _mix(values: Keys) -> Keys:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
