"""Task and answer files: what is written is read back, and what people and spreadsheets make of it is understood."""

from __future__ import annotations

import csv
import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ka2l.annotation.people import Task
from ka2l.annotation.task_cells import guard_cell, join_answers, split_answers, unguard_cell
from ka2l.annotation.task_files import (
    COLUMNS,
    LABEL_STUDIO_CONFIG,
    read_answers,
    read_tasks,
    write_tasks,
)
from ka2l.errors import AnnotationError

TASKS = [
    Task("q1", "Capital of France?", [("Paris", 8), ("Lyon (the city)", 2)], 0.25, 0.5004024235381879),
    Task("=cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")\nsecond, "line"; ä 漢', [("a | b", 1)], None, None),
    Task("@4", "-5 + 5?", [], 1.0, 0.0),
]
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.csv", "tasks.json"])
def test_tasks_are_read_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    write_tasks(tmp_path / name, TASKS)
    assert read_tasks(tmp_path / name) == TASKS
    untouched = read_answers([tmp_path / name])
    assert untouched.answers == []
    assert untouched.problems == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="xlsx"):
        write_tasks(tmp_path / "tasks.xlsx", TASKS)


def test_a_csv_holds_no_cell_that_a_spreadsheet_would_run_and_says_that_it_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    write_tasks(path, TASKS)
    content = path.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    cells = [cell for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) for cell in row]
    assert any("HYPERLINK" in cell for cell in cells)
    assert not [cell for cell in cells if cell.lstrip()[:1] in tuple("=+-@")]


@quick
@given(st.text(alphabet="'=+-@\t\r\n aä＝"))
def test_guarding_a_cell_is_undone_by_reading(text: str) -> None:
    assert unguard_cell(guard_cell(text)) == text
    assert guard_cell(text).lstrip()[:1] not in tuple("=+-@＝")


@quick
@given(st.lists(st.text(alphabet=" |\\ab\n").map(str.strip).filter(bool), max_size=4))
def test_several_answers_in_one_cell_are_read_back(answers: list[str]) -> None:
    assert split_answers(join_answers(answers)) == answers


def test_a_bar_without_blanks_around_it_separates_nothing() -> None:
    assert split_answers("AC|DC | Acca Dacca |  ") == ["AC|DC", "Acca Dacca"]


def fill(path: Path, rows: dict[str, dict[str, str]], delimiter: str = ",", encoding: str = "utf-8-sig") -> None:
    """What a spreadsheet saves after people typed into a CSV task file."""
    table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    for row in table:
        row.update(rows.get(row["question_id"], {}))
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "cp1252"), ("\t", "utf-16"), (",", "utf-8")]
)
def test_a_csv_is_understood_as_spreadsheets_save_it(tmp_path: Path, delimiter: str, encoding: str) -> None:
    path = tmp_path / "tasks.csv"
    write_tasks(path, [Task(f"q{i}", "Where?", [], None, None) for i in range(4)])
    filled = {
        "q0": {"answers": "Zürich | ZH", "annotator": "Zoë", "answered_at": "2026-03-01T12:00:00+02:00"},
        "q1": {"answers": "-5", "answered_at": "01.03.26 12:00"},
        "q2": {"skipped": "x", "annotator": "Zoë"},
    }
    fill(path, filled, delimiter, encoding)
    os.utime(path, (1_000_000, 1_000_000))
    read = read_answers([path], annotator="somebody")
    assert read.problems == []
    assert [(a.question_id, a.answers, a.annotator, a.skipped) for a in read.answers] == [
        ("q0", ["Zürich", "ZH"], "Zoë", False),
        ("q1", ["-5"], "somebody", False),
        ("q2", [], "Zoë", True),
    ]
    assert read.answers[0].answered_at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert read.answers[1].answered_at == datetime.fromtimestamp(1_000_000, UTC)
    assert [place.line for place in read.places] == [2, 3, 4]


