"""Where results lie, and which of several is read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import machine
import pytest
import torch

TWO_CORES = {"processor": "x86_64", "num_cores": 2}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results, on a machine without a GPU."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path


def test_a_result_lies_by_question_machine_and_day_with_its_provenance(results: Path) -> None:
    path = machine.write_result("why", {"answer": 42})

    written = json.loads(path.read_text())
    day = written["date"][:10]
    assert path == results / "why" / f"{machine.machine_name(written['machine'])}-{day}.json"
    assert written["answer"] == 42
    assert written.keys() >= {"command", "machine", "versions", "git_revision"}
    assert written["machine"]["num_cores"] == os.cpu_count()
    assert written["machine"]["gpu"] is None


def test_a_second_result_of_a_day_replaces_the_first(results: Path) -> None:
    machine.write_result("why", {"answer": 1})
    machine.write_result("why", {"answer": 2})

    assert len(list(results.rglob("*.json"))) == 1
    found = machine.latest_result("why")
    assert found is not None
    assert found["answer"] == 2


def test_a_path_that_is_given_is_where_the_result_goes(results: Path, tmp_path: Path) -> None:
    path = machine.write_result("why", {}, tmp_path / "deep" / "there.json")

    assert path == tmp_path / "deep" / "there.json"
    assert path.exists()
    assert not (results / "why").exists()


@pytest.mark.parametrize(
    ("described", "name"),
    [
        (TWO_CORES, "x86_64-2cores"),
        (TWO_CORES | {"gpu": None, "num_gpus": 0}, "x86_64-2cores"),
        (TWO_CORES | {"gpu": "NVIDIA H100 80GB HBM3", "num_gpus": 1}, "x86_64-2cores-nvidia-h100-80gb-hbm3"),
        (TWO_CORES | {"gpu": "NVIDIA L4", "num_gpus": 8}, "x86_64-2cores-nvidia-l4-x8"),
    ],
)
def test_a_machine_is_named_by_processor_cores_and_gpus(described: dict[str, Any], name: str) -> None:
    assert machine.machine_name(described) == name


def test_gpus_that_torch_sees_are_recorded(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")

    path = machine.write_result("why", {})

    assert json.loads(path.read_text())["machine"]["gpu"] == "NVIDIA L4"
    assert "-nvidia-l4-x2-" in path.name


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--seeds", "0", "1"], "python benchmarks/bench_why.py --seeds 0 1"),
        (["--out", "/there/a.json", "--seeds", "0", "--work=/there"], "python benchmarks/bench_why.py --seeds 0"),
        (["--set", "a={b: c}"], "python benchmarks/bench_why.py --set 'a={b: c}'"),
    ],
)
def test_the_command_is_what_somebody_else_would_type(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    assert machine.command([str(machine.REPOSITORY / "benchmarks" / "bench_why.py"), *words]) == command


def test_the_newest_result_is_by_the_date_within_it_whatever_its_machine_or_name(results: Path) -> None:
    (results / "why").mkdir()
    for name, date in (("z-old", "2026-01-02"), ("a-new", "2026-02-01"), ("m-older", "2025-12-31")):
        (results / "why" / f"{name}.json").write_text(json.dumps({"date": f"{date}T10:00:00+00:00", "name": name}))

    found = machine.latest_result("why")
    assert found is not None
    assert found["name"] == "a-new"
    assert machine.latest_file("why") == results / "why" / "a-new.json"


def test_what_was_never_measured_has_no_result(results: Path) -> None:
    assert machine.latest_result("never") is None
    assert machine.latest_file("never") is None


def test_every_result_of_the_repository_lies_where_it_would_be_written() -> None:
    files = list(machine.RESULTS.rglob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert file.parent.parent == machine.RESULTS, f"{file}: results/QUESTION/MACHINE-DATE.json"
        assert file.stem == f"{machine.machine_name(result['machine'])}-{result['date'][:10]}"
        assert result["command"], file
        assert not re.search(r"(^|[\s=])/", result["command"]), f"{file}: a path of one machine says nothing elsewhere"
        assert result["versions"], file
