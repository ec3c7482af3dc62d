"""The pool's plain parts: normal form, cleaning of rows, known datasets, files, duplicates and splits."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ka2l import schemas
from ka2l.errors import PoolError
from ka2l.pool import sources
from ka2l.pool.config import ColumnsConfig, PoolConfig
from ka2l.pool.rows import (
    CLEAN,
    CleanRow,
    Rejected,
    clean_row,
    clean_table,
    content_id,
    normalise_question,
    quarantine_table,
    question_key,
    questions_table,
    references_table,
)
from ka2l.pool.sources import (
    KNOWN_DATASETS,
    BadRow,
    content_identity,
    find_pieces,
    is_dataset,
    load_dataset,
    parse_line,
    read_piece,
)
from ka2l.pool.splits import CANDIDATE, EVAL, SEED, assign_splits, find_duplicates

CONFIG = PoolConfig(path="pool.jsonl", max_question_chars=100, max_answer_chars=50)
REQUIRED = ("question", "answers")


def clean(row: object, **columns: Any) -> CleanRow | Rejected:
    return clean_row(row, ColumnsConfig(**columns), CONFIG, "pool.jsonl", 7)


def usable(row: object, **columns: Any) -> CleanRow:
    cleaned = clean(row, **columns)
    assert isinstance(cleaned, CleanRow), cleaned
    return cleaned


def rejected(row: object, **columns: Any) -> Rejected:
    cleaned = clean(row, **columns)
    assert isinstance(cleaned, Rejected), cleaned
    return cleaned


# ---------------------------------------------------------------------------------------------------- normal form


@pytest.mark.parametrize(
    "other",
    [
        "who wrote ulysses",
        "Who  wrote\tUlysses ?",
        "WHO WROTE ULYSSES?!",
        " Who wrote\u00a0Ulysses。",
        "Ｗｈｏ wrote Ulysses？",
    ],
)
def test_questions_that_differ_in_case_space_width_or_final_punctuation_are_the_same(other: str) -> None:
    assert question_key(other) == question_key("Who wrote Ulysses?")


@pytest.mark.parametrize(
    ("one", "other"), [("What is C#?", "What is C?"), ("What is C++?", "What is C?"), ("Who is it?", "Who is he?")]
)
def test_questions_that_differ_in_meaning_stay_apart(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise_question(normalise_question(text)) == normalise_question(text)


def test_content_ids_depend_on_question_and_answers_alone() -> None:
    assert content_id("Who?", ["a", "b"]) == content_id("who", ["a", "b"])
    assert len({content_id("Who?", ["a", "b"]), content_id("Who?", ["ab"]), content_id("What?", ["a", "b"])}) == 3


# ---------------------------------------------------------------------------------------------------- one row


def test_a_row_keeps_its_question_and_answers_and_every_other_column_as_metadata() -> None:
    row = {"id": 3, "question": " Who? ", "answers": ["A ", "B", "A", None, ""], "subject": "S", "pop": 2, "when": None}
    assert usable(row, group="subject") == CleanRow(
        "3", "Who?", ["A", "B"], "S", None, None, '{"pop": 2, "when": null}'
    )


@pytest.mark.parametrize(
    ("value", "expected"), [("Paris", ["Paris"]), (7, ["7"]), (7.5, ["7.5"]), ([1999, 3.0, "x"], ["1999", "3", "x"])]
)
def test_answers_may_be_one_string_or_numbers(value: object, expected: list[str]) -> None:
    assert usable({"question": "Who?", "answers": value}).answers == expected


@pytest.mark.parametrize("row", [{}, {"id": None}, {"id": " "}])
def test_a_row_without_an_id_gets_one_from_its_content(row: dict[str, Any]) -> None:
    assert usable(row | {"question": "Who?", "answers": ["a"]}).question_id == content_id("Who?", ["a"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "", "answers": ["a"]}, "empty: the question is blank"),
        ({"question": " \t\n", "answers": ["a"]}, "empty: the question is blank"),
        ({"question": None, "answers": ["a"]}, "empty: the question is null"),
        ({"question": " ?!", "answers": ["a"]}, "empty: the question is nothing but punctuation"),
        ({"question": 12, "answers": ["a"]}, "malformed: the question is a int"),
        ({"question": ["Who?"], "answers": ["a"]}, "malformed: the question is a list"),
        ({"answers": ["a"]}, "malformed: no column 'question' (the row has: answers)"),
        ({"question": "Who?"}, "malformed: no column 'answers'"),
        ({"question": "Who?", "answers": None}, "malformed: no answer is left"),
        ({"question": "Who?", "answers": []}, "malformed: no answer is left"),
        ({"question": "Who?", "answers": ["  ", "\t"]}, "malformed: no answer is left"),
        ({"question": "Who?", "answers": [None, None]}, "malformed: no answer is left"),
        ({"question": "Who?", "answers": {"text": ["a"]}}, "malformed: an answer is a dict"),
        ({"question": "Who?", "answers": [["a"]]}, "malformed: an answer is a list"),
        ({"question": "Who?", "answers": [True]}, "malformed: an answer is a bool"),
        ({"question": "w" * 101, "answers": ["a"]}, "over_long: the question has more than 100 characters"),
        ({"question": "Who?", "answers": ["a", "b" * 51]}, "over_long: an answer has more than 50 characters"),
        ({"question": "Who \ud800?", "answers": ["a"]}, "malformed: question holds a lone surrogate"),
        ({"question": "Who?", "answers": ["a"], "id": [1]}, "malformed: id is a list"),
        (["Who?", "a"], "malformed: the row is a list"),
        ("Who?", "malformed: the row is a str"),
        (None, "malformed: the row is a NoneType"),
    ],
)
def test_a_bad_row_is_rejected_with_its_place_and_reason(row: object, reason: str) -> None:
    result = rejected(row)
    assert result.reason.startswith(reason)
    assert (result.source, result.row) == ("pool.jsonl", 7)


@pytest.mark.parametrize("value", [None, "train", 3])
def test_where_a_split_column_is_named_every_row_needs_one_of_the_three_splits(value: object) -> None:
    row = {"question": "Who?", "answers": ["a"], "part": value}
    assert rejected(row, split="part").reason.startswith("malformed: split is ")
    assert usable(row | {"part": "eval"}, split="part").split == "eval"


def test_quarantined_content_is_cut_and_holds_no_invalid_text() -> None:
    content = rejected({"question": 5, "text": "x\ud800" * 5000}).content
    assert len(content) == 2000
    assert content.encode().startswith(b'{"question": 5, "text": "x?x?')


def test_metadata_is_json_whatever_the_column_types_are_and_big_values_are_cut() -> None:
    row = {
        "question": "Who?",
        "answers": "a",
        "nan": float("nan"),
        "nested": {"inf": float("inf"), "list": [1, None]},
        "day": datetime.date(2024, 2, 29),
        "raw": b"\xff",
        "context": "c" * 9000,
        "pages": ["p" * 9000],
    }
    metadata = json.loads(usable(row).metadata, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert metadata["nan"] is None
    assert metadata["nested"] == {"inf": None, "list": [1, None]}
    assert metadata["day"] == "2024-02-29"
    assert len(metadata["context"]) == len(metadata["pages"]) == 2000


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_value_of_any_type_crashes_the_cleaning(value: object) -> None:
    rows = [
        value,
        {"question": value, "answers": ["a"]},
        {"question": "Who?", "answers": value, "id": value, "x": value},
    ]
    table = clean_table(enumerate(rows), ColumnsConfig(), CONFIG, "pool.jsonl")
    table.validate(full=True)
    assert len(table) == 3


def test_config_refuses_unknown_keys_and_negative_numbers() -> None:
    with pytest.raises(ValidationError, match="extra"):
        PoolConfig(path="x", colums=None)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="num_eval"):
        PoolConfig(path="x", num_eval=-1)


# ---------------------------------------------------------------------------------------------------- tables


def test_clean_rows_become_the_committed_tables() -> None:
    rows = [
        {"id": "a", "question": "Who?", "answers": ["x"], "subject": "S", "pop": 1},
        {"id": "b", "question": ""},
        {"id": "c", "question": "What?", "answers": ["y", "z"]},
    ]
    table = clean_table(enumerate(rows), ColumnsConfig(group="subject"), CONFIG, "pool.jsonl")
    assert table.schema == CLEAN
    good = table.take([0, 2])
    questions, references = questions_table(good, np.array([EVAL, SEED], dtype=np.int8)), references_table(good)
    assert questions.schema == schemas.QUESTIONS
    assert references.schema == schemas.REFERENCES
    assert questions["split"].to_pylist() == ["eval", "seed"]
    assert questions["group"].to_pylist() == ["S", None]
    assert references.to_pylist() == [
        {"question_id": "a", "answers": ["x"]},
        {"question_id": "c", "answers": ["y", "z"]},
    ]
    assert "answers" not in questions.column_names
    quarantine = quarantine_table(table.take([1, 2]), ["empty: question", "duplicate: of a"])
    assert quarantine.schema == schemas.QUARANTINE
    assert quarantine["row"].to_pylist() == [1, 2]
    assert [json.loads(content)["id"] for content in quarantine["content"].to_pylist()] == ["b", "c"]


# ---------------------------------------------------------------------------------------------------- known datasets

TRIVIA_QA = {
    "question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
    "question_id": "tc_1",
    "question_source": "http://www.triviacountry.com/",
    "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
    "search_results": {"description": [], "filename": [], "rank": [], "title": [], "url": [], "search_context": []},
    "answer": {
        "aliases": ["(Harry) Sinclair Lewis", "Harry Sinclair Lewis", "Sinclair Lewis"],
        "normalized_aliases": ["harry sinclair lewis", "lewis harry sinclair", "sinclair lewis"],
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": "sinclair lewis",
        "type": "WikipediaEntity",
        "value": "Sinclair Lewis",
    },
}
NQ_OPEN = {"question": "where did they film hot tub time machine", "answer": ["Fernie Alpine Resort"]}
MEDMCQA = {
    "id": "e9ad821a-c438-4965-9f77-760819dfa155",
    "question": "Chronic urethral obstruction due to benign prismatic hyperplasia can lead to the following change",
    "opa": "Hyperplasia",
    "opb": "Hyperophy",
    "opc": "Atrophy",
    "opd": "Dyplasia",
    "cop": 2,
    "choice_type": "single",
    "exp": "Chronic urethral obstruction because of urinary calculi ... can cause atrophy.",
    "subject_name": "Anatomy",
    "topic_name": "Urinary tract",
}


def known(name: str, row: dict[str, Any]) -> CleanRow | Rejected:
    return clean_row(row, ColumnsConfig(), PoolConfig(path=name), name, 0, KNOWN_DATASETS[name].mapper)


def test_triviaqa_rows_give_the_value_first_then_aliases_then_new_normalised_forms() -> None:
    row = known("mandarjoshi/trivia_qa", TRIVIA_QA)
    assert isinstance(row, CleanRow)
    assert row.question_id == "tc_1"
    assert row.answers == ["Sinclair Lewis", "(Harry) Sinclair Lewis", "Harry Sinclair Lewis", "lewis harry sinclair"]
    assert KNOWN_DATASETS["mandarjoshi/trivia_qa"].hf_name == "rc.nocontext"


def test_nq_open_rows_have_no_id_and_a_list_of_answers() -> None:
    row = known("google-research-datasets/nq_open", NQ_OPEN)
    assert isinstance(row, CleanRow)
    assert (row.question, row.answers) == (NQ_OPEN["question"], ["Fernie Alpine Resort"])
    assert row.question_id == content_id(row.question, row.answers)


def test_medmcqa_rows_are_asked_open_ended_and_their_metadata_does_not_reveal_the_answer() -> None:
    row = known("openlifescienceai/medmcqa", MEDMCQA)
    assert isinstance(row, CleanRow)
    assert row.answers == ["Atrophy"]
    metadata = json.loads(row.metadata)
    assert metadata["subject_name"] == "Anatomy"
    assert not {"cop", "exp"} & set(metadata)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("openlifescienceai/medmcqa", MEDMCQA | {"cop": -1}),
        ("openlifescienceai/medmcqa", MEDMCQA | {"cop": None}),
        ("openlifescienceai/medmcqa", NQ_OPEN),
        ("mandarjoshi/trivia_qa", TRIVIA_QA | {"answer": {"value": "<unk>", "aliases": []}}),
        ("mandarjoshi/trivia_qa", TRIVIA_QA | {"answer": None}),
        ("nq_open", NQ_OPEN | {"answer": []}),
    ],
)
def test_known_datasets_without_an_answer_or_in_another_layout_are_malformed(name: str, row: dict[str, Any]) -> None:
    cleaned = known(name, row)
    assert isinstance(cleaned, Rejected)
    assert cleaned.reason.startswith("malformed: ")


def test_what_is_a_dataset_id_and_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ids = ["mandarjoshi/trivia_qa", "nq_open", "some-owner/some.name_1"]
    paths = ["owner/name", "pool.jsonl", "data/pool.parquet", "data/*.x", "s3://b/x", "/data/pool", "a/b/c", "other"]
    assert [is_dataset(name) for name in ids] == [True] * len(ids)
    assert [is_dataset(name) for name in paths] == [False] * len(paths)


def test_a_saved_dataset_and_a_folder_of_parquet_load_by_the_real_library(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([NQ_OPEN, {"question": "q", "answer": ["a", "b"]}])
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    for path, split in [("saved", "train"), ("dict", "validation"), ("folder", "train")]:
        assert load_dataset(str(tmp_path / path), None, split).to_list() == data.to_list()
    with pytest.raises(PoolError, match="hf_split='train'"):
        load_dataset(str(tmp_path / "dict"), None, "train")


def test_a_dataset_that_cannot_be_loaded_is_a_pool_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/absent' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(PoolError, match=r"owner/absent.*not an existing path.*doesn't exist"):
        load_dataset("owner/absent")


# ---------------------------------------------------------------------------------------------------- files


def rows_of(path: Path | str, required: tuple[str, ...] = REQUIRED) -> Iterator[tuple[int, object]]:
    for piece in find_pieces(str(path), required):
        yield from read_piece(piece)


def test_lines_that_cannot_be_parsed_keep_their_line_number(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"question": 1}', b"", b"{not json", b'{"question": "\xff"}', b'["a list"]', b"[" * 10**5]
    (tmp_path / "pool.jsonl").write_bytes(b"\r\n".join([*lines, b'{"a": "x\xe2\x80\xa8y"}']))
    rows = dict(rows_of(tmp_path / "pool.jsonl"))
    assert list(rows) == [0, 2, 3, 4, 5, 6]
    assert rows[0] == {"question": 1}
    assert rows[4] == ["a list"]
    # A line separator inside a string does not end the line.
    assert rows[6] == {"a": "x\u2028y"}
    reasons = [row.reason for row in (rows[2], rows[3], rows[5]) if isinstance(row, BadRow)]
    assert [reason.split("(")[0] for reason in reasons] == [
        "malformed: invalid JSON ",
        "malformed: invalid UTF-8 at byte 14",
        "malformed: invalid JSON ",
    ]


def test_a_bad_line_shows_its_text_in_the_quarantine() -> None:
    cleaned = rejected(parse_line(b'{"question": "caf\xe9"}\n'))
    assert cleaned.reason.startswith("malformed: invalid UTF-8")
    assert cleaned.content == '{"question": "caf\ufffd"}'


def test_compressed_lines_are_read_and_a_torn_file_ends_as_unreadable(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"question": "q%d"}\n' % i for i in range(5000)))
    (tmp_path / "whole.jsonl.gz").write_bytes(whole)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert len(list(rows_of(tmp_path / "whole.jsonl.gz"))) == 5000
    *_, (_, last) = rows_of(tmp_path / "torn.jsonl.gz")
    assert isinstance(last, BadRow)
    assert last.reason.startswith("unreadable: ")
    assert "torn.jsonl.gz" in last.reason


def test_parquet_pieces_cover_every_row_once_with_its_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE_BYTES", 500)
    table = pa.table({"question": [f"q{i}" for i in range(100)], "answers": [[str(i)] for i in range(100)]})
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=7)
    pieces = find_pieces(str(tmp_path / "pool.parquet"), REQUIRED)
    assert len(pieces) > 3
    rows = [row for piece in pieces for row in read_piece(piece)]
    assert rows == list(enumerate(table.to_pylist()))


def test_a_directory_gives_its_data_files_in_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ["b.jsonl", "a/z.jsonl", "manifest.json", "README.md", "_temp/c.jsonl", ".d.jsonl", "e.ndjson"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"question": "q"}\n')
    names = [Path(piece.path).relative_to(tmp_path).as_posix() for piece in find_pieces(str(tmp_path), REQUIRED)]
    assert names == ["a/z.jsonl", "b.jsonl", "e.ndjson"]
    assert len(find_pieces(f"{tmp_path}/*.jsonl", REQUIRED)) == 1
    assert len(find_pieces(f"file://{tmp_path}/**/*.jsonl", REQUIRED)) >= 2
    assert len(find_pieces(f"{tmp_path}/manifest.json", REQUIRED)) == 1


def test_urls_of_other_file_systems_are_read() -> None:
    import fsspec

    with fsspec.open("memory://pool-test/x.jsonl", "wb") as file:
        file.write(b'{"question": "q"}\n')
    assert list(rows_of("memory://pool-test")) == [(0, {"question": "q"})]


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "*.jsonl", "empty_folder"])
def test_a_path_with_nothing_there_is_a_pool_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(PoolError, match="no JSONL or Parquet file there"):
        find_pieces(str(tmp_path / name), REQUIRED)


def test_a_pool_is_known_by_what_it_holds_and_not_by_where_it_lies(tmp_path: Path) -> None:
    line = '{"question": "Where was Ada born?", "answers": ["Lima"]}\n'
    for place in ("a/first.jsonl", "b/other.jsonl"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(line * 40_000)  # more than a MiB
    known = content_identity(str(tmp_path / "a" / "first.jsonl"))
    for same in (tmp_path / "a", tmp_path / "a" / "*.jsonl", tmp_path / "b" / "other.jsonl"):
        assert content_identity(str(same)) == known
    (tmp_path / "b" / "other.jsonl").write_text(line * 39_999 + line.replace("Lima", "Oslo"))
    assert content_identity(str(tmp_path / "b" / "other.jsonl")) != known
    (tmp_path / "a" / "second.jsonl").write_text(line)
    assert content_identity(str(tmp_path / "a")) != known


def test_of_a_huge_pool_the_ends_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_HASHED_BYTES", 1)
    file = tmp_path / "pool.jsonl"
    file.write_bytes(b"a" * (3 * 2**20))
    known = content_identity(str(file))
    file.write_bytes(b"a" * (3 * 2**20 - 1) + b"b")
    assert content_identity(str(file)) != known


def test_a_file_of_another_kind_or_scheme_is_a_pool_error(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("question,answers\n")
    with pytest.raises(PoolError, match="neither JSONL nor Parquet"):
        find_pieces(str(tmp_path / "pool.csv"), REQUIRED)
    with pytest.raises(PoolError, match="cannot be opened"):
        find_pieces("nosuchscheme://bucket/pool.jsonl", REQUIRED)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    for name in ["a.parquet", "b.parquet", "c.parquet"]:
        pq.write_table(pa.table({"question": ["q"], "answers": [["a"]]}), tmp_path / name)
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(PoolError, match=r"b\.parquet is not a readable Parquet file"):
        find_pieces(str(tmp_path), REQUIRED)


def test_a_parquet_file_without_a_named_column_is_refused_with_the_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q"], "answers": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(PoolError, match="no column 'question'; it has: query, answers"):
        find_pieces(str(tmp_path), REQUIRED)


# ---------------------------------------------------------------------------------------------------- duplicates


def keys(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def no_splits(num_rows: int) -> np.ndarray:
    return np.full(num_rows, -1, dtype=np.int8)


def winners(*columns: Any) -> list[Any]:
    """For each row the row kept instead of it, or -1; by question and by id."""
    found = find_duplicates(*columns)
    dense = [np.full(len(columns[0]), -1) for _ in found]
    for column, repeats in zip(dense, found, strict=True):
        assert (np.diff(repeats.rows) > 0).all()
        column[repeats.rows] = repeats.kept
    return dense


def test_the_first_of_equal_questions_is_kept_and_ids_are_compared_among_the_kept() -> None:
    by_question, by_id = winners(keys([5, 6, 5, 7, 6]), keys([1, 2, 2, 1, 9]), no_splits(5))
    assert by_question.tolist() == [-1, -1, 0, -1, 1]
    assert by_id.tolist() == [-1, -1, -1, 0, -1]


def test_of_equal_questions_in_given_splits_the_eval_row_is_kept() -> None:
    splits = np.array([SEED, CANDIDATE, EVAL, CANDIDATE, EVAL], dtype=np.int8)
    by_question, by_id = winners(keys([5, 6, 5, 6, 5]), keys([1, 2, 3, 4, 5]), splits)
    assert by_question.tolist() == [2, -1, -1, 1, 2]
    assert by_id.tolist() == [-1] * 5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), max_size=40))
def test_kept_rows_have_unique_questions_and_ids_and_each_other_row_names_a_kept_one(rows: list[Any]) -> None:
    questions, ids, splits = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    explicit = np.array(splits, dtype=np.int8)
    by_question, by_id = winners(keys(questions), keys(ids), explicit)
    kept = np.flatnonzero((by_question < 0) & (by_id < 0)).tolist()
    assert len({questions[i] for i in kept}) == len({ids[i] for i in kept}) == len(kept)
    for i in range(len(rows)):
        if by_question[i] >= 0:
            assert questions[by_question[i]] == questions[i]
            assert by_question[by_question[i]] == -1
            assert explicit[i] != EVAL or explicit[by_question[i]] == EVAL
        elif by_id[i] >= 0:
            assert ids[by_id[i]] == ids[i]
            assert by_id[i] in kept


# ---------------------------------------------------------------------------------------------------- splits

POOLS = st.tuples(
    st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=60, unique=True),
    st.integers(1, 70),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 2**63),
    st.randoms(use_true_random=False),
)


@given(POOLS)
@settings(max_examples=200)
def test_splits_ignore_row_order_keep_groups_of_eval_whole_and_meet_the_numbers(pool: Any) -> None:
    questions, num_groups, num_seed, num_eval, seed, random = pool
    groups = [key % num_groups for key in questions]

    def split(order: list[int]) -> dict[int, int]:
        picked = keys([questions[i] for i in order])
        result = assign_splits(
            picked,
            keys([groups[i] for i in order]),
            no_splits(len(order)),
            num_seed=num_seed,
            num_eval=num_eval,
            seed=seed,
        )
        return dict(zip(picked.tolist(), result.tolist(), strict=True))

    order = list(range(len(questions)))
    try:
        splits = split(order)
    except PoolError:
        sizes = np.unique(groups, return_counts=True)[1]
        # Either the numbers ask for too much, or a group is too large to be put anywhere.
        assert (
            num_seed + num_eval >= len(questions)
            or num_seed + num_eval + sizes.max() > len(questions)
            or sizes.min() > num_eval
        )
        return
    random.shuffle(order)
    assert split(order) == splits
    names = list(splits.values())
    assert names.count(SEED) == num_seed
    assert names.count(CANDIDATE) >= 1
    in_eval = {key % num_groups for key, name in splits.items() if name == EVAL}
    assert not in_eval & {key % num_groups for key, name in splits.items() if name != EVAL}
    sizes_left = [groups.count(group) for group in set(groups) - in_eval]
    missing = num_eval - names.count(EVAL)
    # No single group that was left out would bring the number strictly nearer.
    assert all(abs(missing - size) >= abs(missing) for size in sizes_left)


def test_without_groups_the_numbers_are_exact_and_another_seed_draws_others() -> None:
    questions = keys(list(range(1000)))
    drawn = [
        assign_splits(questions, questions, no_splits(1000), num_seed=100, num_eval=200, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert np.bincount(drawn[0]).tolist() == [100, 700, 200]
    assert (drawn[0] == drawn[1]).all()
    # Two independent draws agree in about 0.1^2 + 0.7^2 + 0.2^2 = 54 % of rows.
    assert 0.45 < (drawn[0] == drawn[2]).mean() < 0.63


def test_adding_rows_does_not_reshuffle_the_others() -> None:
    questions = keys(list(range(1010)))
    few = assign_splits(questions[:1000], questions[:1000], no_splits(1000), num_seed=0, num_eval=200, seed=0)
    more = assign_splits(questions, questions, no_splits(1010), num_seed=0, num_eval=200, seed=0)
    assert (few != more[:1000]).sum() <= 10


def test_given_splits_are_used_as_they_are_but_none_that_is_needed_may_be_absent() -> None:
    given_splits = np.array([EVAL, SEED, CANDIDATE, EVAL], dtype=np.int8)
    result = assign_splits(keys([1, 2, 3, 4]), keys([1, 1, 1, 1]), given_splits, num_seed=400, num_eval=500, seed=0)
    assert result.tolist() == given_splits.tolist()
    with pytest.raises(PoolError, match="no usable row for: seed, candidate"):
        assign_splits(keys([1]), keys([1]), given_splits[:1], num_seed=1, num_eval=1, seed=0)


def test_numbers_that_leave_no_candidate_are_refused_with_the_numbers() -> None:
    with pytest.raises(PoolError, match=r"num_seed \(4\) \+ pool.num_eval \(6\) = 10 of 10 usable"):
        assign_splits(keys(list(range(10))), keys(list(range(10))), no_splits(10), num_seed=4, num_eval=6, seed=0)


def test_groups_too_large_to_split_are_refused_with_their_size() -> None:
    groups = keys([0] * 50 + [1] * 50)
    with pytest.raises(PoolError, match="the largest group has 50"):
        assign_splits(keys(list(range(100))), groups, no_splits(100), num_seed=10, num_eval=20, seed=0)