def test_a_csv_row_that_cannot_be_used_is_named_by_its_line_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    rows = ["q1,two\nlines,", "q2,x,maybe", ",x,", "q3,x,yes", "q4,x,,surplus", "", "q5,good,no"]
    quoted = [row.replace("two\nlines", '"two\nlines"') for row in rows]
    path.write_text("\n".join(["question_id,answers,skipped", *quoted]), encoding="utf-8")
    read = read_answers([path])
    assert [a.question_id for a in read.answers] == ["q1", "q5"]
    assert [place.line for place in read.places] == [2, 9]
    assert [(p.place, p.question_id) for p in read.problems] == [
        (("answers.csv", 4), "q2"),
        (("answers.csv", 5), None),
        (("answers.csv", 6), "q3"),
        (("answers.csv", 7), None),
    ]
    reasons = [problem.reason for problem in read.problems]
    assert "maybe" in reasons[0]
    assert reasons[1] == "no question_id"
    assert reasons[2] == "both answered and skipped"


def test_bad_json_lines_are_named_by_their_line_and_end_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = {"question_id": "q1", "answers": ["x\u2028y"], "annotator": "anna", "answered_at": "2026-03-01T12:00:00Z"}
    lines = [
        json.dumps(good, ensure_ascii=False),
        '{"question_id": "q2", "ans',
        "[1]",
        '{"question_id": "q3", "answers": 7}',
        '{"answers": ["x"]}',
        "",
        '{"question_id": 4, "answers": "a | b"}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    read = read_answers([path])
    assert [(a.question_id, a.answers) for a in read.answers] == [("q1", ["x\u2028y"]), ("4", ["a", "b"])]
    assert [place.line for place in read.places] == [1, 7]
    assert [p.place.line for p in read.problems] == [2, 3, 4, 5]


def label_studio(question_id: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": 7, "data": {"question_id": question_id, "question": "?"}, "annotations": list(annotations)}


def entry(*texts: str, who: Any = 1, **fields: Any) -> dict[str, Any]:
    region = {"type": "textarea", "from_name": "answers", "to_name": "question", "value": {"text": list(texts)}}
    made = {"completed_by": who, "was_cancelled": False, "created_at": "2026-03-01T12:00:00.123456Z"}
    return made | {"result": [region] if texts else []} | fields


def test_label_studios_export_is_read_with_people_several_annotations_and_cancelled_ones(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    ben = {"id": 2, "email": "ben@example.org", "first_name": "", "last_name": ""}
    tasks = [
        label_studio("q1", entry("Paris", "Paname"), entry("paris", who=ben)),
        label_studio("q2", entry(who=ben, was_cancelled=True)),
        {"id": 9, "question_id": "q3", "answers": "min format"},
        label_studio("q4"),
        {"data": {"question": "?"}, "annotations": [entry("x")]},
    ]
    path.write_text(json.dumps(tasks), encoding="utf-8")
    read = read_answers([path])
    assert [(a.question_id, a.answers, a.annotator, a.skipped) for a in read.answers] == [
        ("q1", ["Paris", "Paname"], "user 1", False),
        ("q1", ["paris"], "ben@example.org", False),
        ("q2", [], "ben@example.org", True),
    ]
    assert read.answers[0].answered_at == datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
    assert [(p.place.line, p.reason.split(";")[0]) for p in read.problems] == [
        (3, "not a Label Studio task"),
        (5, "no question_id"),
    ]


def test_the_labeling_config_shows_what_the_task_file_holds(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks.json", TASKS)
    data = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))[0]["data"]
    tags = list(ElementTree.fromstring(LABEL_STUDIO_CONFIG).iter())
    shown = [tag.attrib["value"][1:] for tag in tags if tag.attrib.get("value", "").startswith("$")]
    assert {"question"} < set(shown) <= set(data)
    assert [tag.attrib["toName"] for tag in tags if tag.tag == "TextArea"] == ["question"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[{", "not JSON"),
        ("a.csv", "id;text\n1;2", "no column answers, question_id"),
        ("gone", None, "cannot"),
    ],
)
def test_a_file_that_is_no_answer_file_is_refused_by_name(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(AnnotationError, match=says) as raised:
        read_answers([tmp_path / name])
    assert name in str(raised.value)
