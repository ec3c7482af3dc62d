"""Estimates what the model knows from entropies and hidden states: labels, probe, feedback, knowledge map."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import expit

from engine import build
from engine.execution.jobs import ShardInput
from engine.execution.shard_run import run_host
from engine.execution.sharing import shared_equivalence
from engine.stages.judging import answered_wrongly, count_revealed, own_doubts, second_axis
from engine.stages.kind import Outcome, Room, Work, declare
from engine.stages.tables import (
    Read,
    among,
    annotated_ids,
    by_id,
    eval_grades,
    facts_asked,
    layers_of,
    load_stage_probe,
    make_table,
    num_rows,
    states_of,
)
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.evaluation.statistics import auroc_with_ci
from ka2l.knowledge.evidence import combine, filled
from ka2l.knowledge.labels import label_questions, split_seed_questions
from ka2l.knowledge.probe import Probe, fit_probe
from ka2l.knowledge.wrongness import QUADRANTS
from ka2l.schemas import KNOWLEDGE, LABELS, stored_next_token, stored_states
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


@declare("probing")
def label(campaign: Campaign, round_index: int) -> Work:
    """Known or unknown for each seed question, from its semantic entropy."""
    questions, clusters = campaign.stage("questions"), campaign.stage("cluster", round_index)

    def work(stage: Stage) -> Outcome:
        group_of = by_id(questions.table(["question_id", "group"], pc.field("split") == "seed"), "group")
        drawn = clusters.table(["question_id", "semantic_entropy", "disagreement"], pc.field("purpose") == "probe")
        entropy_of, disagreement_of = by_id(drawn, "semantic_entropy"), by_id(drawn, "disagreement")
        ids = sorted(question_id for question_id in group_of if question_id in entropy_of)
        entropies = np.array([entropy_of[question_id] for question_id in ids])
        splits = split_seed_questions(
            ids, [group_of[question_id] for question_id in ids], campaign.config.labels, campaign.config.seed
        )
        labels = label_questions(ids, entropies, splits)
        columns = {
            "question_id": ids,
            "probe_split": splits,
            "semantic_entropy": entropies,
            "unknown": labels.unknown,
            "disagreement": [disagreement_of[question_id] for question_id in ids],
        }
        write_shard(stage.url, shard_name(0), make_table(columns, LABELS), {})
        return {
            "threshold": labels.threshold,
            "unknown_fraction": float(labels.unknown.mean()),
            "num_questions": len(ids),
            "num_rejected": len(group_of) - len(ids),
        }, {}

    return Work(campaign.config.labels.result_fields(), [questions, clusters], work)


@declare("probing")
def probe(campaign: Campaign, round_index: int) -> Work:
    """Fit the probe on the seed questions' states; choose the layer."""
    config = campaign.config
    labels, extracted = campaign.stage("label", round_index), campaign.stage("extract", round_index)

    def work(stage: Stage) -> Outcome:
        rows = labels.table().to_pylist()
        ids, states, next_token = states_of(extracted, [row["question_id"] for row in rows])
        row_of = {row["question_id"]: row for row in rows}
        fitted = fit_probe(
            states,
            np.array([row_of[question_id]["unknown"] for question_id in ids]),
            [row_of[question_id]["probe_split"] for question_id in ids],
            layers_of(extracted),
            config.probe,
            row_seed(config.seed, round_index, "probe", ""),
            targets=np.array([row_of[question_id]["disagreement"] for question_id in ids], dtype=np.float64),
            next_token=next_token,
        )
        with tempfile.TemporaryDirectory() as folder:
            fitted.save(folder)
            for file in sorted(Path(folder).iterdir()):
                stage.write_file(file.name, file.read_bytes())
        auroc = fitted.metrics["auroc"]
        shown = "not defined" if auroc is None else f"{auroc:.3f}"
        campaign.events.say(f"{stage.label:<22} layer {fitted.layer}, AUROC {shown} for unknown")
        return fitted.metrics, {}

    return Work(config.probe.result_fields(), [labels, extracted], work)


