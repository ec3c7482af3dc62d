from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ka2l.annotation.annotator import ReferenceAnnotator
from ka2l.annotation.reference_table import ReferenceTable, read_reference_table
from ka2l.errors import AnnotationError, PoolError

ANSWERS = {"Where was Ada Lovelace born?": ["London"], "Who painted the Mona Lisa?": ["Leonardo"]}


def test_a_question_is_found_whatever_its_case_and_closing_mark() -> None:
    assert ReferenceTable(ANSWERS).look_up({"a": "where was ada  lovelace born"}) == {"a": ["London"]}


def test_a_similar_question_is_refused_unless_the_config_says_how_similar_is_enough() -> None:
    asked = {"a": "Where was Ada Lovelace really born?"}
    assert ReferenceTable(ANSWERS).look_up(asked) == {}
    assert ReferenceTable(ANSWERS, 0.7).look_up(asked) == {"a": ["London"]}


def test_what_is_nothing_like_the_table_is_refused_even_then() -> None:
    assert ReferenceTable(ANSWERS, 0.7).look_up({"a": "How deep is the ocean?"}) == {}


def test_the_pools_own_answer_comes_before_the_tables() -> None:
    annotator = ReferenceAnnotator(
        lambda ids: {"pool": ["from the pool"]} if "pool" in ids else {}, ReferenceTable(ANSWERS)
    )
    made = annotator.annotate({"pool": "Who painted the Mona Lisa?", "d-1": "Where was Ada Lovelace born?", "d-2": "?"})
    assert [(row.question_id, row.answers) for row in made] == [("pool", ["from the pool"]), ("d-1", ["London"])]
    assert all(row.annotated_at <= datetime.now(UTC) for row in made)


def test_what_can_be_answered_is_told_without_revealing_anything() -> None:
    def reveal(ids: object) -> dict[str, list[str]]:
        raise AssertionError("nothing may be revealed")

    annotator = ReferenceAnnotator(reveal, ReferenceTable(ANSWERS))
    assert annotator.answerable({"a": "Who painted the Mona Lisa?", "b": "Who is Bob?"}) == {"a"}


def test_a_table_is_read_from_a_file_with_one_answer_or_several(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    rows = [{"question": "A?", "answers": "a"}, {"question": "B?", "answers": ["b", "c"]}, {"question": "C?"}]
    path.write_text("".join(json.dumps(row | {"x": 1}) + "\n" for row in rows))
    assert read_reference_table(str(path)).look_up({"1": "A", "2": "b?", "3": "c?"}) == {"1": ["a"], "2": ["b", "c"]}


def test_a_table_without_a_usable_row_or_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('{"question": "A?", "answers": []}\n')
    with pytest.raises(AnnotationError, match="holds no question"):
        read_reference_table(str(path))
    with pytest.raises(PoolError):
        read_reference_table(str(tmp_path / "missing.jsonl"))
