"""Measures a model state: sampled answers, clusters of meaning, hidden states, perplexities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.sampler import ObservePlan
from engine import build
from engine.execution.jobs import ShardInput
from engine.execution.shard_run import run_host
from engine.execution.sharing import shared_equivalence
from engine.stages.kind import Outcome, Room, Work, declare, replicas
from engine.stages.tables import adapter_input, by_id, eval_grades, facts_asked, num_rows
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.evaluation.statistics import forgetting, proportion_with_ci

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


@declare(
    "sampling",
    room=lambda config: replicas(config.sampler),
    measures=True,
    closes=True,
    answers=("probe", "eval", "rehearsal", "agreement"),
    grows_with=lambda config: "samples",
)
def observe(campaign: Campaign, round_index: int) -> Work:
    """Sample answers from this round's model state: one engine session for all purposes."""
    config = campaign.config
    rehearsal = round_index == 0 and config.rounds > 0
    plan = ObservePlan(
        run_seed=config.seed,
        round_index=round_index,
        num_rehearsal=config.tuning.num_own_answers if rehearsal else 0,
        rehearsal_share=config.tuning.rehearsal,
        rehearsal_greedy=config.tuning.rehearsal_labels == "greedy",
        # The last observation only measures: nothing is selected after it.
        probe_candidates=config.selection.samples_candidates and round_index < config.rounds,
        num_agreement=config.evaluation.num_samples,
    )
    state = campaign.state(round_index)
    canary = state.canary() if round_index else None
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        run_host(
            campaign,
            stage,
            partial(build.sampler_host, state.model, config.prompt, config.sampler, plan, state.adapter, canary),
            {"questions": ShardInput(questions.url)},
            replicas=config.sampler.replicas,
            cpus=config.sampler.cpus_per_replica,
            gpus=config.sampler.gpus_per_replica,
        )
        return {"num_samples": num_rows(stage), "canary_agrees": None if canary is None else True}, {}

    fields = {
        "sampler": config.sampler.result_fields(),
        "prompt": config.prompt.result_fields(),
        "plan": plan._asdict() | {"run_seed": None},
    }
    return Work(fields, [questions, *adapter_input(campaign, round_index)], work)


@declare(
    "sampling",
    room=lambda config: Room(1.0, config.equivalence.gpus),
    measures=True,
    closes=True,
    answers=("probe", "eval", "agreement"),
)
def cluster(campaign: Campaign, round_index: int) -> Work:
    """Group the sampled answers by meaning and grade the greedy answers of the eval questions."""
    config = campaign.config
    questions, references = campaign.stage("questions"), campaign.stage("references")
    observed = campaign.stage("observe", round_index)

    def work(stage: Stage) -> Outcome:
        with shared_equivalence(campaign, stage) as (shared, cpus, gpus):
            run_host(
                campaign,
                stage,
                partial(build.scorer_host, config.equivalence, shared, config.sampler.stop_early),
                {
                    "questions": ShardInput(questions.url, ["question_id", "question", "split"]),
                    "samples": ShardInput(observed.url),
                    "references": ShardInput(references.url, eval_only=True),
                },
                replicas=1,
                cpus=cpus,
                gpus=gpus,
            )
        return _cluster_metrics(campaign, stage, round_index), {}

    return Work(config.equivalence.result_fields(), [questions, references, observed], work)


def _cluster_metrics(campaign: Campaign, stage: Stage, round_index: int) -> dict[str, Any]:
    names = sorted(stage.finished_shards())
    graded, probed = (
        pa.concat_tables([read_shard(stage.url, name, columns, pc.field("purpose") == purpose) for name in names])
        for purpose, columns in (("eval", None), ("probe", ["semantic_entropy"]))
    )
    metrics: dict[str, Any] = {"num_eval": graded.num_rows, "num_probed": probed.num_rows}
    if probed.num_rows:
        metrics["mean_semantic_entropy"] = pc.mean(probed["semantic_entropy"]).as_py()
    if graded.num_rows:
        correct = by_id(graded, "correct")
        accuracy = proportion_with_ci(np.array(list(correct.values()), dtype=bool))
        metrics |= {"accuracy": accuracy.value, "accuracy_ci": [accuracy.low, accuracy.high]}
        metrics |= _by_place(campaign, correct)
        metrics["exact_match"] = pc.mean(graded["exact_match"].cast(pa.float32())).as_py()
        metrics["token_f1"] = pc.mean(graded["token_f1"]).as_py()
        if round_index > 0:
            before = eval_grades(campaign, 0)
            ids = [name for name in correct if name in before]
            metrics |= forgetting([before[name] for name in ids], [correct[name] for name in ids])
    return metrics


def _by_place(campaign: Campaign, correct: dict[str, bool]) -> dict[str, Any]:
    """Accuracy on eval questions about facts that the pool's candidates ask for, and about others, of which only a
    decoded question can ask. Empty where the pool names no facts, or has none of one sort."""
    fact_of, asking = facts_asked(campaign, correct)
    asked = set(asking.values())
    inside = [grade for name, grade in correct.items() if fact_of[name] in asked]
    outside = [grade for name, grade in correct.items() if fact_of[name] is not None and fact_of[name] not in asked]
    if not inside or not outside:
        return {}
    return {
        "accuracy_in_pool": sum(inside) / len(inside),
        "accuracy_outside": sum(outside) / len(outside),
        "num_outside": len(outside),
    }


def _read_questions(campaign: Campaign, stage: Stage, round_index: int, make_host: Callable[..., Any]) -> None:
    """One forward pass over questions with the model state of a round, by the workers of ``extraction``."""
    config, state = campaign.config, campaign.state(round_index)
    run_host(
        campaign,
        stage,
        partial(make_host, state.model, config.prompt, config.extraction, state.adapter),
        {"questions": ShardInput(campaign.stage("questions").url, ["question_id", "question", "split"])},
        replicas=config.extraction.replicas,
        cpus=config.extraction.cpus_per_replica,
        gpus=config.extraction.gpus_per_replica,
    )


@declare("probing", room=lambda config: replicas(config.extraction))
def extract(campaign: Campaign, round_index: int) -> Work:
    """Hidden states of every question under this round's model state: prefill only."""
    config = campaign.config
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        _read_questions(campaign, stage, round_index, build.extractor_host)
        return {"num_questions": num_rows(stage)}, {}

    fields = {"extraction": config.extraction.result_fields(), "prompt": config.prompt.result_fields()}
    return Work(fields, [questions, *adapter_input(campaign, round_index)], work)


@declare(
    "probing",
    room=lambda config: replicas(config.extraction),
    needed=lambda config, round_index: config.selection.kind == "perplexity",
)
def perplexity(campaign: Campaign, round_index: int) -> Work:
    """How hard this round's model state finds the wording of every candidate: one forward pass."""
    config = campaign.config
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        _read_questions(campaign, stage, round_index, build.question_perplexity_host)
        names = sorted(stage.finished_shards())
        found = pa.concat_tables([read_shard(stage.url, name, ["perplexity"]) for name in names])["perplexity"]
        return {"num_questions": len(found), "mean_perplexity": pc.mean(found).as_py()}, {}

    fields = {"prompt": config.prompt.result_fields()}
    return Work(fields, [questions, *adapter_input(campaign, round_index)], work)