@declare(
    "probing",
    room=lambda config: Room(1.0, config.equivalence.gpus),
    needed=lambda config, round_index: config.has_feedback(round_index),
    closes=True,
)
def feedback(campaign: Campaign, round_index: int) -> Work:
    """How sure is the base model of the candidates it was sampled on, and was it right about those annotated since?

    The answers are there, drawn for rehearsal: in round 0 they are grouped by meaning, later only graded.
    """
    answers = [campaign.stage("annotate", index) for index in range(round_index)]
    questions, own = campaign.stage("questions"), campaign.stage("observe", 0)
    grouped = round_index > 0 and campaign.config.has_feedback(round_index - 1)
    source = ("clusters", campaign.stage("feedback", round_index - 1)) if grouped else ("samples", own)
    config = campaign.config.equivalence

    def work(stage: Stage) -> Outcome:
        revealed = {
            row["question_id"]: row["answers"]
            for source in answers
            for row in source.table(["question_id", "answers"]).to_pylist()
        }
        inputs = {"questions": ShardInput(questions.url, ["question_id", "question"])}
        with shared_equivalence(campaign, stage) as (shared, cpus, gpus):
            run_host(
                campaign,
                stage,
                partial(build.feedback_host, config, shared, revealed),
                inputs | {source[0]: ShardInput(source[1].url)},
                replicas=1,
                cpus=cpus,
                gpus=gpus,
            )
        return {
            "num_sampled": num_rows(stage),
            "num_annotated": len(revealed),
            "revealed": count_revealed(stage),
        }, {}

    return Work(config.result_fields(), [questions, source[1], *answers], work)


@declare("probing")
def knowledge(campaign: Campaign, round_index: int) -> Work:
    """The knowledge map: P(unknown) of every question now, the evidence over all states so far, and where annotation
    says that the base model is wrong."""
    questions = campaign.stage("questions")
    extracted, probed = campaign.stage("extract", round_index), campaign.stage("probe", round_index)
    base = campaign.stage("extract", 0)
    earlier = [campaign.stage("knowledge", index) for index in range(1, round_index)]
    graded = [campaign.stage("feedback", round_index)] if campaign.config.has_feedback(round_index) else []
    first = [campaign.stage("label", 0), base, campaign.stage("probe", 0), *earlier] if round_index else []
    first += graded
    num_own = campaign.config.tuning.num_own_answers

    def doubts(ids: list[str], logits: np.ndarray, sampled: Mapping[str, float | None]) -> np.ndarray | None:
        return filled(own_doubts(sampled, ids), logits, num_own) if graded and num_own > 1 else None

    def work(stage: Stage) -> Outcome:
        fitted = load_stage_probe(campaign, probed)
        informed = _probe_with_feedback(campaign, graded[0], round_index) if round_index else fitted
        second = second_axis(campaign, graded[0], round_index) if round_index else None
        finished = stage.finished_shards()
        layers, base_layers = layers_of(extracted), layers_of(base)
        for name in extracted.shard_names():
            if name in finished:
                continue
            table = read_shard(extracted.url, name)
            states = stored_states(table, len(layers))
            logits = fitted.predict_logit(states, stored_next_token(table))
            ids = table["question_id"].to_pylist()
            sampled: Mapping[str, float | None] = {}
            if graded:
                sampled = by_id(read_shard(graded[0].url, name, ["question_id", "disagreement"]), "disagreement")
            base_logits, later = logits, []
            p_wrong: Any = pa.nulls(table.num_rows)
            quadrant: Any = p_wrong
            if round_index:
                before = (read_shard(old.url, name, ["question_id", "logit"]) for old in earlier)
                later = [*(_aligned(old, ids) for old in before), logits]
                rows = read_shard(base.url, name)
                chosen = stored_states(rows, len(base_layers))[:, [base_layers.index(informed.layer)]]
                read = Read(rows["question_id"].to_pylist(), chosen, stored_next_token(rows))
                then = dict(zip(read.ids, informed.predict_logit(chosen, read.next_token), strict=True))
                base_logits = np.array([then.get(question_id, 0.0) for question_id in ids])
                judged = second(read, sampled) if second else {}
                p_wrong = [judged[question_id].p_wrong if question_id in judged else None for question_id in ids]
                quadrant = [judged[question_id].quadrant if question_id in judged else None for question_id in ids]
            components = fitted.pca(states)
            columns = {
                "question_id": table["question_id"],
                "split": table["split"],
                "p_wrong": p_wrong,
                "quadrant": quadrant,
                "p_unknown": expit(logits),
                "logit": logits,
                "score": combine(base_logits, later, doubts(ids, base_logits, sampled)),
                "pca_0": components[:, 0],
                "pca_1": components[:, 1],
            }
            write_shard(stage.url, name, make_table(columns, KNOWLEDGE), {})
        return _knowledge_metrics(campaign, stage, round_index), {}

    answers = [campaign.stage("annotate", index) for index in range(round_index)]
    inputs = [questions, extracted, probed, campaign.stage("cluster", round_index), *answers, *first]
    return Work(campaign.config.probe.result_fields(), inputs, work)


def _aligned(table: pa.Table, ids: Sequence[str]) -> np.ndarray:
    found = by_id(table, "logit")
    return np.array([found.get(question_id, 0.0) for question_id in ids])


