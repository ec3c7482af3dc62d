"""A question that breaks the work is found, set aside and named; the others of its shard are worked on."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.host import Stats
from engine.execution.isolation import Attempts, OpenAttempts, isolate
from engine.execution.jobs import HostJob
from engine.store.shards import Failure
from ka2l.errors import ModelError, StageFailedError


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Work:
    """Doubles the number of each question; some break it."""

    def __init__(self, poison: Set[int] = frozenset(), deadly: Set[int] = frozenset()) -> None:
        self.poison = poison
        self.deadly = deadly
        self.calls: list[list[int]] = []

    def __call__(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        questions = tables["questions"]
        numbers = questions["number"].to_pylist()
        assert tables["samples"]["question_id"].to_pylist() == [f"q{number}" for number in numbers for _ in range(2)]
        self.calls.append(numbers)
        if self.deadly & set(numbers):
            raise Died
        if broken := self.poison & set(numbers):
            raise ValueError(f"cannot read {min(broken)}\nand more")
        made = pa.table({"question_id": questions["question_id"], "double": [2 * number for number in numbers]})
        return made, {"tokens": float(len(numbers))}


def tables(num_rows: int) -> dict[str, pa.Table]:
    ids = [f"q{number}" for number in range(num_rows)]
    return {
        "questions": pa.table({"question_id": ids, "number": list(range(num_rows))}),
        "samples": pa.table({"question_id": [name for name in ids for _ in range(2)]}),
    }


def attempts(folder: Path) -> Attempts:
    return Attempts(str(folder), "part-00000.parquet")


def survive(work: Work, num_rows: int, folder: Path) -> tuple[Any, int]:
    """What is made in the end by workers of which each takes the place of a dead one, and how many died."""
    num_deaths = 0
    while True:
        try:
            return isolate(work, tables(num_rows), attempts(folder)), num_deaths
        except Died:
            num_deaths += 1


def test_a_shard_that_works_is_worked_on_in_one_piece(tmp_path: Path) -> None:
    work = Work()
    made = isolate(work, tables(5), attempts(tmp_path))
    assert made.table["double"].to_pylist() == [0, 2, 4, 6, 8]
    assert made.stats == {"tokens": 5.0}
    assert made.failures == []
    assert len(work.calls) == 1


@settings(max_examples=40)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=6))
def test_questions_that_raise_are_set_aside_and_all_others_are_worked_on_in_order(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, broken: set[int]
) -> None:
    poison = {number for number in broken if number < num_rows}
    made = isolate(Work(poison), tables(num_rows), attempts(tmp_path_factory.mktemp("stage")))
    assert made.table["double"].to_pylist() == [2 * n for n in range(num_rows) if n not in poison]
    assert made.stats.get("tokens", 0.0) == num_rows - len(poison)
    assert made.failures == [Failure(f"q{n}", f"ValueError: cannot read {n}") for n in sorted(poison)]


def test_one_bad_question_of_many_costs_few_further_calls(tmp_path: Path) -> None:
    work = Work({777})
    isolate(work, tables(1024), attempts(tmp_path))
    assert len(work.calls) == 1 + 2 * 10


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_question_that_kills_workers_is_set_aside_after_a_few_of_them(place: int, tmp_path: Path) -> None:
    made, num_deaths = survive(Work(deadly={place}), 16, tmp_path)
    assert made.table["double"].to_pylist() == [2 * n for n in range(16) if n != place]
    assert [failure.question_id for failure in made.failures] == [f"q{place}"]
    assert made.failures[0].reason.startswith("2 workers died over it")
    assert num_deaths == 2 + 3 + 2  # twice the whole, each half down to two questions once, the one twice


def test_a_worker_that_was_killed_once_is_no_reason_to_halve_its_shard(tmp_path: Path) -> None:
    with pytest.raises(Died):
        isolate(Work(deadly={1}), tables(4), attempts(tmp_path))
    second, work = attempts(tmp_path), Work()
    assert isolate(work, tables(4), second).failures == []
    assert len(work.calls) == 1
    assert second.num_deaths == 1
    second.forget()
    assert attempts(tmp_path).num_deaths == 0


def test_what_is_wrong_with_all_questions_alike_is_raised_at_once(tmp_path: Path) -> None:
    def wrong(_: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        raise ModelError("no weights")

    with pytest.raises(ModelError):
        isolate(wrong, tables(100), attempts(tmp_path))


def test_when_one_question_after_the_other_fails_the_error_is_raised_and_not_the_questions_blamed(
    tmp_path: Path,
) -> None:
    work = Work(set(range(64)))
    with pytest.raises(ValueError, match="cannot read 15"):
        isolate(work, tables(64), attempts(tmp_path))
    assert len(work.calls) < 64


def test_a_shard_of_which_nothing_is_left_has_its_columns_still(tmp_path: Path) -> None:
    made = isolate(Work({0}), tables(1), attempts(tmp_path))
    assert made.table.num_rows == 0
    assert made.table.column_names == ["question_id", "double"]
    assert len(made.failures) == 1


def test_workers_that_die_while_loading_end_the_stage_instead_of_being_replaced_for_ever(tmp_path: Path) -> None:
    for _ in range(3):
        OpenAttempts(str(tmp_path)).begin()  # and no end: dead
    job = HostJob(lambda: pytest.fail("a fourth worker loaded the model"), {}, str(tmp_path))
    with pytest.raises(StageFailedError, match="3 workers died while they loaded"):
        job.open()


def test_workers_that_load_at_the_same_time_are_not_taken_for_dead(tmp_path: Path) -> None:
    others = [OpenAttempts(str(tmp_path)) for _ in range(3)]
    for other in others:
        other.begin()
    opened: list[bool] = []
    job = HostJob(lambda: opened.append(True), {}, str(tmp_path), replicas=4)  # type: ignore[arg-type,return-value,func-returns-value]
    job.open()
    assert opened == [True]
    for other in others:
        other.end()
    assert OpenAttempts(str(tmp_path)).begin() == 0
