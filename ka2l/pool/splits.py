"""Finds duplicates and assigns splits from 64-bit keys; needs no text and no row order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ka2l.errors import PoolError
from ka2l.schemas import SPLITS

SEED, CANDIDATE, EVAL = (SPLITS.index(name) for name in ("seed", "candidate", "eval"))

Keys = NDArray[np.uint64]

#: Intermediate values are held for so many rows.
_ROWS_AT_ONCE = 2**18


class Repeats(NamedTuple):
    """Rows that repeat another one, sorted, and the row that is kept instead of each. Shape (num_repeats,) both."""

    rows: NDArray[np.int64]
    kept: NDArray[np.int64]

    def among(self, rows: NDArray[np.int64]) -> dict[int, int]:
        """Those of some rows (sorted) that repeat another one, with the row that is kept."""
        start, end = np.searchsorted(self.rows, [rows[0], rows[-1] + 1])
        return dict(zip(self.rows[start:end].tolist(), self.kept[start:end].tolist(), strict=True))


def find_duplicates(
    question_keys: Keys, id_keys: Keys, explicit: NDArray[np.int8], usable: NDArray[np.bool_] | None = None
) -> tuple[Repeats, Repeats]:
    """Which rows repeat another one's question, and which another one's id.

    The first row in source order is kept. Where splits are given, a row of the eval split is kept before any other:
    a question that measures must not be tuned on too. Ids are compared among rows with different questions. Takes 8
    bytes a row beside what it is given, and more only where many rows are repeats.

    Args:
        question_keys: hash of each row's normalised question, shape (n,), rows in source order.
        id_keys: hash of each row's id, shape (n,).
        explicit: given split of each row as an index into SPLITS, or -1, shape (n,).
        usable: rows that count, shape (n,); None for all.
    """
    by_question = _repeats(question_keys, explicit, usable)
    left = usable
    if len(by_question.rows):
        left = np.ones(len(id_keys), dtype=bool) if usable is None else usable.copy()
        left[by_question.rows] = False
    return by_question, _repeats(id_keys, explicit, left)


def _repeats(keys: Keys, explicit: NDArray[np.int8], usable: NDArray[np.bool_] | None) -> Repeats:
    ranked = keys.copy() if usable is None or usable.all() else keys[usable]
    ranked.sort()
    repeated = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    del ranked
    rows = _rows_with(keys, repeated)
    if usable is not None:
        rows = rows[usable[rows]]
    order = rows[np.lexsort((rows, explicit[rows] != EVAL, keys[rows]))]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = keys[order[1:]] != keys[order[:-1]]
    kept = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    found, kept = order[~is_first], kept[~is_first]
    by_row = np.argsort(found)
    return Repeats(found[by_row], kept[by_row])


def _rows_with(keys: Keys, wanted: Keys) -> NDArray[np.int64]:
    """Rows whose key is one of ``wanted`` (sorted)."""
    if not len(wanted):
        return np.zeros(0, np.int64)
    found = []
    for start in range(0, len(keys), _ROWS_AT_ONCE):
        part = keys[start : start + _ROWS_AT_ONCE]
        places = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
        found.append(start + np.flatnonzero(wanted[places] == part))
    return np.concatenate(found)


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
    num_rest = int((splits != EVAL).sum())
    if num_rest <= num_seed or (num_eval and num_rest == num_rows):
        largest = int(np.unique(group_keys, return_counts=True)[1].max())
        raise PoolError(
            f"the groups are too large to split: whole groups near pool.num_eval ({num_eval}) give "
            f"{num_rows - num_rest} of {num_rows} questions; the largest group has {largest}",
            hint="change pool.num_eval, or name a finer pool.columns.group (or none)",
        )
    splits[_lowest(_rank(question_keys, seed, 1), splits != EVAL, num_seed)] = SEED
    return splits


def _lowest(ranks: Keys, among: NDArray[np.bool_], num_wanted: int) -> NDArray[np.int64]:
    """Of some rows, those with the lowest ranks; of equal ones the first."""
    if not num_wanted:
        return np.zeros(0, np.int64)
    chosen = ranks[among]
    last = np.partition(chosen, num_wanted - 1)[num_wanted - 1] if num_wanted < len(chosen) else chosen.max()
    del chosen
    rows = np.flatnonzero(among & (ranks <= last))
    return rows[np.argsort(ranks[rows], kind="stable")][:num_wanted]


def _check_given(splits: NDArray[np.int8], num_seed: int, num_eval: int) -> None:
    wanted = {"seed": num_seed, "candidate": 1, "eval": num_eval}
    absent = [name for name, number in wanted.items() if number and not (splits == SPLITS.index(name)).any()]
    if absent:
        raise PoolError(
            f"the given splits hold no usable row for: {', '.join(absent)}",
            hint="mark rows with these splits, or leave pool.columns.split out to have splits drawn",
        )


def _eval_rows(group_keys: Keys, num_eval: int, seed: int) -> NDArray[np.bool_]:
    ordered = np.sort(group_keys)
    if (ordered[1:] != ordered[:-1]).all():  # every question for itself: as below, in a fraction of the memory
        del ordered
        taken = np.zeros(len(group_keys), dtype=bool)
        taken[_lowest(_rank(group_keys, seed, 0), ~taken, num_eval)] = True
        return taken
    del ordered
    groups, inverse, sizes = np.unique(group_keys, return_inverse=True, return_counts=True)
    taken = np.zeros(len(groups), dtype=bool)
    missing = num_eval
    smallest = int(sizes.min())
    ranked = np.argsort(_rank(groups, seed, 0), kind="stable")
    for group in ranked:
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
    start = _mix(np.array([(seed * 2 + salt) % 2**64], dtype=np.uint64))
    ranks = np.empty_like(keys)
    for first in range(0, len(keys), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        ranks[rows] = _mix(keys[rows] ^ start)
    return ranks


def _mix(values: Keys) -> Keys:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