def _probe_with_feedback(campaign: Campaign, graded: Stage, round_index: int) -> Probe:
    """The base model's probe fitted again, with "answered wrongly" of the annotated questions as further labels.

    They join the training rows alone: layer, early stopping and calibration still rest on the seed questions.
    """
    config = campaign.config
    base = campaign.stage("extract", 0)
    labels = {
        row["question_id"]: (row["unknown"], row["probe_split"], row["disagreement"])
        for row in campaign.stage("label", 0).table().to_pylist()
    }
    wrong = {
        question_id: (is_wrong, "train", float(is_wrong)) for question_id, is_wrong in answered_wrongly(graded).items()
    }
    layer = campaign.stage("probe", 0).require().metrics["layer"]
    ids, states, next_token = states_of(base, [*labels, *wrong], layer)
    known = labels | wrong
    return fit_probe(
        states,
        np.array([known[question_id][0] for question_id in ids]),
        [known[question_id][1] for question_id in ids],
        [layer],
        config.probe,
        row_seed(config.seed, round_index, "feedback", ""),
        targets=np.array([known[question_id][2] for question_id in ids], dtype=np.float64),
        next_token=next_token,
    )


def _knowledge_metrics(campaign: Campaign, stage: Stage, round_index: int) -> dict[str, Any]:
    """How well the score finds eval questions that this state answers wrongly, among facts not annotated yet.

    It is the candidates that are ranked: an eval question is judged by the score of its fact's candidate, and only
    where the pool names no facts, or none in common, by its own.
    """
    bought = annotated_ids(campaign, round_index)
    counts, predicted, scores = _count_shards(stage, bought)
    correct = eval_grades(campaign, round_index)
    fact_of, asks = facts_asked(campaign, correct)
    ranked: dict[str | None, float] = {asks[name]: score for name, score in scores(asks).items()}
    annotated = set(campaign.stage("questions").table(["fact"], among(bought))["fact"].to_pylist()) - {None}
    pairs = [
        (not correct[name], ranked.get(fact_of[name], own))
        for name, own in scores(correct).items()
        if fact_of[name] not in annotated
    ]
    metrics: dict[str, Any] = {
        "num_unannotated": len(pairs),
        "unknown_fraction": counts["likely_unknown"] / counts["candidates"] if counts["candidates"] else None,
    } | predicted
    if pairs:
        wrong, ranks = zip(*pairs, strict=True)
        estimate = auroc_with_ci(
            np.array(wrong), np.array(ranks), row_seed(campaign.config.seed, round_index, "auroc", "")
        )
        metrics |= {"auroc_wrong": estimate.value, "auroc_wrong_ci": [estimate.low, estimate.high]}
    if round_index and counts["candidates"] and not counts["unjudged"]:
        metrics["quadrants"] = {name: counts[name] for name in QUADRANTS}
    return metrics


def _count_shards(
    stage: Stage, bought: Sequence[str]
) -> tuple[dict[str, int], dict[str, float | None], Callable[[Iterable[str]], dict[str, float]]]:
    """Counts of candidates: in all, ``likely_unknown``, of each quadrant without the annotated, ``unjudged``; of those
    that are not annotated ``predicted_unknown``, mean P(unknown) by the evidence over all states, and
    ``predicted_wrong``, mean P(wrong), None where one is not judged; and how to look up scores."""
    counts = dict.fromkeys(["candidates", "likely_unknown", "unjudged", *QUADRANTS], 0)
    names = sorted(stage.finished_shards())
    annotated = pa.array(bought, pa.string())
    num_left, num_judged, sum_unknown, sum_wrong = 0, 0, 0.0, 0.0
    for name in names:
        columns = ["question_id", "p_unknown", "p_wrong", "quadrant", "score"]
        table = read_shard(stage.url, name, columns, pc.field("split") == "candidate")
        counts["candidates"] += table.num_rows
        counts["likely_unknown"] += pc.sum(pc.greater_equal(table["p_unknown"], 0.5)).as_py() or 0
        counts["unjudged"] += table["quadrant"].null_count
        left = table.filter(pc.invert(pc.is_in(table["question_id"], annotated)))
        num_left += left.num_rows
        num_judged += left.num_rows - left["p_wrong"].null_count
        sum_unknown += float(expit(left["score"].to_numpy()).sum())
        sum_wrong += pc.sum(left["p_wrong"]).as_py() or 0.0
        for item in pc.value_counts(left["quadrant"]).to_pylist():
            if item["values"] is not None:
                counts[item["values"]] += item["counts"]

    def scores(ids: Iterable[str]) -> dict[str, float]:
        tables = [read_shard(stage.url, name, ["question_id", "score"], among(ids)) for name in names]
        return by_id(pa.concat_tables(tables), "score")

    predicted = {
        "predicted_unknown": sum_unknown / num_left if num_left else None,
        "predicted_wrong": sum_wrong / num_left if num_left and num_judged == num_left else None,
    }
    return counts, predicted, scores
