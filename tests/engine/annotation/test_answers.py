"""The store of answers: on disk before acknowledged, and readable after any end."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.annotation.answers import AnswerStore
from ka2l.annotation.people import HumanAnswer
from ka2l.annotation.task_files import read_answers
from ka2l.errors import StorageFullError


def said(question_id: str, *answers: str, by: str = "anna") -> HumanAnswer:
    return HumanAnswer(question_id, list(answers), by, datetime(2026, 3, 1, 12, tzinfo=UTC), not answers)


def test_answers_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    rows = [said("q1", "Zürich", "line\nbreak\u2028."), said("q2")]
    store = AnswerStore(path)
    for row in rows:
        store.append(row)
    store.close()
    assert AnswerStore(path).answers() == rows
    assert read_answers([path]).answers == rows


def test_a_correction_by_the_same_person_replaces_and_two_people_are_two_answers(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.jsonl")
    for row in (said("q1", "old"), said("q1", "Ben's", by="ben"), said("q1", "new")):
        store.append(row)
    assert store.answers() == [said("q1", "Ben's", by="ben"), said("q1", "new")]
    assert AnswerStore(store.path).answers() == store.answers()
    assert len(store.path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_half_written_last_line_costs_no_other_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = AnswerStore(path)
    first.append(said("q1", "whole"))
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut].replace(b"q1", b"q9"))
        store = AnswerStore(path)
        store.append(said("q2", "after"))
        store.close()
        # Cut before the line break alone, the line is whole.
        kept = ["q1", "q9", "q2"] if cut == len(whole) - 1 else ["q1", "q2"]
        assert [row.question_id for row in AnswerStore(path).answers()] == kept


def test_every_answer_is_synced_once_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path / "answers.jsonl")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(store.path.stat().st_size))
    for i in range(3):
        store.append(said(f"q{i}", "x"))
        assert synced[-1] == store.path.stat().st_size
    assert len(set(synced)) == len(synced) == 3


def test_an_answer_that_cannot_be_synced_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path / "answers.jsonl")
    store.append(said("q1", "x"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError):
            store.append(said("q2", "lost"))
    assert [row.question_id for row in store.answers()] == ["q1"]
    store.append(said("q3", "y"))
    assert [row.question_id for row in AnswerStore(store.path).answers()] == ["q1", "q3"]


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.append(said(f"q{i}", "x" * 500)), range(200)))
    assert sorted(row.question_id for row in AnswerStore(store.path).answers()) == sorted(f"q{i}" for i in range(200))
