"""The second axis of knowledge: P(sure and wrong), learnt from the annotations so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc
from scipy.special import logit

from engine.stages.tables import Read, among, by_id, load_stage_probe, states_of
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.knowledge.evidence import combine
from ka2l.knowledge.wrongness import QUADRANTS, fit_correctness, quadrants
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


class Judged(NamedTuple):
    """Where a question stands on both axes, under the base model."""

    p_wrong: float
    quadrant: str
    """One of correctness.QUADRANTS."""


#: (what the base model's forward pass told, at its probe's layer; disagreement of own answers by id) -> by id.
Judge = Callable[[Read, Mapping[str, float | None]], dict[str, Judged]]


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

    def evidence(read: Read, sampled: Mapping[str, float | None]) -> np.ndarray:
        logits = fitted.predict_logit(read.states[:, 0], read.next_token)
        return combine(logits, own_doubt=own_doubts(sampled, read.ids))

    read = states_of(base, list(wrong), fitted.layer)
    drawn = graded.table(["question_id", "disagreement"], among(read.ids))
    head = fit_correctness(
        read.states[:, 0],
        evidence(read, by_id(drawn, "disagreement")),
        np.array([wrong[question_id] for question_id in read.ids]),
        row_seed(campaign.config.seed, round_index, "correctness", ""),
    )

    def judge(read: Read, sampled: Mapping[str, float | None]) -> dict[str, Judged]:
        doubts = evidence(read, sampled)
        p_wrong = head.predict(read.states[:, 0], doubts)
        return dict(zip(read.ids, map(Judged, p_wrong.tolist(), quadrants(doubts, p_wrong)), strict=True))

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
