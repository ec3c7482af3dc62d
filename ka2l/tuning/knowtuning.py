"""KnowTuning: finer facts first, then comparison (Lyu et al. 2024, arXiv 2402.11176).

Stage I trains on the annotated answers and on what is hardest in them: the facts with the highest perplexity, asked for
by a question of their own. Stage II prefers, by DPO, an answer put together from all its facts to one that lacks some
(completeness), has them wrong (factuality) or tells them in no order (logicality). This module turns annotated answers
into both training sets; `ka2l.tuning.sft` and `ka2l.tuning.dpo` train on them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from ka2l.section import Section
from ka2l.seeds import row_seed
from ka2l.teacher.structured import Refused
from ka2l.tuning.knowledge_writer import Extract, KnowledgeWriter, Rephrase, Revise, Rewrite, Task

Aspect = Literal["completeness", "factuality", "logicality"]

#: What stage II compares, in the paper's order: its KCC, KFC and KLC.
ASPECTS: tuple[Aspect, ...] = ("completeness", "factuality", "logicality")
#: The part of a pair that stage I trains on.
FINE_GRAINED = "fine_grained"


class KnowTuningConfig(Section):
    """What `tuning.kind: knowtuning` makes of annotated answers; defaults are the paper's."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"micro_batch_size"})

    writer: Literal["teacher", "local_teacher", "testbed"] = "teacher"
    """Who extracts, rewrites, revises and rephrases: ``teacher`` and ``local_teacher`` ask what annotator.teacher
    names; ``testbed`` does it exactly, for the testbed's lives."""
    augment: bool = True
    """Stage I trains on the hardest facts, too; off is the paper's -KA."""
    hard_share: float = Field(0.5, gt=0.0, le=1.0)
    """Share of an answer's facts, those with the highest perplexity, that are asked for on their own (alpha)."""
    perplexity_given: Literal["nothing", "question"] = "nothing"
    """What a fact's perplexity is conditioned on: the paper takes the fact by itself; ``question`` puts the question's
    prompt before it, which suits models that have learnt facts as answers."""
    aspects: tuple[Aspect, ...] = ASPECTS
    """What stage II compares; without completeness it is the paper's -KCC, without factuality -KFC, without logicality
    -KLC, and an empty list leaves stage II out: -KC."""
    delete_share: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of the facts that an incomplete answer lacks (beta)."""
    sft_weight: float = Field(0.2, ge=0.0)
    """Weight of the supervised loss on the better answer beside the DPO loss (gamma)."""
    dpo_beta: float = Field(0.1, gt=0.0)
    """How dearly DPO lets the model leave its reference, the stage-I model."""
    num_epochs: float = Field(1.0, gt=0.0)
    """Passes of stage II over its comparisons."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Peak learning rate of stage II."""
    batch_size: int = Field(16, ge=1)
    """Comparisons an optimiser step, over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Comparisons a forward pass on one worker; the rest of the batch is accumulated. Default: the whole batch."""


class KnownFacts(NamedTuple):
    """An annotated answer in its atomic facts."""

    question_id: str
    question: str
    answer: str
    facts: list[str]
    perplexities: list[float]
    """Of each fact under the current model."""


class Pair(NamedTuple):
    """One row to train on (schemas.PAIRS)."""

    question_id: str
    part: str
    """FINE_GRAINED or an aspect."""
    question: str
    better: str
    worse: str | None
    """None for FINE_GRAINED, which compares nothing."""


class Augmented(NamedTuple):
    """What came of a batch of answers."""

    pairs: list[Pair]
    refusals: list[tuple[str, str, str]]
    """(question id, part, reason) of every pair that could not be made."""


def hardest(perplexities: Sequence[float], share: float) -> list[int]:
    """Positions of the ``ceil(share * n)`` facts with the highest perplexity, in their order; ties go to the first."""
    count = math.ceil(share * len(perplexities))
    ranked = sorted(range(len(perplexities)), key=lambda index: (-perplexities[index], index))
    return sorted(ranked[:count])


def incomplete(facts: Sequence[str], share: float, seed: int) -> list[str]:
    """The facts without a random ``share`` of them: at least one is deleted and at least one is left."""
    num_deleted = min(max(1, round(share * len(facts))), len(facts) - 1)
    deleted = set(random.Random(seed).sample(range(len(facts)), num_deleted))
    return [fact for index, fact in enumerate(facts) if index not in deleted]


def disordered(facts: Sequence[str], seed: int) -> list[str]:
    """The facts in a random order that is not theirs."""
    order = list(facts)
    draw = random.Random(seed)
    while order == list(facts):
        draw.shuffle(order)
    return order


