"""Reads a run directory into what its report shows. Files only: no cluster, no model, no lock.

A part of the run that is missing is left out; one that cannot be read is named in ``ReportData.problems``.
Tables the size of the pool are read shard by shard, and only what the report shows of them is kept.
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from engine.execution.jobs import FAILED
from engine.report.data import (
    AnswerChange,
    ConfidentMistake,
    DecodedExample,
    ReportData,
    SelectedExample,
    StatePoints,
    Transitions,
)
from engine.report.metadata import MetadataColumns
from engine.report.reader import UNREADABLE, Reader, Sample
from engine.report.stages import collect_stages
from engine.stages import round_folders
from engine.store.run_directory import RunDirectory
from ka2l.schemas import SPLITS

MAX_POINTS = 2_000
MAX_POINTS_ALL_ROUNDS = 6_000
NUM_EXAMPLES = 10
CONFIDENT = 0.3
"""An eval question with a smaller P(unknown) that is answered wrongly is a confident mistake."""


class _Grade(NamedTuple):
    correct: bool | None
    answer: str


def collect(run: RunDirectory, status: str | None = None, reason: str | None = None) -> ReportData:
    """Read what a run has committed so far.

    Args:
        run: the run directory; a folder without any stage is a run that has just begun.
        status: running | paused | complete | failed; None takes it from an earlier ``summary.json``, else running.
        reason: why it stopped or pauses; with ``status`` None taken from an earlier ``summary.json``, too.
    """
    reader = Reader(run)
    data = collect_stages(reader, status, reason)
    _read_tables(reader, data)
    _read_quarantine(reader, data)
    _read_failures(reader, data)
    return data


# -- tables ------------------------------------------------------------------------------------------------------------


class _Judged(NamedTuple):
    """What is kept of one round's knowledge table."""

    sample: pa.Table
    p_unknown_eval: dict[str, float]


def _read_tables(reader: Reader, data: ReportData) -> None:
    metadata = _read_pool(reader, data)
    grades = {item.round: _grades(reader, item.round) for item in data.rounds}
    for item in data.rounds:
        item.entropy = _seed_entropies(reader, item.round)
        if grades[0] and grades[item.round]:
            item.transitions = _transitions(grades[0], grades[item.round])
    judged = _read_knowledge(reader, data, metadata)
    selected = {item.round: _first_selected(reader, item.round) for item in data.rounds}

    improved, worsened = _changed(grades)
    last_judged = max(judged, default=None)
    mistakes = [] if last_judged is None else _confident(grades[last_judged], judged[last_judged].p_unknown_eval)
    compared = {*improved, *worsened, *mistakes}
    decoded = {item.round: _first_decoded(reader, item.round) for item in data.rounds}
    wanted = compared | {row["question_id"] for rows in selected.values() for row in rows}
    wanted |= {parent for rows in decoded.values() for row in rows for parent in row["parents"]}
    for table, _ in judged.values():
        wanted.update(table["question_id"].to_pylist())
    questions = {
        row["question_id"]: row["question"]
        for row in reader.rows("questions", None, ["question_id", "question"], wanted)
    }
    truth = {
        row["question_id"]: row["answers"][0]
        for row in reader.rows("references", None, ["question_id", "answers"], compared)
        if row["answers"]
    }

    for item in data.rounds:
        item.selected = _selected_examples(reader, item.round, selected[item.round], questions)
        item.decoded = _decoded_examples(reader, item.round, decoded[item.round], questions)
        if item.round in judged:
            item.points = _points(judged[item.round].sample, questions)
    if improved or worsened:
        base, last = grades[0], [graded for graded in grades.values() if graded][-1]
        for ids, changes in ((improved, data.improved), (worsened, data.worsened)):
            changes += [
                AnswerChange(questions.get(key, key), base[key].answer, last[key].answer, truth.get(key, ""))
                for key in ids
            ]
    if last_judged is not None:
        data.confident_mistakes_round = last_judged
        answers, p_unknown = grades[last_judged], judged[last_judged].p_unknown_eval
        data.confident_mistakes = [
            ConfidentMistake(questions.get(key, key), answers[key].answer, truth.get(key, ""), p_unknown[key])
            for key in mistakes
        ]


