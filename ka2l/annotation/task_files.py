"""Files for people who annotate: JSON lines, CSV for spreadsheets, and Label Studio's JSON.

One file serves both ways: the task file is what people fill in. Columns and keys have the same names everywhere:
``question_id``, ``question``, ``answers``, ``skipped``, ``annotator``, ``answered_at``, then what the model made of the
question, last because it would bias whoever reads it first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ka2l.annotation.people import HumanAnswer, Place, Problem, Task
from ka2l.annotation.task_cells import (
    completed_by,
    flag_of,
    guard_cell,
    join_answers,
    number_of,
    own_answers_of,
    question_id_of,
    split_answers,
    time_of,
    unguard_cell,
)
from ka2l.errors import AnnotationError

COLUMNS = (
    "question_id",
    "question",
    "answers",
    "skipped",
    "annotator",
    "answered_at",
    "model_answers",
    "p_unknown",
    "semantic_entropy",
)

#: Labeling config of a Label Studio project that takes the task files written here. The model's answers are folded in.
LABEL_STUDIO_CONFIG = """\
<View>
  <Header value="Answer the question. Press Skip where you cannot."/>
  <Text name="question" value="$question"/>
  <TextArea name="answers" toName="question" maxSubmissions="10" editable="true" required="true"
            placeholder="The answer; further accepted answers as further entries"/>
  <Collapse>
    <Panel value="What the model answers (look only after you have answered)">
      <Text name="model_answers" value="$model_answers"/>
    </Panel>
  </Collapse>
</View>
"""


class ReadAnswers(NamedTuple):
    """What stands in answer files."""

    answers: list[HumanAnswer]
    places: list[Place]
    """Where each answer was read."""
    problems: list[Problem]
    """Rows that are no answer; rows that nobody touched are none of them."""


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write a task file for people to fill in.

    Args:
        path: ends in ``.jsonl``, ``.csv`` or ``.json`` (Label Studio's import format, with
            :data:`LABEL_STUDIO_CONFIG`); an existing file is replaced.
        tasks: what to ask.

    Raises:
        AnnotationError: another ending.
    """
    match path.suffix.lower():
        case ".jsonl":
            text = "".join(json.dumps(_json_row(task), ensure_ascii=False) + "\n" for task in tasks)
        case ".csv":
            # Spreadsheets take a file for UTF-8 only where it begins with a byte order mark.
            text = "\ufeff" + _csv_text(tasks)
        case ".json":
            text = json.dumps([{"data": _label_studio_data(task)} for task in tasks], ensure_ascii=False, indent=1)
        case ending:
            raise AnnotationError(
                f"cannot write a task file with the ending {ending!r}: {path}", hint="Use .jsonl, .csv or .json."
            )
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)


