"""A round with a decoder, for real: fitted, decoded, gated, annotated; killed and resumed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.store.run_directory import RunDirectory
from ka2l.pool.rows import question_key
from ka2l.schemas import DECODED

pytestmark = [pytest.mark.slow, pytest.mark.whole]

ASKED = ("size", "colour", "taste", "name")
BUDGET, SHARE = 12, 0.5


class Decoded(NamedTuple):
    run_dir: Path
    table: Path


@pytest.fixture(scope="module")
def decoded(finished: Any, ka2l: Any, on_cluster: list[str], tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """The mini campaign with a decoder up to its second round's questions, after what it has in common with the one
    without.

    The pool asks about 27 things; corpus and table ask about 90.
    """
    folder = tmp_path_factory.mktemp("decoding")
    run_dir, table = folder / "run", folder / "table.jsonl"
    things = [f"What is the {asked} of thing {index}?" for index in range(90) for asked in ASKED]
    rows = [{"question": text, "answers": [f"answer to {text}"]} for text in things]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep_out(finished.run_dir, run_dir, "extract", "probe", "knowledge", "select", "annotate", "tune")
    decoder = {
        "kind": "inversion",
        "corpus": str(table),
        "num_corpus": 250,
        "share": SHARE,
        "num_noised": 6,
        "noise": 1.0,
        "max_similarity": 1.0,
        "learning_rate": 0.01,
        "num_epochs": 15,
        "batch_size": 64,
        "max_tokens": 32,
        "min_cosine": 1.0,  # any tuning moves the states further than that
    }
    values = {
        "extraction.position": "last_and_mean",
        "decoder": decoder,
        "annotator.reference_table": str(table),
    }
    options = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    kill = {"event": "stage_committed", "stage": "decode", "round": 1}
    ended = ka2l("resume", run_dir, *options, *on_cluster, kill=kill)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ka2l("report", run_dir).returncode == 0
    return Decoded(run_dir, table)


def keep_out(source: Path, target: Path, *stages: str) -> None:
    """Copy a run without these stages, the rounds after the first and what is derived from them."""
    later = ("round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*stages, *later))


def rows(run_dir: Path, stage: str, index: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = RunDirectory(run_dir).stage(stage, index).table().to_pylist()
    return found


def test_some_questions_pass_all_gates_and_every_draft_says_where_it_ended(decoded: Decoded) -> None:
    table = RunDirectory(decoded.run_dir).stage("decode", 0).table()
    metrics = RunDirectory(decoded.run_dir).stage("decode", 0).require().metrics
    assert table.schema.equals(DECODED)
    assert 0 < metrics["num_kept"] <= BUDGET * SHARE
    assert sum(metrics["gates"].values()) == metrics["num_drafts"] == table.num_rows
    assert metrics["gates"]["kept"] == metrics["num_kept"]


def test_what_is_kept_is_new_unknown_answerable_and_has_unknown_selected_parents(decoded: Decoded) -> None:
    run = RunDirectory(decoded.run_dir)
    pool = {question_key(text) for text in run.stage("questions").table(["question"])["question"].to_pylist()}
    table = {json.loads(line)["question"] for line in decoded.table.read_text().splitlines()}
    selected = {row["question_id"] for row in rows(decoded.run_dir, "select")}
    looks_known = {row["question_id"] for row in rows(decoded.run_dir, "knowledge") if row["p_unknown"] < 0.5}
    kept = [row for row in rows(decoded.run_dir, "decode") if row["gate"] == "kept"]
    assert len({row["question_id"] for row in kept}) == len(kept)
    for row in kept:
        assert question_key(row["question"]) not in pool
        assert {question_key(row["question"])} <= {question_key(text) for text in table}
        assert row["p_unknown"] >= 0.5
        assert set(row["parents"]) <= selected - looks_known


def test_decoded_questions_take_their_share_of_the_budget_and_not_more(decoded: Decoded) -> None:
    kept = {row["question_id"] for row in rows(decoded.run_dir, "decode") if row["gate"] == "kept"}
    chosen = sorted(rows(decoded.run_dir, "select"), key=lambda row: row["rank"])
    best = {row["question_id"] for row in chosen[: BUDGET - len(kept)]}
    annotated = rows(decoded.run_dir, "annotate")
    assert {row["question_id"] for row in annotated} == kept | best
    for row in annotated:
        if row["question_id"] in kept:
            assert row["answers"] == [f"answer to {row['question']}"]
    assert len(annotated) == BUDGET


def test_the_decoder_never_saw_an_eval_or_seed_question(decoded: Decoded) -> None:
    run = RunDirectory(decoded.run_dir)
    questions = run.stage("questions").table(["question", "split"]).to_pylist()
    corpus = {question_key(text) for text in run.stage("corpus").table(["question"])["question"].to_pylist()}
    assert len(corpus) == 250
    assert not corpus & {question_key(row["question"]) for row in questions}
    metrics = run.stage("decoder", 0).require().metrics
    splits = [row["split"] for row in questions]
    assert metrics["num_pairs"] == 250 + splits.count("candidate")
    assert metrics["num_held_out"] == splits.count("seed")
    assert 0 <= metrics["exact_match"] <= metrics["token_f1"] <= 1


def test_a_decoder_is_fitted_again_from_where_it_was_when_tuning_has_moved_the_states(decoded: Decoded) -> None:
    run = RunDirectory(decoded.run_dir)
    first, second = (run.stage("decoder", index).require() for index in range(2))
    assert [first.metrics["fitted_round"], second.metrics["fitted_round"]] == [0, 1]
    assert second.metrics["mean_cosine"] < 1
    assert {"round-000/decoder", "round-001/corpus_states"} <= second.inputs.keys()
    assert second.metrics["num_steps"] < first.metrics["num_steps"]
    assert second.metrics["token_f1"] > 0


def test_no_question_is_decoded_into_two_rounds(decoded: Decoded) -> None:
    kept = [
        row["question_id"]
        for index in range(2)
        for row in rows(decoded.run_dir, "decode", index)
        if row["gate"] == "kept"
    ]
    assert len(set(kept)) == len(kept) > 0


def test_report_and_summary_show_gates_and_parents(decoded: Decoded) -> None:
    summary = json.loads((decoded.run_dir / "summary.json").read_text())
    kept = [row for row in rows(decoded.run_dir, "decode") if row["gate"] == "kept"]
    assert summary["rounds"][0]["decoded"]["num_kept"] == len(kept)
    page = (decoded.run_dir / "report.html").read_text()
    assert 'id="decoded"' in page
    assert kept[0]["question"] in page


def test_a_run_killed_while_it_decodes_ends_with_the_same_questions(
    decoded: Decoded, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    keep_out(decoded.run_dir, run_dir, "decoder", "decode", "annotate", "tune")
    states = (run_dir / "round-000" / "corpus_states" / "manifest.json").read_bytes()
    for kill in (
        {"event": "before_commit", "stage": "decode", "round": 0},
        {"event": "stage_committed", "stage": "annotate", "round": 0},
    ):
        assert ka2l("resume", run_dir, *on_cluster, kill=kill).returncode == -signal.SIGKILL, kill
    assert (run_dir / "round-000" / "corpus_states" / "manifest.json").read_bytes() == states
    for stage in ("decode", "annotate"):
        ours, theirs = rows(run_dir, stage), rows(decoded.run_dir, stage)
        for row in (*ours, *theirs):
            row.pop("annotated_at", None)
        assert ours == theirs, stage