def _read_pool(reader: Reader, data: ReportData) -> MetadataColumns:
    metadata = MetadataColumns()
    splits: Counter[str] = Counter()
    for table in reader.shards("questions", None, ["question_id", "split", "group", "metadata"]):
        splits.update({item["values"]: item["counts"] for item in pc.value_counts(table["split"]).to_pylist()})
        metadata.add(table)
    if splits:
        data.num_seed, data.num_candidates, data.num_eval = (splits[split] for split in SPLITS)
    return metadata


def _read_knowledge(reader: Reader, data: ReportData, metadata: MetadataColumns) -> dict[int, _Judged]:
    """By round, for the rounds that judged the pool; sets their shares by metadata on the way."""
    rounds = [item for item in data.rounds if "knowledge" in item.stages]
    found: dict[int, _Judged] = {}
    shown: pa.Array | None = None
    for item in rounds:
        sample = Sample(reader, item.round, min(MAX_POINTS, MAX_POINTS_ALL_ROUNDS // len(rounds)), shown)
        shares = metadata.shares()
        p_unknown: dict[str, float] = {}
        columns = ["question_id", "split", "p_unknown", "pca_0", "pca_1"]
        # Without columns to group by, the pool stays unread.
        pool = reader.shards("questions", None, ["question_id", "group", "metadata"]) if metadata.names else iter(())
        for table, questions in zip_longest(reader.shards("knowledge", item.round, columns), pool):
            if table is None:
                break
            if questions is not None:
                shares.add(questions, table["question_id"], table["p_unknown"].to_numpy())
            scored = table.filter(pc.equal(table["split"], "eval"))
            p_unknown |= zip(scored["question_id"].to_pylist(), scored["p_unknown"].to_pylist(), strict=True)
            sample.add(table)
        if sample.num_seen:
            item.groups = shares.found()
            found[item.round] = _Judged(sample.table(), p_unknown)
            shown = sample.ids() if shown is None else shown
    return found


def _seed_entropies(reader: Reader, index: int) -> NDArray[np.float32]:
    """Semantic entropies of the seed questions, shape (num_seed,); empty before they are labelled."""
    table = reader.table("label", index, ["semantic_entropy"])
    return np.zeros(0, np.float32) if table is None else table["semantic_entropy"].to_numpy().astype(np.float32)


def _grades(reader: Reader, index: int) -> dict[str, _Grade]:
    """Grade and greedy answer of each eval question."""
    return {
        row["question_id"]: _Grade(row["correct"], row["top_answer"] or "")
        for table in reader.shards("cluster", index, ["question_id", "purpose", "top_answer", "correct"])
        for row in table.filter(pc.equal(table["purpose"], "eval")).to_pylist()
    }


def _transitions(base: dict[str, _Grade], now: dict[str, _Grade]) -> Transitions:
    counts: Counter[tuple[bool, bool]] = Counter()
    for question_id, grade in now.items():
        before = base.get(question_id)
        if before is not None and before.correct is not None and grade.correct is not None:
            counts[before.correct, grade.correct] += 1
    return Transitions(
        kept=counts[True, True],
        forgotten=counts[True, False],
        learned=counts[False, True],
        still_wrong=counts[False, False],
    )


def _changed(grades: dict[int, dict[str, _Grade]]) -> tuple[list[str], list[str]]:
    """Ids of the first eval questions that went wrong to right and right to wrong since the base."""
    measured = [index for index, graded in grades.items() if graded]
    if len(measured) < 2 or measured[0] != 0:
        return [], []
    base, last = grades[0], grades[measured[-1]]
    both = sorted(base.keys() & last.keys())
    improved = [key for key in both if base[key].correct is False and last[key].correct is True]
    worsened = [key for key in both if base[key].correct is True and last[key].correct is False]
    return improved[:NUM_EXAMPLES], worsened[:NUM_EXAMPLES]


def _confident(grades: dict[str, _Grade], p_unknown: dict[str, float]) -> list[str]:
    wrong = [key for key, grade in grades.items() if grade.correct is False and p_unknown.get(key, 1.0) < CONFIDENT]
    return sorted(wrong, key=lambda key: (p_unknown[key], key))[:NUM_EXAMPLES]


def _points(table: pa.Table, questions: dict[str, str]) -> StatePoints | None:
    if not table.num_rows:
        return None
    pca = np.column_stack([table["pca_0"].to_numpy(), table["pca_1"].to_numpy()]).astype(np.float32)
    texts = [questions.get(question_id, question_id) for question_id in table["question_id"].to_pylist()]
    return StatePoints(pca, table["p_unknown"].to_numpy().astype(np.float32), texts)


def _first_selected(reader: Reader, index: int) -> list[dict[str, Any]]:
    table = reader.table("select", index, ["question_id", "rank", "score"])
    return [] if table is None else table.sort_by("rank").slice(0, NUM_EXAMPLES).to_pylist()


def _first_decoded(reader: Reader, index: int) -> list[dict[str, Any]]:
    table = reader.table("decode", index, ["question_id", "question", "parents", "variant", "gate", "p_unknown"])
    return [] if table is None else table.filter(pc.equal(table["gate"], "kept")).slice(0, NUM_EXAMPLES).to_pylist()


def _bought(reader: Reader, index: int, ids: list[str]) -> dict[str, str]:
    """The preferred answers that a round's annotations gave to these questions."""
    annotations = reader.rows("annotate", index, ["question_id", "answers"], ids)
    return {row["question_id"]: row["answers"][0] for row in annotations if row["answers"]}


def _decoded_examples(
    reader: Reader, index: int, rows: list[dict[str, Any]], questions: dict[str, str]
) -> list[DecodedExample]:
    bought = _bought(reader, index, [row["question_id"] for row in rows])
    return [
        DecodedExample(
            question=row["question"],
            variant=row["variant"],
            parents=[questions.get(parent, parent) for parent in row["parents"]],
            p_unknown=row["p_unknown"],
            bought=bought.get(row["question_id"]),
        )
        for row in rows
    ]


def _selected_examples(
    reader: Reader, index: int, rows: list[dict[str, Any]], questions: dict[str, str]
) -> list[SelectedExample]:
    ids = [row["question_id"] for row in rows]
    sampled: dict[str, Counter[str]] = {key: Counter() for key in ids}
    for row in reader.rows("observe", index, ["question_id", "purpose", "answer"], ids):
        if row["purpose"] != "eval":
            sampled[row["question_id"]][row["answer"]] += 1
    bought = _bought(reader, index, ids)
    return [
        SelectedExample(
            rank=row["rank"],
            question=questions.get(row["question_id"], row["question_id"]),
            score=row["score"],
            sampled=sampled[row["question_id"]].most_common(6),
            bought=bought.get(row["question_id"]),
        )
        for row in rows
    ]


def _read_quarantine(reader: Reader, data: ReportData) -> None:
    reasons: Counter[str] = Counter()
    examples: list[tuple[str, str, int | None, str]] = []
    path = f"{reader.run.path}/quarantine.parquet"
    try:
        if reader.run.fs.get_file_info(path).type == pafs.FileType.NotFound:
            return
        with pq.ParquetFile(path, filesystem=reader.run.fs) as file:
            for batch in file.iter_batches(4096, columns=["source", "row", "reason", "content"]):
                for row in batch.to_pylist():
                    kind = row["reason"].split(":", 1)[0].strip()
                    reasons[kind] += 1
                    if reasons[kind] <= 3:
                        examples.append((row["reason"], row["source"], row["row"], row["content"][:400]))
    except UNREADABLE as error:
        reader.note("quarantine.parquet", error)
        return
    data.quarantine_counts = dict(reasons.most_common())
    order = {reason: position for position, reason in enumerate(data.quarantine_counts)}
    examples.sort(key=lambda example: order[example[0].split(":", 1)[0].strip()])
    data.quarantine_examples = examples


def _read_failures(reader: Reader, data: ReportData) -> None:
    """Questions that broke a stage's work on them, beside the rows that never became questions."""
    for name, index in ((name, item.round) for item in data.rounds for name in round_folders()):
        manifest, stage = reader.manifest(name, index), reader.stage(name, index)
        if manifest is None or not manifest.cost.get(FAILED):
            continue
        try:
            failures = stage.failures()
        except UNREADABLE as error:
            reader.note(stage.label, error)
            continue
        kind = f"failed in {stage.label}"
        data.quarantine_counts[kind] = len(failures)
        for failure in failures[:3]:
            data.quarantine_examples.append((f"{kind}: {failure.reason}", stage.label, None, failure.question_id))
