"""The section ``evaluation``: what is measured of the answers to eval questions beside accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from ka2l.evaluation.reliability import abstention, reliability
from ka2l.evaluation.statistics import mean_with_ci
from ka2l.evaluation.text_metrics import TextScores, bert_score, meteor, rouge_l
from ka2l.section import Section

TextMetric = Literal["meteor", "rouge_l", "bert_score"]


class EvaluationConfig(Section):
    """What every round measures of the greedy answers to eval questions. By default only what costs nothing."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    text: tuple[TextMetric, ...] = ()
    """Wording against references: ``meteor``, ``rouge_l``, ``bert_score``. Need the extra ``metrics``."""
    encoder: str | None = None
    """``bert_score`` only: directory or hub id of any transformers encoder."""
    encoder_layer: int | None = Field(None, ge=1)
    """``bert_score`` only: layer whose states are compared; null takes the one known to suit the model, or the last."""
    facts: Literal["none", "testbed", "judge"] = "none"
    """Who counts the facts that answers have right, wrong and not at all: ``testbed`` knows the truth of its lives,
    ``judge`` is a language model. Where facts are counted, answers are compared with the base model's by them, too."""
    pairs: Literal["none", "judge"] = "none"
    """``judge``: a language model compares each answer with the base model's, twice with positions swapped."""
    judge: Literal["teacher", "local_teacher"] = "teacher"
    """The judge is what annotator.teacher names: behind an endpoint, or on this run's machines. It shares journal,
    prices and budget.money with annotation."""
    num_judged: int | None = Field(None, ge=1)
    """Eval questions that the judge sees, the same in every round; null for all."""
    num_samples: int = Field(0, ge=0)
    """Answers sampled for every eval question in every round, to see how far they agree: a confidence. 0 for none."""
    device: str = "cpu"
    """``bert_score`` only: torch device of the process that drives the run."""
    batch_size: int = Field(64, ge=1)
    """``bert_score`` only: texts in one forward pass."""

    @model_validator(mode="after")
    def _encoder_is_named(self) -> Self:
        if "bert_score" in self.text and not self.encoder:
            raise ValueError("evaluation.text bert_score needs evaluation.encoder")
        return self

    @property
    def judges(self) -> bool:
        """Whether a language model is asked."""
        return "judge" in (self.facts, self.pairs)


def text_scores(
    config: EvaluationConfig, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[TextMetric, TextScores]:
    """The config's text metrics of some answers.

    Raises:
        ConfigError: a library is missing, or the encoder has no such layer.
        ModelError: the encoder cannot be loaded.
    """
    made: dict[TextMetric, TextScores] = {}
    for name in config.text:
        match name:
            case "meteor":
                made[name] = meteor(answers, references)
            case "rouge_l":
                made[name] = rouge_l(answers, references)
            case "bert_score":
                assert config.encoder is not None
                made[name] = bert_score(
                    answers, references, config.encoder, config.encoder_layer, config.batch_size, config.device
                )
    return made


def text_figures(scores: Mapping[TextMetric, TextScores], seed: int) -> dict[str, Any]:
    """For each metric ``mean`` as ``[value, low, high]`` with a 95 % bootstrap interval, and ``how`` it was made."""
    return {
        name: {"mean": list(mean_with_ci(made.values, seed)), "how": made.how}
        for name, made in scores.items()
        if made.values
    }


class Confidence(NamedTuple):
    """How sure a model was of some answers, and whether they are right."""

    of_right: Sequence[float]
    """Probability that each answer is right, as something claims; shape (n,)."""
    correct: Sequence[bool]


def confidence_figures(confidences: Mapping[str, Confidence]) -> dict[str, Any]:
    """Calibration and abstention of each source of confidence that has rows; see `ka2l.evaluation.reliability`."""
    figures = {}
    for source, (of_right, correct) in confidences.items():
        if len(correct):
            stated, right = np.asarray(of_right, dtype=float), np.asarray(correct, dtype=bool)
            figures[source] = {
                "num_answers": len(right),
                "reliability": reliability(stated, right),
                "abstention": abstention(stated, right),
            }
    return figures


def agreement(semantic_ids: Sequence[int]) -> float:
    """Share of the sampled answers to a question that mean the same as most of them do, from their clusters."""
    return float(np.bincount(semantic_ids).max() / len(semantic_ids))


def evaluation_summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one model state without tables and curves, for ``summary.json``.

    Args:
        metrics: of the stage ``evaluate``.
    """
    confidence = {
        source: {
            "num_answers": made["num_answers"],
            "ece": made["reliability"]["ece"],
            "brier": made["reliability"]["brier"],
            "auroc": made["abstention"]["auroc"],
            "abstention_area": made["abstention"]["area"],
            "abstention_area_at_random": made["abstention"]["area_at_random"],
            "abstention_area_best": made["abstention"]["area_best"],
        }
        for source, made in (metrics.get("confidence") or {}).items()
    }
    kept = {name: metrics.get(name) for name in ("num_eval", "text", "facts", "aspects", "judge")}
    return kept | {"confidence": confidence}