def parts_of(config: KnowTuningConfig, num_facts: int) -> list[str]:
    """The pairs that can be made of an answer: a single fact can be wrong, but not incomplete and in no order."""
    single = ("factuality",)
    aspects = [aspect for aspect in ASPECTS if aspect in config.aspects and (num_facts > 1 or aspect in single)]
    return ([FINE_GRAINED] if config.augment else []) + (aspects if num_facts else [])


def augment(answers: Sequence[KnownFacts], config: KnowTuningConfig, writer: KnowledgeWriter, seed: int) -> Augmented:
    """All pairs of a batch of answers; what the writer refuses is told and left out.

    The writer is asked twice: what the facts are revised into has to be known before it is rephrased.

    Args:
        answers: with one perplexity a fact.
        seed: the run's; which facts are deleted and how they are shuffled follows from it and the question id.
    """
    parts = {answer.question_id: parts_of(config, len(answer.facts)) for answer in answers}
    tasks: dict[str, Task] = {}
    for answer in answers:
        for key, task in _first_tasks(answer, parts[answer.question_id], config, seed).items():
            tasks[f"{answer.question_id}/{key}"] = task
    written = dict(writer.write(tasks))
    tasks = {}
    for answer in answers:
        revised = written.get(f"{answer.question_id}/revise")
        if isinstance(revised, list):
            tasks[f"{answer.question_id}/factuality"] = Rephrase(answer.question, revised)
    written |= writer.write(tasks)
    pairs: list[Pair] = []
    refusals: list[tuple[str, str, str]] = []
    for answer in answers:
        for part in parts[answer.question_id]:
            made = _pair(answer, part, written)
            if isinstance(made, Pair):
                pairs.append(made)
            elif made is not None:
                refusals.append((answer.question_id, part, made.reason))
    return Augmented(pairs, refusals)


def _first_tasks(answer: KnownFacts, parts: Sequence[str], config: KnowTuningConfig, seed: int) -> dict[str, Task]:
    """Everything that can be asked for at once."""

    def draw(part: str) -> int:
        return row_seed(seed, 0, f"knowtuning.{part}", answer.question_id)

    tasks: dict[str, Task] = {}
    if FINE_GRAINED in parts:
        hard = [answer.facts[index] for index in hardest(answer.perplexities, config.hard_share)]
        tasks[FINE_GRAINED] = Rewrite(answer.question, hard)
    if set(parts) - {FINE_GRAINED}:
        tasks["better"] = Rephrase(answer.question, answer.facts)
    if "completeness" in parts:
        left = incomplete(answer.facts, config.delete_share, draw("completeness"))
        tasks["completeness"] = Rephrase(answer.question, left)
    if "logicality" in parts:
        tasks["logicality"] = Rephrase(answer.question, disordered(answer.facts, draw("logicality")))
    if "factuality" in parts:
        tasks["revise"] = Revise(answer.question, answer.facts)
    return tasks


def _pair(answer: KnownFacts, part: str, written: Mapping[str, Any]) -> Pair | Refused | None:
    """The pair of a part, why there is none, or None where it was not asked for to the end."""

    def of(key: str) -> Any:
        return written.get(f"{answer.question_id}/{key}")

    if part == FINE_GRAINED:
        made = of(FINE_GRAINED)
        if made is None or isinstance(made, Refused):
            return made
        return Pair(answer.question_id, part, made[0], made[1], None)
    better, worse = of("better"), of(part)
    if part == "factuality" and isinstance(of("revise"), Refused):
        worse = of("revise")
    for made in (better, worse):
        if made is None or isinstance(made, Refused):
            return made
    if better.split() == worse.split():
        return Refused("the worse answer is the better one")
    return Pair(answer.question_id, part, answer.question, better, worse)


def extract_facts(
    answers: Mapping[str, tuple[str, str]], writer: KnowledgeWriter
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Atomic facts of answers, and why there are none.

    Args:
        answers: question id -> (question, answer).

    Returns:
        (question id -> facts, question id -> reason). Answers that were not asked about to the end are in neither.
    """
    written = writer.write({name: Extract(question, answer) for name, (question, answer) in answers.items()})
    facts = {name: made for name, made in written.items() if isinstance(made, list)}
    return facts, {name: made.reason for name, made in written.items() if isinstance(made, Refused)}


def count_refusals(refusals: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """How many pairs were refused for each ``part: reason``, the most frequent first."""
    return dict(Counter(f"{part}: {reason}" for _, part, reason in refusals).most_common(10))
