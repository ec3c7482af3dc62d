"""A run that people annotate: it pauses, takes their answers from files, and goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.annotation.human import HumanAnnotator, import_answers, open_store, pending_round
from engine.store.run_directory import RunDirectory
from ka2l.annotation.people import HumanAnswer, Task
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.errors import AnnotationsPending, RunDirectoryError

QUESTIONS = {"q1": "Where was Ada born?", "q2": "Where was Bo born?", "q3": "Where was Cy born?"}


@pytest.fixture
def annotator(tmp_path: Path) -> HumanAnnotator:
    def make_tasks(ids: Sequence[str]) -> list[Task]:
        return [Task(name, QUESTIONS[name], [("Lima", 3), ("Oslo", 1)], 0.8, 0.56) for name in ids]

    run = RunDirectory(tmp_path / "run")
    return HumanAnnotator(run, 0, "csv", make_tasks, LexicalEquivalence())


def said(question_id: str, answer: str, who: str = "anna") -> HumanAnswer:
    return HumanAnswer(question_id, [answer] if answer else [], who, datetime.now(UTC), not answer)


def answer_all(folder: Path, *answers: HumanAnswer) -> None:
    store = open_store(folder)
    for answer in answers:
        store.append(answer)
    store.close()


def test_the_run_waits_until_every_question_has_an_answer(annotator: HumanAnnotator) -> None:
    with pytest.raises(AnnotationsPending, match="3 of 3 questions wait"):
        annotator.annotate(QUESTIONS)
    answer_all(annotator.folder, said("q1", "Lima"), said("q2", ""))
    with pytest.raises(AnnotationsPending, match="1 of 3 questions wait"):
        annotator.annotate(QUESTIONS)
    answer_all(annotator.folder, said("q3", "Quito"))
    made = annotator.annotate(QUESTIONS)
    assert [(row.question_id, row.answers, row.annotator, row.cost) for row in made] == [
        ("q1", ["Lima"], "anna", 0.0),
        ("q3", ["Quito"], "anna", 0.0),
    ]
    assert annotator.annotate(QUESTIONS) == made


def test_the_task_file_is_written_once_and_then_belongs_to_people(annotator: HumanAnnotator) -> None:
    with pytest.raises(AnnotationsPending):
        annotator.annotate(QUESTIONS)
    file = annotator.folder / "tasks.csv"
    file.write_text(file.read_text(encoding="utf-8-sig") + "\n", encoding="utf-8")
    edited = file.read_bytes()
    with pytest.raises(AnnotationsPending):
        annotator.annotate(QUESTIONS)
    assert file.read_bytes() == edited


def test_answers_come_from_filled_in_files_and_a_second_import_adds_nothing(
    annotator: HumanAnnotator, tmp_path: Path
) -> None:
    with pytest.raises(AnnotationsPending):
        annotator.annotate(QUESTIONS)
    with (annotator.folder / "tasks.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["answers"] = "Lima"
    rows[1]["question_id"] = "nobody-asked"
    rows[1]["answers"] = "Oslo"
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for _ in range(2):
        problems, merged = import_answers(annotator.folder, [filled], "anna", LexicalEquivalence())
        assert [(problem.place.line, problem.question_id) for problem in problems] == [(3, "nobody-asked")]
        assert [(row.question_id, row.answers, row.annotator) for row in merged.annotations] == [
            ("q1", ["Lima"], "anna")
        ]
        assert merged.missing == ["q2", "q3"]
    assert len((annotator.folder / "answers.jsonl").read_text().splitlines()) == 1


def test_people_who_disagree_are_reported_and_the_question_is_left_out(annotator: HumanAnnotator) -> None:
    with pytest.raises(AnnotationsPending):
        annotator.annotate(QUESTIONS)
    answer_all(annotator.folder, *(said(name, "Lima") for name in QUESTIONS), said("q2", "Oslo", "ben"))
    assert [row.question_id for row in annotator.annotate(QUESTIONS)] == ["q1", "q3"]


def test_a_run_that_waits_for_nobody_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="waits for no annotation"):
        pending_round(RunDirectory(tmp_path))


@pytest.mark.slow
def test_a_campaign_pauses_for_people_and_goes_on_with_their_answers(
    selected: Path, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run_dir = selected
    options = ["--set", "rounds=1", "--set", "annotator.kind=human", *on_cluster]
    paused = ka2l("resume", run_dir, *options)
    assert paused.returncode == 3, paused.stderr
    assert "12 of 12 questions wait" in paused.stderr
    assert "Traceback" not in paused.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["num_annotated"]) == ("paused", 0)
    assert "12 of 12 questions wait" in summary["reason"]

    file = run_dir / "annotation" / "round-000" / "tasks.jsonl"
    tasks = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(task["model_answers"] and task["p_unknown"] is not None for task in tasks)
    observed = (run_dir / "round-000" / "observe" / "manifest.json").read_bytes()
    filled = tmp_path / "filled.jsonl"
    for count, code in ((5, 3), (12, 0)):
        filled.write_text("".join(json.dumps(task | {"answers": ["blue"]}) + "\n" for task in tasks[:count]))
        imported = ka2l("annotate", run_dir, "import", filled, "--annotator", "anna")
        assert imported.returncode == 0, imported.stderr
        assert f"{count} answered" in imported.stdout
        resumed = ka2l("resume", run_dir, *on_cluster)
        assert resumed.returncode == code, resumed.stderr
    assert (run_dir / "round-000" / "observe" / "manifest.json").read_bytes() == observed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["num_annotated"]) == ("complete", None, 12)
    rows = RunDirectory(run_dir).stage("annotate", 0).table(["question_id", "answers", "annotator"]).to_pylist()
    assert {row["question_id"] for row in rows} == {task["question_id"] for task in tasks}
    assert {(tuple(row["answers"]), row["annotator"]) for row in rows} == {(("blue",), "anna")}
