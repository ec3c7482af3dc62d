"""A campaign that a teacher annotates: paid once, capped, refusals counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.store.ledger import ledger_table
from engine.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow
TEACHER = {
    "model": "teacher-1",
    "api_key_env": None,
    "max_tokens": 32,
    "concurrency": 4,
    "backoff_base_s": 0.01,
    "prices": {"input_per_million": 0.0, "output_per_million": 1_000_000.0},
}


def options(server: Any, **more: Any) -> list[str]:
    values = {"rounds": 1, "annotator.kind": "teacher", "annotator.teacher": TEACHER | {"base_url": server.url}}
    return [word for key, value in (values | more).items() for word in ("--set", f"{key}={json.dumps(value)}")]


def annotations(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = RunDirectory(run_dir).stage("annotate", 0).table().to_pylist()
    return rows


def booked(run_dir: Path) -> dict[str, float]:
    """What the ledger says of the teacher, whose every reply reads 20 tokens and writes 10, at 1 each of these."""
    found: dict[str, float] = {}
    for row in ledger_table(RunDirectory(run_dir)).to_pylist():
        if row["annotator"] == "teacher-1" and row["item"] in ("money", "tokens_prompt", "tokens_generated"):
            found[row["item"]] = found.get(row["item"], 0.0) + row["quantity"]
    return found


def test_a_teacher_annotates_what_was_selected_each_answer_is_paid_once_and_refusals_are_counted(
    selected: Path, ka2l: Any, on_cluster: list[str], teacher_server: Any
) -> None:
    def abstains_from_colours(question: str, body: Any) -> str:
        answers = [] if "colour" in question else [f"answer to {question}"]
        return json.dumps({"answers": answers, "abstain": not answers})

    server = teacher_server({2: "500", 5: "429"}, content=abstains_from_colours)
    kill = {"event": "stage_committed", "stage": "annotate"}
    ka2l("resume", selected, *options(server), *on_cluster, kill=kill)
    rows = annotations(selected)
    ka2l("resume", selected, "--redo-from", "annotate", *on_cluster, kill=kill)
    assert annotations(selected) == rows
    assert {row["annotator"] for row in rows} == {"teacher-1"}
    assert all(row["answers"] == [f"answer to {row['question']}"] for row in rows)
    assert not any("colour" in row["question"] for row in rows)
    manifest = RunDirectory(selected).stage("annotate", 0).require()
    num_refused = 12 - len(rows)
    assert num_refused > 0
    assert manifest.metrics["num_refused"] == num_refused
    assert manifest.metrics["refused"] == {"the teacher abstained": num_refused}
    assert len(server.billed) == 12
    assert set(server.billed.values()) == {1}
    assert booked(selected) == {"money": 120.0, "tokens_prompt": 240.0, "tokens_generated": 120.0}
    assert manifest.cost["money"] == 120.0 > sum(row["cost"] for row in rows) > 0


def test_a_cap_of_half_the_money_ends_the_run_within_it_and_says_so(
    selected: Path, ka2l: Any, on_cluster: list[str], teacher_server: Any
) -> None:
    server = teacher_server()
    cap = 12 * 10 / 2  # half of what twelve answers of ten tokens cost
    ended = ka2l("resume", selected, *options(server, **{"budget.money": cap}), *on_cluster)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((selected / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert f"The budget of {cap:g} for annotation is used up" in summary["reason"]
    assert 0 < booked(selected)["money"] == 10 * len(server.billed) <= cap
    assert 0 < summary["num_annotated"] < 12
    metrics = RunDirectory(selected).stage("annotate", 0).require().metrics
    assert metrics["num_not_asked"] == 12 - summary["num_annotated"]
    assert metrics["num_refused"] == 0
