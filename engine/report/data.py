"""The values of a report, and ``summary.json``, which is made from them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.forecast.prices import PricesConfig
from ka2l.evaluation.config import evaluation_summary
from ka2l.schemas import SCHEMA_VERSION

if TYPE_CHECKING:
    from engine.config import RunConfig

#: What a stage can cost, and the heading of its column in the report's cost tables, in their order.
COST_ITEMS = {
    "seconds": "time",
    "cpu_seconds": "CPU time",
    "gpu_seconds": "GPU time",
    "tokens_prompt": "prompt tokens",
    "tokens_generated": "generated tokens",
    "tokens_trained": "trained tokens",
    "forward_passes": "forward passes",
    "annotations": "annotations",
    "money": "money",
}


@dataclass(frozen=True)
class StageReport:
    """A committed stage: the numbers of its manifest."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    def number(self, name: str) -> float | None:
        """A metric as a finite number, or None."""
        return finite(self.metrics.get(name))

    def interval(self, name: str) -> tuple[float, float] | None:
        """A metric of the form [low, high], or None."""
        value = self.metrics.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            return None
        low, high = finite(value[0]), finite(value[1])
        return None if low is None or high is None else (low, high)


@dataclass(frozen=True)
class StatePoints:
    """A sample of the pool in the plane of the first two principal components."""

    pca: NDArray[np.float32]
    """Shape (num_points, 2)."""
    p_unknown: NDArray[np.float32]
    """Shape (num_points,)."""
    questions: list[str]


@dataclass(frozen=True)
class GroupShare:
    """How much is unknown among the questions with one value of one metadata column."""

    column: str
    value: str
    num_questions: int
    num_unknown: int
    """Questions with P(unknown) >= 0.5."""
    mean_p_unknown: float


@dataclass(frozen=True)
class SelectedExample:
    """A question that was selected, what the model said and what the annotator answered."""

    rank: int
    question: str
    score: float | None
    sampled: list[tuple[str, int]] = field(default_factory=list)
    """Distinct answers of the model with their counts, most frequent first; empty where it was not sampled."""
    bought: str | None = None


@dataclass(frozen=True)
class DecodedExample:
    """A decoded question that was annotated, the unknown questions it comes from and what the annotator answered."""

    question: str
    variant: str
    parents: list[str]
    p_unknown: float | None
    bought: str | None = None


@dataclass(frozen=True)
class AnswerChange:
    """An eval question of which the grade changed between the base and the last state."""

    question: str
    before: str
    after: str
    reference: str


@dataclass(frozen=True)
class ConfidentMistake:
    """An eval question that the probe calls known and the model answers wrongly."""

    question: str
    answer: str
    reference: str
    p_unknown: float


@dataclass(frozen=True)
class Transitions:
    """Eval questions by their grade under the base and under a later state."""

    kept: int
    forgotten: int
    learned: int
    still_wrong: int

    @property
    def forgetting(self) -> float | None:
        """Share of what the base answered right that is answered wrongly now."""
        base_right = self.kept + self.forgotten
        return self.forgotten / base_right if base_right else None


@dataclass
class RoundReport:
    """One round; every part may be missing."""

    round: int
    stages: dict[str, StageReport] = field(default_factory=dict)
    entropy: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """Semantic entropy of the seed questions, nats."""
    points: StatePoints | None = None
    groups: list[GroupShare] = field(default_factory=list)
    transitions: Transitions | None = None
    selected: list[SelectedExample] = field(default_factory=list)
    decoded: list[DecodedExample] = field(default_factory=list)
    answer_tokens: dict[str, int] = field(default_factory=dict)
    """Generated tokens by what the answers are for (schemas.PURPOSES); empty where not known."""

    @property
    def decodes(self) -> bool:
        """Whether questions were decoded in this round."""
        return "decode" in self.stages

    @property
    def graded(self) -> bool:
        """Whether annotations have shown by this round where the base model was right."""
        return any((self.stage("feedback").metrics.get("revealed") or {}).values())

    @property
    def evaluated(self) -> bool:
        """Whether more than accuracy was measured of this round's state."""
        return bool(self.stage("evaluate").number("num_eval"))

    def stage(self, name: str) -> StageReport:
        """A stage's numbers; empty where the stage is not committed."""
        return self.stages.get(name, StageReport())

    def cost(self, item: str) -> float:
        """What the round cost in one item of COST_ITEMS."""
        return sum(finite(stage.cost.get(item)) or 0.0 for stage in self.stages.values())


