"""The second axis: where is the base model sure and wrong, as annotation has shown so far?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from scipy.special import logit

from engine.artifacts import Stage, read_shard
from engine.campaign import Campaign
from engine.stages.tables import among, by_id, load_stage_probe, states_of
from ka2l.correctness import QUADRANTS, fit_correctness, quadrants
from ka2l.evidence import combine
from ka2l.seeds import row_seed


class Judged(NamedTuple):
    """Where a question stands on both axes, under the base model."""

    p_wrong: float
    quadrant: str
    """One of correctness.QUADRANTS."""


#: (ids, states of the base model at its probe's layer, shape (N, D), disagreement of own answers by id) -> by id.
Judge = Callable[[Sequence[str], np.ndarray, Mapping[str, float | None]], dict[str, Judged]]


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

    def evidence(ids: Sequence[str], states: np.ndarray, sampled: Mapping[str, float | None]) -> np.ndarray:
        return combine(fitted.predict_logit(states), own_doubt=own_doubts(sampled, ids))

    ids, states = states_of(base, list(wrong), fitted.layer)
    drawn = graded.table(["question_id", "disagreement"], among(ids))
    head = fit_correctness(
        states[:, 0],
        evidence(ids, states[:, 0], by_id(drawn, "disagreement")),
        np.array([wrong[question_id] for question_id in ids]),
        row_seed(campaign.config.seed, round_index, "correctness", ""),
    )

    def judge(ids: Sequence[str], states: np.ndarray, sampled: Mapping[str, float | None]) -> dict[str, Judged]:
        doubts = evidence(ids, states, sampled)
        p_wrong = head.predict(states, doubts)
        return dict(zip(ids, map(Judged, p_wrong.tolist(), quadrants(doubts, p_wrong)), strict=True))

    return judge


def count_revealed(stage: Stage) -> dict[str, int]:
    """What annotation has shown of the base model: annotated questions by how sure it was and whether it was right.

    Sure means that its likeliest answer is at least as likely as all others together.
    """
    counts = dict.fromkeys(QUADRANTS, 0)
    for name in sorted(stage.finished_shards()):
        table = read_shard(stage.url, name, ["question_id", "disagreement", "correct"])
        table = table.filter(pc.is_valid(table["correct"]))
        own = own_doubts(by_id(table, "disagreement"), table["question_id"].to_pylist())
        wrong = ~np.array(table["correct"].to_pylist(), dtype=bool)
        for quadrant in quadrants(np.nan_to_num(own, nan=1.0), wrong.astype(float)):
            counts[quadrant] += 1
    return counts


def own_doubts(disagreement: Mapping[str, float | None], ids: Sequence[str]) -> np.ndarray:
    """The base model's own doubt about each question, log-odds, from the disagreement of its sampled answers by id.
    Shape (num_questions,); NaN where it was not sampled."""
    found = (disagreement.get(name) for name in ids)
    return np.asarray(logit([np.nan if value is None else value for value in found]), dtype=np.float64)
