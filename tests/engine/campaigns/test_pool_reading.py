"""Pools read with Ray Data, from files as users have them."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.pool_reader import read_pool
from ka2l import schemas
from ka2l.errors import PoolError
from ka2l.pool.config import PoolConfig
from ka2l.pool.rows import normalise_question, question_key

pytestmark = pytest.mark.usefixtures("ray_session")


class Pool(NamedTuple):
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]
    quarantine: list[dict[str, Any]]
    counts: dict[str, int]

    @property
    def splits(self) -> dict[str, str]:
        return {question_key(row["question"]): row["split"] for row in self.questions}


def read(path: Path | str, seed: int = 0, shard_rows: int = 2000, **config: Any) -> Pool:
    bad: list[pa.Table] = []

    def write(tables: Iterator[pa.Table]) -> str:
        bad.extend(tables)
        assert bad
        assert all(table.schema == schemas.QUARANTINE for table in bad)
        return "pool/quarantine.parquet"

    tables = read_pool(PoolConfig(path=str(path), **config), seed, write_quarantine=write, shard_rows=shard_rows)
    with tempfile.TemporaryDirectory() as folder:
        written = list(tables.write_shards(partial(write_both, folder)))
        shards = [tuple(pq.read_table(f"{folder}/{name}-{index}") for name in "qr") for index, _ in written]
    assert [index for index, _ in written] == list(range(len(written)))
    assert [rows for _, rows in written] == [len(questions) for questions, _ in shards]
    for questions, references in shards:
        questions.validate(full=True)
        assert (questions.schema, references.schema) == (schemas.QUESTIONS, schemas.REFERENCES)
        assert questions["question_id"] == references["question_id"]
    assert all(len(questions) == shard_rows for questions, _ in shards[:-1])
    rows = [row for questions, _ in shards for row in questions.to_pylist()]
    answers = {row["question_id"]: row["answers"] for _, references in shards for row in references.to_pylist()}
    assert len(answers) == len(rows) == tables.counts["usable"]
    return Pool(rows, answers, [row for table in bad for row in table.to_pylist()], tables.counts)


def write_both(folder: str, index: int, questions: pa.Table, references: pa.Table) -> None:
    """Called in a worker."""
    pq.write_table(questions, f"{folder}/q-{index}")
    pq.write_table(references, f"{folder}/r-{index}")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(num_rows: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"id": f"n{i}", "question": f"What is {i}?", "answers": [str(i)], **columns} for i in range(num_rows)]


def kinds(pool: Pool) -> dict[str, int]:
    return dict(Counter(row["reason"].split(":")[0] for row in pool.quarantine))


# ---------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "num_rows", "columns"),
    [
        ("triviaqa_dpr_dev", 5000, None),
        ("nq_open_dev", 3610, None),
        ("medmcqa_validation", 4183, None),
        ("popqa", 3605, {"group": "subject"}),
    ],
)
def test_public_question_sets_are_read_whole_and_split_without_overlap(
    shared_dir: Path, name: str, num_rows: int, columns: dict[str, str] | None
) -> None:
    path = shared_dir / "data" / f"{name}.jsonl"
    source = [json.loads(line) for line in path.read_text().split("\n") if line]
    pool = read(path, columns=columns)
    assert pool.counts["rows"] == len(source) == num_rows
    assert pool.counts["usable"] + pool.counts["quarantined"] == num_rows
    # These sets are clean but for repeated questions, counted here by other means.
    assert kinds(pool).get("duplicate", 0) == num_rows - len({normalise_question(row["question"]) for row in source})
    assert set(kinds(pool)) <= {"duplicate"}
    assert len(pool.splits) == len(pool.questions)
    assert Counter(pool.splits.values())["seed"] == pool.counts["seed"] == 400
    assert Counter(pool.splits.values())["eval"] == pool.counts["eval"] == 500
    expected = {row["id"]: row for row in source}
    for row in pool.questions:
        assert row["question"] == expected[row["question_id"]]["question"].strip()
        assert pool.answers[row["question_id"]][0] == expected[row["question_id"]]["answers"][0].strip()
    if columns:
        in_eval = {row["group"] for row in pool.questions if row["split"] == "eval"}
        assert not in_eval & {row["group"] for row in pool.questions if row["split"] != "eval"}
        assert {row["group"] for row in pool.questions} == {row["subject"] for row in source}


def test_splits_do_not_depend_on_row_order_files_blocks_or_format(shared_dir: Path, tmp_path: Path) -> None:
    source = [json.loads(line) for line in (shared_dir / "data" / "popqa.jsonl").read_text().split("\n") if line]
    columns = {"group": "subject"}
    first = read(shared_dir / "data" / "popqa.jsonl", columns=columns)
    again = read(shared_dir / "data" / "popqa.jsonl", columns=columns, shard_rows=700)
    assert again.questions == first.questions
    assert again.answers == first.answers
    random.Random(0).shuffle(source)
    (tmp_path / "parts").mkdir()
    for part in range(7):
        write_jsonl(tmp_path / "parts" / f"part-{part}.jsonl", source[part::7])
    pq.write_table(pa.Table.from_pylist(source), tmp_path / "one.parquet", row_group_size=100)
    assert read(tmp_path / "parts", columns=columns).splits == first.splits
    assert read(tmp_path / "one.parquet", columns=columns).splits == first.splits
    assert read(tmp_path / "one.parquet", columns=columns, seed=1).splits != first.splits


def test_hundreds_of_small_parquet_files_are_read_in_order(tmp_path: Path) -> None:
    rows = numbered(900)
    for part in range(300):
        pq.write_table(pa.Table.from_pylist(rows[part * 3 : part * 3 + 3]), tmp_path / f"part-{part:05d}.parquet")
    pool = read(tmp_path, num_seed=100, num_eval=100)
    assert [row["question_id"] for row in pool.questions] == [row["id"] for row in rows]
    write_jsonl(tmp_path / "one.jsonl", rows)
    assert read(tmp_path / "one.jsonl", num_seed=100, num_eval=100).splits == pool.splits


# ---------------------------------------------------------------------------------------------------- bad rows


def test_every_bad_row_is_quarantined_with_its_place_and_reason_and_the_rest_is_used(tmp_path: Path) -> None:
    bad = [
        (b'{"id": "x0", "question": "", "answers": ["a"]}', "empty"),
        (b'{"id": "x1", "question": "Who1?", "answers": ["  "]}', "malformed"),
        (b'{"id": "x2", "question": "Who2?", "answers": null}', "malformed"),
        (b'{"id": "x3", "question": 42, "answers": ["a"]}', "malformed"),
        (b'{"id": "x4", "question": "Who4?", "answers": [null, null]}', "malformed"),
        (b'{"id": "x5", "question": "' + b"w" * 3000 + b'", "answers": ["a"]}', "over_long"),
        (b'{"id": "x6", "question": "WHAT is  3 ", "answers": ["three"]}', "duplicate"),
        (b'{"id": "x7", "question": "Who7?"', "malformed"),
        (b'{"id": "x8", "question": "Who \xff?", "answers": ["a"]}', "malformed"),
        (b'["a", "JSON", "list"]', "malformed"),
        (b'{"id": "n3", "question": "Who shares an id?", "answers": ["a"]}', "duplicate_id"),
        (b'{"id": "x9", "question": "Who \\ud800?", "answers": ["a"]}', "malformed"),
    ]
    good = [json.dumps(row).encode() for row in numbered(30)]
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\n".join([*good[:10], *(line for line, _ in bad), b"", *good[10:], b""]))
    pool = read(path, num_seed=5, num_eval=5, shard_rows=4)
    assert [(row["row"], row["reason"].split(":")[0]) for row in pool.quarantine] == [
        (10 + index, kind) for index, (_, kind) in enumerate(bad)
    ]
    assert {row["source"] for row in pool.quarantine} == {str(path)}
    assert pool.quarantine[6]["reason"] == f"duplicate: same question as row 3 of {path}"
    assert [row["question_id"] for row in pool.questions] == [f"n{i}" for i in range(30)]
    assert pool.counts == {
        "rows": 42,
        "usable": 30,
        "quarantined": 12,
        "quarantined_duplicate": 1,
        "quarantined_duplicate_id": 1,
        "quarantined_empty": 1,
        "quarantined_malformed": 8,
        "quarantined_over_long": 1,
        "seed": 5,
        "candidate": 20,
        "eval": 5,
    }


def test_rows_of_a_binary_or_numeric_parquet_column_are_malformed_not_fatal(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(numbered(9)), tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": [1, 2], "answers": ["a", "b"]}), tmp_path / "b.parquet")
    pool = read(tmp_path, num_seed=1, num_eval=1)
    assert kinds(pool) == {"malformed": 2}
    assert [(Path(row["source"]).name, row["row"]) for row in pool.quarantine] == [("b.parquet", 0), ("b.parquet", 1)]


def test_a_pool_without_a_usable_row_names_the_commonest_reason_and_the_quarantine(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pool.jsonl", [{"query": "q", "answers": ["a"]}] * 5 + [{"question": ""}])
    with pytest.raises(PoolError, match=r"no usable row: 6 of 6 are malformed: no column 'question'") as caught:
        read(path)
    assert "pool/quarantine.parquet" in str(caught.value)


def test_too_few_rows_for_the_splits_say_the_numbers_and_where_rows_went(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pool.jsonl", [*numbered(8), {"question": ""}])
    with pytest.raises(PoolError, match=r"= 10 of 8 usable .* 1 rows were quarantined: pool/quarantine.parquet"):
        read(path, num_seed=4, num_eval=6)


def test_a_misspelt_group_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pool.jsonl", numbered(20, subject="s"))
    with pytest.raises(PoolError, match=r"no row of the pool .* has a value in 'subjct'"):
        read(path, columns={"group": "subjct"}, num_seed=2, num_eval=2)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_a_pool_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pool.jsonl").write_bytes(content)
    with pytest.raises(PoolError, match="has no rows"):
        read(tmp_path / "pool.jsonl")


def test_damage_inside_a_parquet_file_is_a_pool_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.Table.from_pylist(numbered(5000)), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(PoolError, match=r"cannot be read to its end: .*pool\.parquet"):
        read(path)


# ---------------------------------------------------------------------------------------------------- options


def test_given_splits_are_kept_and_an_eval_question_is_never_also_a_candidate(tmp_path: Path) -> None:
    rows = [row | {"part": ("seed", "candidate", "eval")[i % 3]} for i, row in enumerate(numbered(9))]
    rows.insert(0, {"id": "twin", "question": "what is 2", "answers": ["2"], "part": "candidate"})
    rows.append({"id": "none", "question": "No split?", "answers": ["2"]})
    pool = read(write_jsonl(tmp_path / "pool.jsonl", rows), columns={"split": "part"})
    assert [row["split"] for row in pool.questions] == ["seed", "candidate", "eval"] * 3
    reasons = {json.loads(row["content"])["id"]: row["reason"] for row in pool.quarantine}
    assert reasons["twin"].startswith("duplicate: same question as row 3")
    assert reasons["none"].startswith("malformed: split is None")


def test_paraphrases_of_one_fact_do_not_straddle_eval(tmp_path: Path) -> None:
    rows = [row | {"fact": f"f{i // 4}"} for i, row in enumerate(numbered(200))]
    pool = read(write_jsonl(tmp_path / "pool.jsonl", rows), columns={"fact": "fact"}, num_seed=40, num_eval=40)
    in_eval = {row["fact"] for row in pool.questions if row["split"] == "eval"}
    assert len(in_eval) == 10
    assert not in_eval & {row["fact"] for row in pool.questions if row["split"] != "eval"}


def test_a_limit_takes_the_first_rows_of_the_source(tmp_path: Path) -> None:
    rows = numbered(3000)
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", rows[part * 1000 : part * 1000 + 1000])
    pool = read(tmp_path, limit=1500, num_seed=10, num_eval=10)
    assert [row["question_id"] for row in pool.questions] == [row["id"] for row in rows[:1500]]


# ---------------------------------------------------------------------------------------------------- Hugging Face


def test_a_known_dataset_is_mapped_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"question": f"what is {i}", "answer": [str(i)] if i else []} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **options: real(str(tmp_path), *args, **options))
    pool = read("google-research-datasets/nq_open", num_seed=100, num_eval=100)
    assert pool.counts["rows"] == 5000
    assert [(row["source"], row["row"]) for row in pool.quarantine] == [("google-research-datasets/nq_open[train]", 0)]
    assert [row["question"] for row in pool.questions] == [row["question"] for row in rows[1:]]
    by_hand = read("nq_open", columns={"answers": "answer"}, num_seed=100, num_eval=100, limit=300)
    assert by_hand.counts["rows"] == 300
    assert by_hand.questions[0]["question_id"] == pool.questions[0]["question_id"]


def test_a_dataset_saved_to_disk_is_read_and_its_columns_are_checked(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(numbered(50, topic="t")).save_to_disk(tmp_path / "saved")
    pool = read(tmp_path / "saved", num_seed=10, num_eval=10)
    assert pool.answers["n7"] == ["7"]
    assert json.loads(pool.questions[0]["metadata"]) == {"topic": "t"}
    with pytest.raises(PoolError, match="no column 'subject'; it has: id, question, answers, topic"):
        read(tmp_path / "saved", columns={"group": "subject"})