def read_tasks(path: Path) -> list[Task]:
    """Read what :func:`write_tasks` wrote, also after people filled it in.

    Raises:
        AnnotationError: the file is missing, not readable, or a row of it is no task.
    """
    tasks = []
    for line, row in _rows(path):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            values = row["data"] if isinstance(row.get("data"), dict) else row
            tasks.append(
                Task(
                    question_id_of(values),
                    str(values["question"]),
                    own_answers_of(values.get("model_answers") or []),
                    number_of(values.get("p_unknown")),
                    number_of(values.get("semantic_entropy")),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(
                f"{path} line {line} is not a task: {error}", hint="Write the task file again."
            ) from error
    return tasks


def read_answers(paths: Sequence[Path], annotator: str = "human") -> ReadAnswers:
    """Read the answers of any number of files; formats are told apart by content and may be mixed.

    Args:
        paths: task files that were filled in, stores of the annotation page, or Label Studio's JSON exports.
        annotator: who answered where a row does not say.

    A row without a readable time was answered when its file was last saved. A row whose answers, ``skipped`` and
    ``annotator`` are all blank was not touched by anybody and is left out silently.

    Raises:
        AnnotationError: a file is missing, or as a whole not readable.
    """
    read = ReadAnswers([], [], [])
    for path in paths:
        rows = list(_rows(path))
        saved = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        for line, row in rows:
            place = Place(path.name, line)
            question_id = None
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if "data" in row or "annotations" in row:
                    values = row.get("data")
                    question_id = question_id_of(values if isinstance(values, dict) else {})
                    found = list(_label_studio_answers(question_id, row.get("annotations"), annotator, saved))
                else:
                    question_id = question_id_of(row)
                    found = _row_answer(question_id, row, annotator, saved)
            except ValueError as error:
                read.problems.append(Problem(place, question_id, str(error)))
                continue
            read.answers.extend(found)
            read.places.extend([place] * len(found))
    return read


# --- rows of the three formats ---------------------------------------------------------------------------------------


def _json_row(task: Task) -> dict[str, Any]:
    return {
        "question_id": task.question_id,
        "question": task.question,
        "answers": [],
        "skipped": False,
        "annotator": "",
        "answered_at": None,
        "model_answers": task.own_answers,
        "p_unknown": task.p_unknown,
        "semantic_entropy": task.semantic_entropy,
    }


def _csv_text(tasks: Sequence[Task]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for task in tasks:
        numbers = ["" if value is None else repr(value) for value in (task.p_unknown, task.semantic_entropy)]
        row = [task.question_id, task.question, "", "", "", "", _model_text(task), *numbers]
        writer.writerow(map(guard_cell, row))
    return stream.getvalue()


def _label_studio_data(task: Task) -> dict[str, Any]:
    shared = {key: value for key, value in _json_row(task).items() if key in COLUMNS[:2] + COLUMNS[-2:]}
    return shared | {"model_answers": _model_text(task)}


def _model_text(task: Task) -> str:
    return join_answers([f"{answer} ({count})" for answer, count in task.own_answers])


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and values of every row; in place of the values, what is wrong with the row."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    text = _decoded(content)
    if text.lstrip().startswith("["):
        yield from _label_studio_rows(path, text)
    elif text.lstrip().startswith("{"):
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                yield line, _parsed(row)
    elif text.strip():
        yield from _csv_rows(path, text)


def _decoded(content: bytes) -> str:
    """Text of a file as spreadsheets save them: UTF-8, UTF-16 with its mark, or the Western code page."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _parsed(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _label_studio_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AnnotationError(f"{path} is not JSON: {error}", hint="Export it again, as JSON.") from error
    for position, row in enumerate(rows, 1):
        task = isinstance(row, dict) and isinstance(row.get("data"), dict)
        yield position, row if task else "not a Label Studio task; export as JSON, not as JSON-MIN"


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Spreadsheets separate by what the person's locale asks for.
    header = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not a CSV row: {error}"
            continue
        if names is None:
            names = [cell.strip().lower() for cell in cells]
            if missing := {"question_id", "answers"} - set(names):
                raise AnnotationError(
                    f"{path} has no column {', '.join(sorted(missing))}", hint=f"Columns are {', '.join(COLUMNS)}."
                )
        elif any(cell.strip() for cell in cells):
            extra = any(cell.strip() for cell in cells[len(names) :])
            yield line, "more cells than columns" if extra else dict(zip(names, map(unguard_cell, cells), strict=False))


# --- answers ----------------------------------------------------------------------------------------------------------


def _row_answer(question_id: str, row: Mapping[str, Any], annotator: str, saved: datetime) -> list[HumanAnswer]:
    """The answer of one row of JSON lines or CSV; none where nobody touched the row."""
    given = row.get("answers") or []
    answers = split_answers(given) if isinstance(given, str) else given
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers is neither text nor a list of texts")
    skipped = flag_of(row.get("skipped"))
    name = str(row.get("annotator") or "").strip()
    if not answers and not skipped and not name:
        return []
    if skipped and any(answer.strip() for answer in answers):
        raise ValueError("both answered and skipped")
    stripped = [answer.strip() for answer in answers]
    when = time_of(row.get("answered_at"), saved)
    return [HumanAnswer(question_id, [] if skipped else stripped, name or annotator, when, skipped)]


def _label_studio_answers(question_id: str, annotations: Any, annotator: str, saved: datetime) -> Iterator[HumanAnswer]:
    """Every annotation of one task; cancelled ones are skipped questions.

    Source: https://labelstud.io/guide/task_format
    """
    for made in annotations if isinstance(annotations, list) else []:
        if not isinstance(made, dict):
            raise ValueError("an annotation is not a JSON object")
        answers: list[Any] = []
        for region in made.get("result") or []:
            value = region.get("value") if isinstance(region, dict) else None
            texts = value.get("text") if isinstance(value, dict) and region.get("type") == "textarea" else None
            answers += [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
        skipped = bool(made.get("was_cancelled"))
        when = time_of(made.get("updated_at") or made.get("created_at"), saved)
        kept = [] if skipped else [text.strip() for text in answers if isinstance(text, str)]
        yield HumanAnswer(question_id, kept, completed_by(made.get("completed_by")) or annotator, when, skipped)
