"""A round with KnowTuning, for real: taken apart and put together by a teacher, tuned, compared; killed and resumed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.store.ledger import ledger_table
from engine.store.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.whole]
TEACHER = {
    "model": "teacher-1",
    "api_key_env": None,
    "max_tokens": 64,
    "max_malformed": 1,
    "backoff_base_s": 0.01,
    "prices": {"input_per_million": 0.0, "output_per_million": 1_000_000.0},
}
NUM_SELECTED = 12
#: Where the run is killed, one after the other.
KILLS: list[dict[str, Any]] = [
    {"event": "stage_committed", "stage": "facts"},
    {"event": "before_commit", "stage": "augment", "round": 0},
    {"event": "stage_committed", "stage": "tune"},
    {"event": "training_step", "round": 0},
    {"event": "before_commit", "stage": "compare", "round": 0},
]


def number(question: str) -> int:
    """Of the thing that is asked about."""
    return int(question.rpartition(" ")[2].rstrip("?"))


def writes(question: str, body: Any) -> str:
    """Three facts of every answer; some answers are never taken apart, and some questions never rewritten."""
    text = body["messages"][-1]["content"]
    kind = body["response_format"]["json_schema"]["name"]
    thing = number(question)
    if kind == "AtomicFacts":
        if text.startswith("Break") and thing % 3 == 0:
            return '{"facts": '
        wrong = "not " if text.startswith("Revise") else ""
        return json.dumps({"facts": [f"{word} is {wrong}{thing}" for word in ("One", "Two", "Three")]})
    listed = [line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()]
    if kind == "LongAnswer":
        return json.dumps({"answer": ", ".join(listed)})
    if thing % 3 == 1:
        return json.dumps({"question": " ", "answer": ""})
    return json.dumps({"question": f"What else of thing {thing}", "answer": ", ".join(listed)})


class Tuned(NamedTuple):
    run: RunDirectory
    server: Any
    num_billed: list[int]
    """Replies after each kill."""


@pytest.fixture(scope="module")
def tuned(
    finished: Any, ka2l: Any, on_cluster: list[str], teacher_module: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The mini campaign from its first annotations on, killed again and again."""
    import shutil

    run_dir = tmp_path_factory.mktemp("knowtuning") / "run"
    later = ("tune", "round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(finished.run_dir, run_dir, ignore=shutil.ignore_patterns(*later))
    with teacher_module.TeacherServer(content=writes) as server:
        values = {
            "rounds": 1,
            "annotator.teacher": TEACHER | {"base_url": server.url},
            "tuning.kind": "knowtuning",
            "tuning.knowtuning.learning_rate": 0.01,
            "tuning.max_length": 128,
        }
        options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        num_billed = []
        for kill in KILLS:
            ended = ka2l("resume", run_dir, *options, *on_cluster, kill=kill)
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            num_billed.append(sum(server.billed.values()))
            options = []
        ended = ka2l("resume", run_dir, *on_cluster)
        assert ended.returncode == 0, ended.stderr
        yield Tuned(RunDirectory(run_dir), server, num_billed)


def table(tuned: Tuned, stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tuned.run.stage(stage, 0).table().to_pylist()
    return found


def test_every_annotated_answer_is_taken_apart_or_quarantined_with_its_reason(tuned: Tuned) -> None:
    facts = table(tuned, "facts")
    metrics = tuned.run.stage("facts", 0).require().metrics
    assert all(len(row["facts"]) == 3 for row in facts)
    assert len(facts) + metrics["num_refused"] == metrics["num_answers"] == NUM_SELECTED
    assert metrics["num_refused"] == sum(number(row["question"]) % 3 == 0 for row in table(tuned, "annotate")) > 0
    (reason,) = metrics["refused"]
    assert "2 unusable replies" in reason
    assert "not the JSON asked for" in reason


def test_each_fact_has_a_perplexity_and_the_hardest_are_asked_for(tuned: Tuned) -> None:
    measured = {row["question_id"]: row["perplexities"] for row in table(tuned, "difficulty")}
    facts = {row["question_id"]: row["facts"] for row in table(tuned, "facts")}
    assert {name: len(values) for name, values in measured.items()} == dict.fromkeys(facts, 3)
    assert min(min(values) for values in measured.values()) > 1.0
    asked = [row for row in table(tuned, "augment") if row["part"] == "fine_grained"]
    for row in asked:
        easiest = min(range(3), key=lambda index: measured[row["question_id"]][index])
        kept = [fact for index, fact in enumerate(facts[row["question_id"]]) if index != easiest]
        assert row["better"] == ", ".join(kept)


def test_what_the_teacher_cannot_rewrite_is_left_out_of_stage_one_alone(tuned: Tuned) -> None:
    parts = Counter(row["part"] for row in table(tuned, "augment"))
    num_refused = sum(number(row["question"]) % 3 == 1 for row in table(tuned, "facts"))
    aspects = {"completeness", "factuality", "logicality"}
    assert num_refused > 0
    assert {part: parts[part] for part in aspects} == dict.fromkeys(aspects, len(table(tuned, "facts")))
    assert parts["fine_grained"] == len(table(tuned, "facts")) - num_refused


def test_both_stages_train_on_what_was_made_and_the_second_goes_on_from_the_first(tuned: Tuned) -> None:
    one, two = (tuned.run.stage(name, 0).require() for name in ("tune", "compare"))
    parts = Counter(row["part"] for row in table(tuned, "augment"))
    assert one.metrics["num_fine_grained"] == parts["fine_grained"]
    assert one.metrics["num_annotation"] == NUM_SELECTED
    assert two.metrics["num_rows"] == sum(parts.values()) - parts["fine_grained"]
    assert two.metrics["last_loss"] < two.metrics["first_loss"]
    assert two.inputs["round-000/tune"] == one.fingerprint
    observed = tuned.run.stage("observe", 1).require()
    assert observed.inputs["round-000/compare"] == two.fingerprint
    assert observed.metrics["canary_agrees"]


def test_no_reply_is_paid_for_twice_whatever_was_killed(tuned: Tuned) -> None:
    assert set(tuned.server.billed.values()) == {1}
    assert tuned.num_billed[1] == tuned.num_billed[-1] == len(tuned.server.billed)


def test_the_ledger_books_every_reply_where_it_was_asked_for(tuned: Tuned) -> None:
    booked: Counter[str] = Counter()
    for row in ledger_table(tuned.run).to_pylist():
        if row["item"] == "money":
            booked[row["stage"]] += row["quantity"]
    assert booked["annotate"] == 0
    assert booked["facts"] + booked["augment"] == 10 * len(tuned.server.billed)
    assert booked["facts"] >= 10 * NUM_SELECTED


def test_the_summary_shows_both_stages(tuned: Tuned) -> None:
    path = Path(tuned.run.path)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["rounds"][-1]["accuracy"] is not None
    report = (path / "report.html").read_text()
    assert "Finer facts, then comparison" in report
    assert "not the JSON asked for" in report
