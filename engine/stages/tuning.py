"""Tunes the next adapter on the annotated answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.tuner import run_canary, run_training, write_rows
from actors.workers.ray_task import Workers
from engine.stages.kind import Outcome, Room, Work, declare
from engine.stages.tables import adapter_input, among, by_id, first_questions
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.model.adapter import MERGED, is_adapter
from ka2l.model.canary import check_canary
from ka2l.model.loading import load_tokenizer
from ka2l.prompts import Prompter
from ka2l.schemas import HELD_OUT, TrainingRow
from ka2l.seeds import row_seed
from ka2l.tuning.dpo import comparison_rows
from ka2l.tuning.knowtuning import FINE_GRAINED
from ka2l.tuning.sft import rehearsal_draw, rows_per_pass, training_rows

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.execution.campaign import Campaign

_CANARY_PROMPTS = 8
#: Questions that are rehearsed at most, unless training takes more; how many were sampled is for the config to say.
_MOST_REHEARSED = 50_000
#: Seed questions were sampled for the probe: their answers rehearse at no further cost.
_OWN_ANSWERS = pc.field("purpose").isin(["probe", "rehearsal"])


def training_room(config: RunConfig) -> Room:
    """What the training workers hold."""
    tuning = config.tuning
    return Room(tuning.workers * tuning.cpus_per_worker, tuning.workers * tuning.gpus_per_worker)


@declare(
    "tuning",
    room=training_room,
    grows_with=lambda config: "annotations" if config.tuning.max_steps is None else "questions",
)
def tune(campaign: Campaign, round_index: int) -> Work:
    """Train the next adapter on all annotations so far and on the base model's own answers to the rest.

    With KnowTuning this is its stage I: the hardest facts of each annotated answer are trained on, too.
    """
    config = campaign.config
    answers = [campaign.stage("annotate", index) for index in range(round_index + 1)]
    finer = [campaign.stage("augment", index) for index in range(round_index + 1)] if config.tuning.augments else []
    own = campaign.stage("observe", 0)
    previous = adapter_input(campaign, round_index) if config.tuning.start == "previous" else []

    def work(stage: Stage) -> Outcome:
        with campaign.run.scratch() as scratch:
            prompter = Prompter(load_tokenizer(campaign.model), config.prompt)
            rows = _training_rows(campaign, answers, finer, own, prompter)
            write_rows(rows, str(scratch / "rows.jsonl"))
            start = campaign.trained_dir(previous[0]) if previous else None
            metrics = _train(campaign, stage, prompter, scratch, start)
        sources = {row.question_id: row.source for row in rows}
        kinds = ("annotation", *([FINE_GRAINED] if finer else []), "rehearsal")
        counts = {f"num_{kind}": list(sources.values()).count(kind) for kind in kinds}
        return metrics | counts, {"tokens_trained": float(metrics["num_tokens"])}

    tuning = config.tuning.result_fields()
    return Work({"tuning": tuning, "prompt": config.prompt.result_fields()}, [*answers, *finer, own, *previous], work)


@declare(
    "tuning",
    room=training_room,
    needed=lambda config, round_index: bool(config.tuning.compares),
    grows_with=lambda config: "annotations",
)
def compare(campaign: Campaign, round_index: int) -> Work:
    """Stage II of KnowTuning: from stage I's adapter on, prefer whole, true and ordered answers to others."""
    config = campaign.config
    stage_one = campaign.stage("tune", round_index)
    augmented = [campaign.stage("augment", index) for index in range(round_index + 1)]

    def work(stage: Stage) -> Outcome:
        with campaign.run.scratch() as scratch:
            prompter = Prompter(load_tokenizer(campaign.model), config.prompt)
            pairs = [
                (row["question_id"], row["part"], prompter.text(row["question"]), row["better"], row["worse"])
                for source in augmented
                for row in source.table(None, pc.field("part") != FINE_GRAINED).to_pylist()
            ]
            rows = comparison_rows(pairs, config.tuning.knowtuning, config.seed, chat=prompter.is_chat)
            write_rows(rows, str(scratch / "rows.jsonl"))
            metrics = _train(campaign, stage, prompter, scratch, campaign.trained_dir(stage_one), compared=True)
        counts = {f"num_{aspect}": len([1 for pair in pairs if pair[1] == aspect]) for aspect in config.tuning.compares}
        return metrics | counts, {"tokens_trained": float(metrics["num_tokens"])}

    tuning = config.tuning.result_fields()
    return Work({"tuning": tuning, "prompt": config.prompt.result_fields()}, [stage_one, *augmented], work)


def _training_rows(
    campaign: Campaign, answers: Sequence[Stage], finer: Sequence[Stage], own: Stage, prompter: Prompter
) -> list[TrainingRow]:
    annotated = [
        (row["question_id"], prompter.text(row["question"]), row["answers"][0])
        for stage in answers
        for row in stage.table(["question_id", "question", "answers"]).to_pylist()
    ]
    # A question of its own beside the one whose answer's hardest facts it asks for.
    hardest = [
        (f"{row['question_id']}#{FINE_GRAINED}", prompter.text(row["question"]), row["better"])
        for stage in finer
        for row in stage.table(None, pc.field("part") == FINE_GRAINED).to_pylist()
    ]
    samples: dict[str, list[str]] = {}
    if campaign.config.tuning.rehearsal > 0:
        wanted = _OWN_ANSWERS
        if (few := _drawn_to_rehearse(campaign, own, len(annotated) + len(hardest))) is not None:
            wanted = wanted & pc.field("question_id").isin(few)
        drawn = own.table(["question_id", "sample_index", "answer"], wanted)
        for row in drawn.sort_by([("question_id", "ascending"), ("sample_index", "ascending")]).to_pylist():
            samples.setdefault(row["question_id"], []).append(row["answer"])
    text_of = by_id(campaign.stage("questions").table(["question_id", "question"], among(samples)), "question")
    rehearsal = [(name, prompter.text(text_of[name]), kept) for name, kept in samples.items()]
    rows = training_rows(
        annotated + hardest, rehearsal, campaign.config.tuning, campaign.config.seed, chat=prompter.is_chat
    )
    finer_ids = {question_id for question_id, _, _ in hardest}
    return [
        row._replace(source=FINE_GRAINED) if row.question_id in finer_ids and row.source != HELD_OUT else row
        for row in rows
    ]


