"""The second axis: where is the base model sure and wrong, as annotation has shown so far?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from engine.artifacts import Stage, read_shard
from engine.campaign import Campaign
from engine.stages.tables import among, by_id, load_stage_probe, states_of
from ka2l.correctness import QUADRANTS, fit_correctness, quadrants
from ka2l.evidence import combine, doubt
from ka2l.seeds import row_seed


class Judged(NamedTuple):
    """Where a question stands on both axes, under the base model."""

    p_wrong: float
    quadrant: str
    """One of correctness.QUADRANTS."""


#: (ids, states of the base model at its probe's layer, shape (N, D), clusters of own answers by id) -> by id.
Judge = Callable[[Sequence[str], np.ndarray, Mapping[str, Sequence[int]]], dict[str, Judged]]


def answered_wrongly(graded: Stage) -> dict[str, bool]:
    """Whether the base model's own answer was wrong, of the annotated questions that it was sampled on."""
    table = graded.table(["question_id", "correct"], pc.field("correct").is_valid())
    return {name: not correct for name, correct in by_id(table, "correct").items()}


def second_axis(campaign: Campaign, graded: Stage, round_index: int) -> Judge | None:
    """Judges questions by a correctness head that is fitted on what has been annotated; None where no annotated
    question has an answer of the base model to grade.

    Both axes are the base model's: later states have been told the answers of the annotated questions.
    """
    base, probed = campaign.stage("extract", 0), campaign.stage("probe", 0)
    wrong = answered_wrongly(graded)
    if not wrong:
        return None
    fitted = load_stage_probe(campaign, probed)

    def evidence(ids: Sequence[str], states: np.ndarray, semantic_ids: Mapping[str, Sequence[int]]) -> np.ndarray:
        return combine(fitted.predict_logit(states), own_doubt=own_doubts(semantic_ids, ids))

    ids, states = states_of(base, list(wrong), fitted.layer)
    sampled = graded.table(["question_id", "semantic_ids"], among(ids))
    head = fit_correctness(
        states[:, 0],
        evidence(ids, states[:, 0], by_id(sampled, "semantic_ids")),
        np.array([wrong[question_id] for question_id in ids]),
        row_seed(campaign.config.seed, round_index, "correctness", ""),
    )

    def judge(ids: Sequence[str], states: np.ndarray, semantic_ids: Mapping[str, Sequence[int]]) -> dict[str, Judged]:
        doubts = evidence(ids, states, semantic_ids)
        p_wrong = head.predict(states, doubts)
        return dict(zip(ids, map(Judged, p_wrong.tolist(), quadrants(doubts, p_wrong)), strict=True))

    return judge


def count_revealed(stage: Stage) -> dict[str, int]:
    """What annotation has shown of the base model: annotated questions by how sure it was and whether it was right.

    Sure means that at least half of its sampled answers say the same.
    """
    counts = dict.fromkeys(QUADRANTS, 0)
    for name in sorted(stage.finished_shards()):
        table = read_shard(stage.url, name, ["question_id", "semantic_ids", "correct"])
        table = table.filter(pc.is_valid(table["correct"]))
        own = own_doubts(by_id(table, "semantic_ids"), table["question_id"].to_pylist())
        wrong = ~np.array(table["correct"].to_pylist(), dtype=bool)
        for quadrant in quadrants(np.nan_to_num(own, nan=1.0), wrong.astype(float)):
            counts[quadrant] += 1
    return counts


def own_doubts(semantic_ids: Mapping[str, Sequence[int]], ids: Sequence[str]) -> np.ndarray:
    """The base model's own doubt about each question, from the clusters of its sampled answers. Shape (num_questions,);
    NaN where it was not sampled."""
    num_agreeing, num_answers = np.zeros(len(ids), int), np.zeros(len(ids), int)
    for row, name in enumerate(ids):
        if (clusters := semantic_ids.get(name)) is not None:
            num_agreeing[row], num_answers[row] = np.bincount(clusters).max(), len(clusters)
    return doubt(num_agreeing, num_answers)