@dataclass
class ReportData:
    """All that a report shows. Only ``name`` is needed; what is missing is said to be missing."""

    name: str
    status: str = "running"
    """running | paused | complete | failed."""
    reason: str | None = None
    """Why the run stopped or pauses, where that is not simply its end."""
    model: str = ""
    command: str = "run"
    """run | probe: what made it, as in ``ka2l run``."""
    location: str = ""
    config_yaml: str = ""
    """The run's config, secrets masked by the caller."""
    seed: int | None = None
    num_candidates: int | None = None
    """Candidate questions of the pool, annotated or not."""
    num_eval: int | None = None
    num_seed: int | None = None
    config: RunConfig | None = None
    """The config as values; None where it is not one of this version."""
    prices: PricesConfig = field(default_factory=PricesConfig)
    baselines: list[ReportData] = field(default_factory=list)
    """Other runs of the same model and pool, without what is read from tables."""
    aspects: dict[str, Any] = field(default_factory=dict)
    """Of a baseline: how the run's last state does against its last state, by aspect (answer_facts.win_rates)."""
    pool_stages: dict[str, StageReport] = field(default_factory=dict)
    rounds: list[RoundReport] = field(default_factory=list)
    improved: list[AnswerChange] = field(default_factory=list)
    """Wrong under the base, right under the last state; a few of ``transitions.learned``."""
    worsened: list[AnswerChange] = field(default_factory=list)
    confident_mistakes: list[ConfidentMistake] = field(default_factory=list)
    confident_mistakes_round: int | None = None
    quarantine_counts: dict[str, int] = field(default_factory=dict)
    quarantine_examples: list[tuple[str, str, int | None, str]] = field(default_factory=list)
    """(reason, source, row, content): the first rows of each reason."""
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    problems: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""

    def annotated_before(self, round_index: int) -> int:
        """Annotations that the model state of a round was tuned on."""
        earlier = (item.stage("annotate").number("num_annotated") for item in self.rounds if item.round < round_index)
        return sum(int(count or 0) for count in earlier)

    @property
    def num_annotated(self) -> int:
        """Annotations made in all rounds."""
        return self.annotated_before(10**9)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of all committed stages."""
        pool = sum(finite(stage.cost.get("seconds")) or 0.0 for stage in self.pool_stages.values())
        return pool + sum(item.cost("seconds") for item in self.rounds)

    def measured(self) -> list[RoundReport]:
        """Rounds with a measured accuracy."""
        return [item for item in self.rounds if item.stage("cluster").number("accuracy") is not None]

    def probed(self) -> list[RoundReport]:
        """Rounds with a fitted probe."""
        return [item for item in self.rounds if item.stage("probe").number("auroc") is not None]


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else (a missing metric, NaN, a text)."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


def forgetting(item: RoundReport) -> float | None:
    """Share of what the base answered right that this round's state answers wrongly; None where not measured."""
    return item.transitions.forgetting if item.transitions else item.stage("cluster").number("forgotten")


def unknown_fraction(item: RoundReport) -> float | None:
    """Share of unknown questions: of the candidates where the probe judged them, else of the seed questions."""
    candidates = item.stage("knowledge").number("unknown_fraction")
    return item.stage("label").number("unknown_fraction") if candidates is None else candidates


def summary(data: ReportData) -> dict[str, Any]:
    """The content of ``summary.json``: JSON-safe, missing numbers are null.

    Args:
        data: the run. ``num_annotated`` of a round counts the annotations its model state was tuned on, so a line
            through (num_annotated, accuracy) is the learning curve. ``cost.annotation`` counts the annotations bought
            in the round itself.
    """
    rounds = []
    for item in data.rounds:
        cluster, probe, knowledge = item.stage("cluster"), item.stage("probe"), item.stage("knowledge")
        layer = probe.number("layer")
        rounds.append(
            {
                "round": item.round,
                "num_annotated": data.annotated_before(item.round),
                "num_candidates": data.num_candidates,
                "accuracy": cluster.number("accuracy"),
                "accuracy_ci": _list(cluster.interval("accuracy_ci")),
                "forgetting": forgetting(item),
                "probe": {
                    "layer": None if layer is None else int(layer),
                    "auroc": probe.number("auroc"),
                    "auroc_ci": _list(probe.interval("auroc_ci")),
                    "auroc_wrong": knowledge.number("auroc_wrong"),
                    "auroc_wrong_ci": _list(knowledge.interval("auroc_wrong_ci")),
                },
                "unknown_fraction": unknown_fraction(item),
                "decoded": _decoded(item),
                "evaluation": evaluation_summary(item.stage("evaluate").metrics) if item.evaluated else None,
                "quadrants": {
                    "revealed": item.stage("feedback").metrics["revealed"],
                    "left": knowledge.metrics.get("quadrants"),
                }
                if item.graded
                else None,
                "cost": {
                    "annotation": int(item.cost("annotations")),
                    "money": item.cost("money"),
                    "tokens_generated": int(item.cost("tokens_generated")),
                    "seconds": item.cost("seconds"),
                    "cpu_seconds": item.cost("cpu_seconds"),
                    "gpu_seconds": item.cost("gpu_seconds"),
                },
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "name": data.name,
        "status": data.status,
        "reason": data.reason,
        "model": data.model,
        "num_annotated": data.num_annotated,
        "num_candidates": data.num_candidates,
        "rounds": rounds,
        "total_seconds": data.total_seconds,
        "report": "report.html",
    }


def _decoded(item: RoundReport) -> dict[str, Any] | None:
    """What the decoder gave this round; None where there is none."""
    if not item.decodes:
        return None
    decode, decoder = item.stage("decode"), item.stage("decoder")
    return {
        "num_drafts": decode.metrics.get("num_drafts"),
        "num_kept": decode.metrics.get("num_kept"),
        "passed": decode.number("passed"),
        "gates": decode.metrics.get("gates"),
        "exact_match": decoder.number("exact_match"),
        "token_f1": decoder.number("token_f1"),
        "accuracy_in_pool": item.stage("cluster").number("accuracy_in_pool"),
        "accuracy_outside": item.stage("cluster").number("accuracy_outside"),
    }


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