def _drawn_to_rehearse(campaign: Campaign, own: Stage, num_annotated: int) -> pa.Array | None:
    """Ids of the questions to rehearse where more were sampled than any training turns to; None where all are."""
    config = campaign.config.tuning
    needed = rows_per_pass(config, num_annotated, 2**62) - num_annotated if num_annotated else 0
    most = max(_MOST_REHEARSED, math.ceil(config.num_epochs) * needed)
    columns = ["question_id"]
    shards = own.shard_names()
    sampled = [pc.count_distinct(read_shard(own.url, name, columns, _OWN_ANSWERS)["question_id"]) for name in shards]
    if sum(count.as_py() for count in sampled) <= most:
        return None
    # Whatever the shards: those with the lowest hash, which also decides who is rehearsed at all.
    best_ids, best = pa.array([], pa.string()), np.zeros(0, np.int64)
    for name in shards:
        ids = pc.unique(read_shard(own.url, name, columns, _OWN_ANSWERS)["question_id"])
        draws = [rehearsal_draw(question_id, campaign.config.seed) for question_id in ids.to_pylist()]
        best_ids, best = pa.concat_arrays([best_ids, ids]), np.concatenate([best, np.array(draws, np.int64)])
        if len(best) > most:
            rows = np.flatnonzero(best <= np.partition(best, most - 1)[most - 1])
            best_ids, best = best_ids.take(pa.array(rows)), best[rows]
    return best_ids


def _train(
    campaign: Campaign,
    stage: Stage,
    prompter: Prompter,
    scratch: Path,
    start: str | None,
    *,
    compared: bool = False,
) -> dict[str, Any]:
    """Train on ``rows.jsonl`` in ``scratch``, from what ``start`` holds on, and keep what came of it if it does
    anything: ``adapter``, and ``model`` where a whole one is what samplers load.

    Returns:
        The training's metrics and what its canary found.
    """
    config = campaign.config
    tuning = config.tuning
    output = scratch / "adapter"
    with (
        campaign.events.progress(stage.label, 1, "steps") as progress,
        campaign.hold(tuning.workers, tuning.cpus_per_worker, tuning.gpus_per_worker, reserve=False),
    ):

        def on_progress(report: dict[str, Any]) -> None:
            if "step" in report:
                progress.resize(report["num_steps"])
                progress.advance(report["step"] - progress.done, f"loss {report['loss']:.3f}")
                campaign.events.emit("training_step", round=stage.round_index, stage=stage.name, **report)
                campaign.trackers.log_step(stage, report)

        metrics = run_training(
            model_path=campaign.model.source,
            rows_path=str(scratch / "rows.jsonl"),
            config=config.tuning,
            output_dir=str(output),
            seed=row_seed(config.seed, stage.round_index or 0, stage.name, ""),
            scratch_dir=str(scratch / "train"),
            previous_adapter=start,
            trust_remote_code=campaign.model.trust_remote_code,
            log_path=campaign.log_path(stage),
            on_progress=on_progress,
            compared=compared,
            chat=prompter.is_chat,
            faults=config.faults,
            tags=campaign.tags(stage),
            checkpoints=stage.checkpoints(),
        )
        progress.advance(metrics["num_steps"] - progress.done, f"loss {metrics['last_loss']:.3f}")
    canary = _canary(campaign, output, prompter, campaign.log_path(stage))
    served = "adapter" if is_adapter(str(output)) else "model"
    _keep(stage, output, served)
    if (output / MERGED).is_dir():
        served = "model"
        _keep(stage, output / MERGED, served)
    stage.write_file(f"{served}/canary.json", json.dumps(canary).encode())
    return metrics | {"canary": {key: canary[key] for key in ("max_logit_difference", "num_changed_tokens")}}


def _keep(stage: Stage, folder: Path, name: str) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            stage.add_file(f"{name}/{file.name}", file)


def _canary(campaign: Campaign, adapter: Path, prompter: Prompter, log: str) -> dict[str, Any]:
    """PEFT's side of the canary; the next observation checks the serving engine against it."""
    config = campaign.config
    prompts = [prompter.text(question) for question in first_questions(campaign.stage("questions"), _CANARY_PROMPTS)]
    gpus = min(1.0, config.tuning.gpus_per_worker)
    arguments = {
        "model_path": campaign.model.source,
        "adapter_dir": str(adapter),
        "prompts": prompts,
        "max_tokens": min(16, config.sampler.max_tokens),
        "dtype": "bfloat16" if gpus and campaign.model.dtype in ("auto", "bfloat16") else "float32",
        "device": "cuda" if gpus else "cpu",
        "trust_remote_code": campaign.model.trust_remote_code,
        "chat": prompter.is_chat,
    }
    cpus = config.tuning.cpus_per_worker
    with campaign.hold(1, cpus, gpus) as placement:
        result = run_canary(arguments, Workers("tuning", 1, cpus, gpus, config.faults, placement), log)
    check_canary(result)
    return result
