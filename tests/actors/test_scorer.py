from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from actors.scorer import ScorerHost
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.sampling.early_stop import expected_entropy
from ka2l.schemas import CLUSTERS, SAMPLES

QUESTIONS = {
    "seed-1": "Where was Ada born?",
    "seed-2": "Where was Bo born?",
    "eval-1": "Where was Cy born?",
    "eval-2": "Where was Di born?",
    "eval-3": "Where was Ed born?",
    "candidate": "Where was Flo born?",
}
REFERENCES = {"eval-1": ["Lima", "Ciudad de los Reyes"], "eval-2": ["Oslo"], "eval-3": ["Quito"]}


def sample(question_id: str, purpose: str, index: int, answer: str, logprob: float = -1.0, **fields: Any) -> dict:
    row = {
        "question_id": question_id,
        "purpose": purpose,
        "sample_index": index,
        "answer": answer,
        "logprob": logprob,
        "num_tokens": 2,
        "num_prompt_tokens": 9,
        "finish_reason": "stop",
    }
    return row | fields


def cluster(samples: list[dict], **options: Any) -> tuple[dict[tuple[str, str], dict], dict[str, float]]:
    """Rows of ``clusters`` by question and purpose, and the host's stats."""
    eval_answers = [{"question_id": name, "answers": answers} for name, answers in REFERENCES.items()]
    table, stats = ScorerHost(LexicalEquivalence(), **options).process(
        {
            "questions": pa.Table.from_pylist([{"question_id": a, "question": b} for a, b in QUESTIONS.items()]),
            "references": pa.Table.from_pylist(eval_answers),
            "samples": pa.Table.from_pylist(samples, schema=SAMPLES),
        }
    )
    assert table.schema == CLUSTERS
    rows = {(row["question_id"], row["purpose"]): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows, stats


def test_where_drawing_stopped_early_the_entropy_knows_how_likely_the_answers_were() -> None:
    texts = ["Lima", "Oslo", "Rome", "Bonn"]
    few = [sample("seed-1", "probe", i, answer) for i, answer in enumerate(texts)]
    sure = [sample("seed-2", "probe", i, "Lima", logprob=-0.1) for i in range(3)]
    asked = [sample("eval-1", "eval", 0, "Lima")]
    rows, _ = cluster([*few, *sure, *asked], stopped_early=True)
    expected = expected_entropy(range(4), [row["logprob"] for row in few], texts)
    assert rows["seed-1", "probe"]["semantic_entropy"] == pytest.approx(expected)
    assert rows["seed-1", "probe"]["semantic_entropy"] > math.log(4)
    certain = expected_entropy([0] * 3, [-0.1] * 3, ["Lima"] * 3)
    assert rows["seed-2", "probe"]["semantic_entropy"] == pytest.approx(certain)
    assert rows["seed-2", "probe"]["semantic_entropy"] < rows["seed-1", "probe"]["semantic_entropy"]
    assert rows["eval-1", "eval"]["semantic_entropy"] == 0


def test_probe_answers_are_grouped_by_meaning_and_never_graded() -> None:
    answers = ["Lima", "lima.", "Oslo", "Lima"]
    rows, stats = cluster([sample("seed-1", "probe", i, answer, -0.5 * (i + 1)) for i, answer in enumerate(answers)])
    (row,) = rows.values()
    assert row["semantic_ids"] == [0, 0, 1, 0]
    assert row["num_clusters"] == 2
    assert row["semantic_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert row["predictive_entropy"] == pytest.approx((0.5 + 1.0 + 1.5 + 2.0) / 4)
    assert row["top_answer"] == "Lima"
    assert [row[name] for name in ("correct", "exact_match", "token_f1")] == [None] * 3
    # Spelling and what answers have in common are settled before anything is asked.
    assert stats["num_pairs_asked"] < stats["num_pairs_full"]


def test_likelihood_weights_count_a_repeated_answer_once() -> None:
    answers = [("Lima", math.log(0.3)), ("Lima", math.log(0.3)), ("Oslo", math.log(0.1))]
    rows, _ = cluster([sample("seed-1", "probe", i, *answer) for i, answer in enumerate(answers)])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rows["seed-1", "probe"]["weighted_semantic_entropy"] == pytest.approx(expected, rel=1e-5)


def test_one_meaning_has_no_entropy_and_all_different_answers_have_the_most() -> None:
    samples = [sample("seed-1", "probe", i, "Lima") for i in range(3)]
    samples += [sample("seed-2", "probe", i, answer) for i, answer in enumerate(["Lima", "Oslo", "Quito"])]
    rows, _ = cluster(samples)
    assert rows["seed-1", "probe"]["semantic_entropy"] == pytest.approx(0.0)
    assert rows["seed-2", "probe"]["semantic_entropy"] == pytest.approx(math.log(3))


def test_eval_answers_are_graded_against_their_references() -> None:
    rows, _ = cluster(
        [
            sample("eval-1", "eval", 0, "the ciudad de los reyes"),
            sample("eval-2", "eval", 0, "Bergen"),
            sample("eval-3", "eval", 0, "in Quito"),
        ]
    )
    grades = {name: (row["correct"], row["exact_match"], round(row["token_f1"], 3)) for (name, _), row in rows.items()}
    assert grades["eval-1"] == (True, True, 1.0)
    assert grades["eval-2"] == (False, False, 0.0)
    assert grades["eval-3"] == (True, False, 0.667)
    assert rows["eval-2", "eval"]["top_answer"] == "Bergen"


def test_rehearsal_answers_are_no_evidence() -> None:
    kept = [sample("seed-1", "probe", 0, "Lima"), sample("eval-1", "eval", 0, "Lima")]
    rehearsed = [sample("candidate", "rehearsal", i, answer) for i, answer in enumerate(["Oslo", "Quito"])]
    assert set(cluster(kept + rehearsed)[0]) == {("seed-1", "probe"), ("eval-1", "eval")}


def test_a_candidate_may_be_probed_and_rehearsed_at_once() -> None:
    samples = [sample("candidate", "probe", i, "Oslo") for i in range(2)]
    rows, _ = cluster([*samples, sample("candidate", "rehearsal", 0, "Quito")])
    assert rows["candidate", "probe"]["semantic_ids"] == [0, 0]
    assert list(rows) == [("candidate", "probe")]


def test_a_rejected_seed_question_is_left_out_and_a_rejected_eval_question_counts_as_wrong() -> None:
    refused = {"answer": "", "logprob": 0.0, "finish_reason": "rejected"}
    samples = [sample("seed-1", "probe", i, **refused) for i in range(2)]
    rows, _ = cluster([*samples, sample("seed-2", "probe", 0, "Lima"), sample("eval-1", "eval", 0, **refused)])
    assert set(rows) == {("seed-2", "probe"), ("eval-1", "eval")}
    assert rows["eval-1", "eval"]["correct"] is False


def test_a_shard_without_samples_gives_an_empty_table() -> None:
    rows, stats = cluster([])
    assert rows == {}
    assert stats["num_pairs_full"] == 0


def test_groups_that_were_made_before_are_only_graded() -> None:
    """As the feedback stage does from its second time on: what was graded stays, what is newly annotated is graded."""
    samples = [sample("candidate", "rehearsal", i, answer) for i, answer in enumerate(["Oslo", "Oslo", "Quito"])]
    samples += [sample("seed-1", "rehearsal", i, "Lima") for i in range(2)]
    questions = pa.Table.from_pylist([{"question_id": a, "question": b} for a, b in QUESTIONS.items()])
    host = ScorerHost(LexicalEquivalence(), ("rehearsal",), {"seed-1": ["Oslo"]})
    first, stats = host.process({"questions": questions, "samples": pa.Table.from_pylist(samples, schema=SAMPLES)})
    assert stats["num_pairs_full"] > 0
    host = ScorerHost(LexicalEquivalence(), ("rehearsal",), {"seed-1": ["Lima"], "candidate": ["Oslo"]})
    second, stats = host.process({"questions": questions, "clusters": first})
    assert "num_pairs_full" not in stats
    assert second.drop_columns(["correct", "exact_match", "token_f1"]) == first.drop_columns(
        ["correct", "exact_match", "token_f1"]
    )
    assert dict(zip(first["question_id"].to_pylist(), first["correct"].to_pylist(), strict=True)) == {
        "candidate": None,
        "seed-1": False,
    }
    assert dict(zip(second["question_id"].to_pylist(), second["correct"].to_pylist(), strict=True)) == {
        "candidate": True,
        "seed-1": False,
    }
