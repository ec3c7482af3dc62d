"""What the report reads from a run directory: real shards and manifests, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.report.build import collect, write_report
from engine.report.collect import MAX_POINTS
from engine.report.metadata import MAX_VALUES, NUM_BINS
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from ka2l import schemas

NUM = 60
SPLIT = {0: "seed", 1: "candidate", 2: "eval"}


def _ids(split: str) -> list[str]:
    return [f"q{index:03d}" for index in range(NUM) if SPLIT[index % 3] == split]


def _commit(
    run: RunDirectory,
    name: str,
    index: int | None,
    rows: list[dict[str, Any]] | None,
    schema: pa.Schema | None = None,
    metrics: Mapping[str, Any] | None = None,
    cost: Mapping[str, float] | None = None,
) -> None:
    stage = run.stage(name, index)
    if rows is not None:
        half = len(rows) // 2
        for part, chunk in enumerate((rows[:half], rows[half:])):
            write_shard(stage.url, shard_name(part), pa.Table.from_pylist(chunk, schema), {})
    stage.commit(wanted="0" * 16, config={}, inputs={}, metrics=metrics or {}, cost=cost or {}, seed=7, seconds=2.0)


def _clusters(index: int) -> list[dict[str, Any]]:
    rows = []
    for number, question_id in enumerate(_ids("eval")):
        # The base knows the first 8 of 20; the tuned model forgets the first 2 of them and learns the rest.
        correct = (number < 8) if index == 0 else number >= 2
        rows.append(
            {
                "question_id": question_id,
                "purpose": "eval",
                "correct": correct,
                "semantic_entropy": 0.0,
                "top_answer": f"answer {number} of round {index}",
            }
        )
    rows += [
        {
            "question_id": question_id,
            "purpose": "probe",
            "correct": None,
            "semantic_entropy": 0.1 * number,
            "top_answer": "x",
        }
        for number, question_id in enumerate(_ids("seed"))
    ]
    empty = {
        "semantic_ids": [0],
        "num_clusters": 1,
        "weighted_semantic_entropy": 0.0,
        "predictive_entropy": 0.0,
        "disagreement": None,
        "exact_match": None,
        "token_f1": None,
    }
    return [row | empty for row in rows]


def _begin(path: Path) -> RunDirectory:
    """A pool, and nothing else."""
    run = RunDirectory(path)
    run.write_text("config.yaml", "name: by-hand\nseed: 7\nmodel: {path: invented/model}\n")
    questions = [
        {
            "question_id": f"q{index:03d}",
            "question": f"Question {index}?",
            "split": SPLIT[index % 3],
            "group": f"subject {index % 4}",
            "fact": None,
            "metadata": json.dumps(
                {
                    "exposure": index % 5,
                    "popularity": index * 10.5,
                    "url": f"unique {index}",
                    "same": "always",
                    "nested": {"a": 1},
                }
            ),
        }
        for index in range(NUM)
    ]
    references = [{"question_id": row["question_id"], "answers": [f"truth {row['question_id']}"]} for row in questions]
    _commit(run, "questions", None, questions, schemas.QUESTIONS)
    _commit(run, "references", None, references, schemas.REFERENCES)
    quarantine = [
        {"source": "pool.jsonl", "row": row, "reason": reason, "content": "{}"}
        for row, reason in enumerate(["empty", "duplicate: of row 1", "duplicate: of row 2"])
    ]
    run.write_table("quarantine.parquet", pa.Table.from_pylist(quarantine, schemas.QUARANTINE))
    return run


def _knowledge(num: int = NUM) -> list[dict[str, Any]]:
    # Multiples of 5 (exposure 0) are unknown.
    return [
        {
            "question_id": f"q{index:03d}",
            "split": SPLIT[index % 3],
            "p_unknown": 0.9 if index % 5 == 0 else 0.1,
            "logit": 2.2 if index % 5 == 0 else -2.2,
            "score": 0.5,
            "pca_0": float(index),
            "pca_1": -float(index),
        }
        for index in range(num)
    ]


def _campaign(path: Path) -> RunDirectory:
    """One round, and the measurement after it."""
    run = _begin(path)
    chosen = _ids("candidate")[:4]
    samples = [
        {
            "question_id": question_id,
            "purpose": "rehearsal",
            "sample_index": number,
            "answer": answer,
            "logprob": -1.0,
            "num_tokens": 2,
            "num_prompt_tokens": 9,
            "finish_reason": "stop",
        }
        for question_id in chosen[:2]
        for number, answer in enumerate(["Tarn", "Tarn", "Mill"])
    ]
    _commit(run, "observe", 0, samples, schemas.SAMPLES, cost={"tokens_generated": 12.0, "seconds": 99.0})
    _commit(run, "cluster", 0, _clusters(0), schemas.CLUSTERS, {"accuracy": 0.4, "accuracy_ci": (0.2, 0.6)})
    labels = [
        {"question_id": name, "probe_split": "train", "semantic_entropy": 0.1 * number, "unknown": number >= 8}
        for number, name in enumerate(_ids("seed"))
    ]
    _commit(run, "label", 0, labels, schemas.LABELS, metrics={"threshold": 0.8, "unknown_fraction": 0.5})
    _commit(run, "probe", 0, None, metrics={"layer": 2, "auroc": 0.9, "auroc_ci": [0.8, 1.0], "by_layer": []})
    _commit(run, "knowledge", 0, _knowledge(), schemas.KNOWLEDGE, {"unknown_fraction": 0.2})
    selection = [
        {"question_id": question_id, "rank": rank, "score": 1.0 - rank, "strategy": "probe"}
        for rank, question_id in reversed(list(enumerate(chosen)))
    ]
    _commit(run, "select", 0, selection, schemas.SELECTION, {"strategy": "probe", "num_selected": 4})
    annotations = [
        {
            "question_id": question_id,
            "question": "?",
            "answers": [f"bought {question_id}"],
            "annotator": "reference",
            "annotated_at": 0,
            "prompt_sha256": None,
            "cost": 0.5,
        }
        for question_id in chosen
    ]
    _commit(run, "annotate", 0, annotations, schemas.ANNOTATIONS, {"num_annotated": 4}, {"annotations": 4, "money": 2})
    _commit(run, "cluster", 1, _clusters(1), schemas.CLUSTERS, {"accuracy": 0.9, "accuracy_ci": [0.8, 1.0]})
    return run


def test_collect_reads_what_a_campaign_committed(tmp_path: Path) -> None:
    data = collect(_campaign(tmp_path / "by-hand"))
    assert data.problems == []
    assert (data.name, data.model, data.seed, data.status) == ("by-hand", "invented/model", 7, "running")
    assert (data.num_candidates, data.num_eval, data.num_annotated) == (20, 20, 4)
    assert [data.annotated_before(index) for index in (0, 1)] == [0, 4]
    assert data.rounds[0].entropy == pytest.approx(np.arange(20) * 0.1)
    assert data.quarantine_counts == {"duplicate": 2, "empty": 1}
    assert data.versions["python"]


def test_stage_seconds_are_wall_clock_and_not_the_sum_over_workers(tmp_path: Path) -> None:
    data = collect(_campaign(tmp_path))
    assert data.rounds[0].stage("observe").cost == {"tokens_generated": 12.0, "seconds": 2.0}


def test_transitions_compare_each_round_with_the_base(tmp_path: Path) -> None:
    data = collect(_campaign(tmp_path))
    now = data.rounds[1].transitions
    assert now is not None
    assert (now.kept, now.forgotten, now.learned, now.still_wrong) == (6, 2, 12, 0)
    assert now.forgetting == 0.25
    assert [row.question for row in data.worsened] == ["Question 2?", "Question 5?"]
    first = data.improved[0]
    assert (first.before, first.after) == ("answer 8 of round 0", "answer 8 of round 1")
    assert first.reference == "truth q026"


def test_selected_examples_come_in_rank_order_with_samples_and_the_bought_answer(tmp_path: Path) -> None:
    selected = collect(_campaign(tmp_path)).rounds[0].selected
    assert [row.rank for row in selected] == [0, 1, 2, 3]
    assert selected[0].question == "Question 1?"
    assert selected[0].sampled == [("Tarn", 2), ("Mill", 1)]
    assert selected[0].bought == "bought q001"
    assert selected[3].sampled == []


def test_confident_mistakes_are_wrong_where_the_probe_says_known(tmp_path: Path) -> None:
    data = collect(_campaign(tmp_path))
    assert data.confident_mistakes_round == 0
    assert data.confident_mistakes
    unknown = {f"Question {index}?" for index in range(0, NUM, 5)}
    known_to_base = {f"Question {index}?" for index in range(2, 26, 3)}
    assert not {row.question for row in data.confident_mistakes} & (unknown | known_to_base)


def test_metadata_columns_are_grouped_binned_or_left_out(tmp_path: Path) -> None:
    groups = collect(_campaign(tmp_path)).rounds[0].groups
    by_column: dict[str, list[Any]] = {}
    for share in groups:
        by_column.setdefault(share.column, []).append(share)
    assert NUM > MAX_VALUES
    assert set(by_column) == {"exposure", "popularity", "group"}
    exposure = by_column["exposure"]
    assert [(share.value, share.num_questions, share.num_unknown) for share in exposure] == [
        ("0", 12, 12),
        ("1", 12, 0),
        ("2", 12, 0),
        ("3", 12, 0),
        ("4", 12, 0),
    ]
    assert exposure[0].mean_p_unknown == pytest.approx(0.9)
    assert len(by_column["popularity"]) == NUM_BINS
    assert sum(share.num_questions for share in by_column["popularity"]) == NUM


def test_points_of_a_large_pool_are_sampled(tmp_path: Path) -> None:
    run = _begin(tmp_path)
    _commit(run, "knowledge", 0, _knowledge(3 * MAX_POINTS), schemas.KNOWLEDGE)
    first, second = collect(run).rounds[0].points, collect(run).rounds[0].points
    assert first is not None
    assert second is not None
    assert first.pca.shape == (MAX_POINTS, 2)
    assert first.questions == second.questions


def test_write_report_writes_page_and_summary_and_keeps_the_status(tmp_path: Path) -> None:
    run = _campaign(tmp_path)
    written = write_report(run, "complete")
    assert json.loads((tmp_path / "summary.json").read_text()) == written
    assert (tmp_path / written["report"]).read_text().startswith("<!doctype html>")
    assert write_report(run)["status"] == "complete"


def test_a_run_without_any_stage_gives_a_page(tmp_path: Path) -> None:
    assert write_report(RunDirectory(tmp_path / "empty"))["rounds"] == []


def test_a_damaged_shard_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = _campaign(tmp_path)
    (tmp_path / "round-000" / "knowledge" / "part-00000.parquet").write_bytes(b"damaged")
    (tmp_path / "round-000" / "probe" / "manifest.json").write_text("{")
    data = collect(run)
    assert len(data.problems) == 2
    assert any("part-00000.parquet" in problem for problem in data.problems)
    assert data.rounds[0].points is None
    assert len(data.worsened) == 2
    write_report(run)
    assert "part-00000.parquet" in (tmp_path / "report.html").read_text()


def test_a_config_that_is_no_yaml_is_named_and_shown_as_it_is(tmp_path: Path) -> None:
    run = _campaign(tmp_path)
    run.write_text("config.yaml", "a: [")
    data = collect(run)
    assert data.config_yaml == "a: ["
    assert data.name == tmp_path.name
    assert len(data.problems) == 1
