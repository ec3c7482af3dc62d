from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.store.journal import FileJournal, RemoteJournal, open_journal
from engine.store.run_directory import RunDirectory
from ka2l.errors import RunDirectoryError, StorageFullError


@pytest.fixture(params=["local", "remote"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path if request.param == "local" else f"file://{tmp_path}")


def test_a_record_is_there_again_after_reopening(run: RunDirectory) -> None:
    journal = open_journal(run, "teacher")
    journal.put("a", {"text": "line one\nline two\u2028\ud800", "cost": 0.25})
    journal.put("b", {"n": 1})
    journal.put("b", {"n": 2})
    again = open_journal(run, "teacher")
    assert again.get("a") == {"text": "line one\nline two\u2028\ud800", "cost": 0.25}
    assert again.get("b") == {"n": 2}
    assert again.get("c") is None
    assert dict(again.items()) == {"a": journal.get("a"), "b": {"n": 2}}


def test_a_url_gets_one_object_a_record_and_a_local_run_one_file(tmp_path: Path) -> None:
    local = open_journal(RunDirectory(tmp_path / "run"), "teacher")
    remote = open_journal(RunDirectory(f"file://{tmp_path}/remote"), "teacher")
    assert isinstance(local, FileJournal)
    assert isinstance(remote, RemoteJournal)
    for journal in (local, remote):
        journal.put("a", {})
        journal.put("b", {})
    assert (tmp_path / "run" / "teacher.jsonl").read_bytes().count(b"\n") == 2
    assert len(list((tmp_path / "remote" / "teacher").glob("*.json"))) == 2


def test_a_line_cut_at_any_byte_costs_only_its_own_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = FileJournal(path)
    journal.put("a", {"x": "é"})
    first = path.stat().st_size
    journal.put("b", {"y": [1, {"z": "}"}]})
    journal.close()
    whole = path.read_bytes()
    for size in range(first, len(whole) + 1):
        path.write_bytes(whole[:size])
        opened = FileJournal(path)
        assert opened.get("a") == {"x": "é"}
        # Without its newline the line is whole all the same.
        assert (opened.get("b") is not None) == (size >= len(whole) - 1)
        opened.put("c", {"after": size})
        opened.close()
        reopened = FileJournal(path)
        assert reopened.get("c") == {"after": size}
        assert (reopened.get("b") is not None) == (size >= len(whole) - 1)
        reopened.close()


def test_a_tail_of_zeros_as_a_power_cut_leaves_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    FileJournal(path).put("a", {})
    with path.open("ab") as stream:
        stream.write(b"\0" * 300)
    journal = FileJournal(path)
    journal.put("b", {})
    assert dict(FileJournal(path).items()) == {"a": {}, "b": {}}


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = FileJournal(path)
    journal.put("a", {})
    journal.put("b", {})
    path.write_bytes(path.read_bytes().replace(b'"a"', b"a"))
    with pytest.raises(RunDirectoryError, match="line 1 is not a journal entry"):
        FileJournal(path)


def test_put_returns_only_after_the_record_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "journal.jsonl").read_bytes()))
    journal.put("a", {"n": 1})
    assert len(synced) == 1
    assert json.loads(synced[0]) == {"key": "a", "record": {"n": 1}}


def test_a_put_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = FileJournal(path)
    journal.put("a", {})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(StorageFullError):
            journal.put("b", {})
    assert path.read_bytes() == before
    assert journal.get("b") is None
    journal.put("c", {})
    assert dict(FileJournal(path).items()) == {"a": {}, "c": {}}


def _no_space(file: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_what_was_stored(small_disk: Path) -> None:
    journal = FileJournal(small_disk / "journal.jsonl")
    journal.put("a", {"n": 1})
    with pytest.raises(StorageFullError):
        _fill(journal)
    journal.close()
    opened = FileJournal(small_disk / "journal.jsonl")
    assert opened.get("a") == {"n": 1}


def _fill(journal: FileJournal) -> None:
    for number in range(100):
        journal.put(f"big {number}", {"text": "x" * 50_000})


def test_values_that_are_not_json_are_refused(run: RunDirectory) -> None:
    journal = open_journal(run, "teacher")
    with pytest.raises(ValueError):
        journal.put("a", {"cost": float("nan")})
    with pytest.raises(TypeError):
        journal.put("a", {"when": threading.Lock()})
    assert open_journal(run, "teacher").get("a") is None


def test_many_threads_may_put_at_once(run: RunDirectory) -> None:
    journal = open_journal(run, "teacher")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.put(f"k{n}", {"n": n, "text": "x" * 200}), range(100)))
    again = open_journal(run, "teacher")
    assert {key: record["n"] for key, record in again.items()} == {f"k{n}": n for n in range(100)}
