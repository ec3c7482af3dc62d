"""From answers to the next adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.trainer import run_canary, run_training, write_rows
from engine.artifacts import Stage
from engine.campaign import Campaign, Outcome, commit_stage
from engine.stages.tables import adapter_input, by_id
from ka2l.canary import check_canary
from ka2l.models import load_tokenizer
from ka2l.prompts import Prompter
from ka2l.seeds import row_seed
from ka2l.tuning import training_rows

_CANARY_PROMPTS = 8


def tune(campaign: Campaign, round_index: int) -> None:
    """Train the next adapter on all annotations so far and on the base model's own answers to the rest."""
    config = campaign.config
    answers = [campaign.stage("annotate", index) for index in range(round_index + 1)]
    own = campaign.stage("observe", 0)
    previous = adapter_input(campaign, round_index) if config.tuning.start == "previous" else []

    def work(stage: Stage) -> Outcome:
        log = campaign.log_path(stage)
        with campaign.run.scratch() as scratch:
            prompter = Prompter(load_tokenizer(campaign.model), config.prompt)
            rows = _training_rows(campaign, answers, own, prompter)
            write_rows(rows, str(scratch / "rows.jsonl"))
            output = scratch / "adapter"
            metrics = _train(campaign, stage, prompter, scratch, output, round_index)
            canary = _canary(campaign, output, prompter, log)
            for file in sorted(output.iterdir()):
                if file.is_file():
                    stage.write_file(f"adapter/{file.name}", file.read_bytes())
            stage.write_file("adapter/canary.json", json.dumps(canary).encode())
        shown = {key: canary[key] for key in ("max_logit_difference", "num_changed_tokens")}
        sources = {row.question_id: row.source for row in rows}
        counts = {f"num_{kind}": list(sources.values()).count(kind) for kind in ("annotation", "rehearsal")}
        return metrics | counts | {"canary": shown}, {"tokens_trained": float(metrics["num_tokens"])}

    commit_stage(
        campaign, "tune", round_index,
        config={"tuning": config.tuning.result_fields(), "prompt": config.prompt.result_fields()},
        inputs=[*answers, own, *previous], work=work,
    )  # fmt: skip


def _training_rows(campaign: Campaign, answers: Sequence[Stage], own: Stage, prompter: Prompter) -> list[Any]:
    table = campaign.stage("questions").table(["question_id", "question"])
    text_of = by_id(table, "question")
    annotated = [
        (row["question_id"], prompter.text(row["question"]), row["answers"][0])
        for stage in answers
        for row in stage.table(["question_id", "question", "answers"]).to_pylist()
    ]
    samples: dict[str, list[str]] = {}
    if campaign.config.tuning.rehearsal > 0:
        # Seed questions were sampled for the probe: their answers rehearse at no further cost.
        drawn = own.table(["question_id", "purpose", "sample_index", "answer"])
        for row in drawn.sort_by([("question_id", "ascending"), ("sample_index", "ascending")]).to_pylist():
            if row["purpose"] in ("probe", "rehearsal"):
                samples.setdefault(row["question_id"], []).append(row["answer"])
    rehearsal = [(name, prompter.text(text_of[name]), kept) for name, kept in samples.items()]
    return training_rows(annotated, rehearsal, campaign.config.tuning, campaign.config.seed, chat=prompter.is_chat)


def _train(
    campaign: Campaign, stage: Stage, prompter: Prompter, scratch: Path, output: Path, round_index: int
) -> dict[str, Any]:
    config = campaign.config
    tuning = config.tuning
    with (
        campaign.events.progress(stage.label, 1, "steps") as progress,
        campaign.hold(tuning.workers, tuning.cpus_per_worker, tuning.gpus_per_worker),
    ):

        def on_progress(report: dict[str, Any]) -> None:
            if "step" in report:
                progress.bar.update(progress.task, total=report["num_steps"])
                progress.advance(report["step"] - progress.done, f"loss {report['loss']:.3f}")
                campaign.events.emit("training_step", round=round_index, **report)
                campaign.trackers.log_step(stage, report)

        metrics = run_training(
            model_path=campaign.model.path,
            rows_path=str(scratch / "rows.jsonl"),
            config=config.tuning,
            output_dir=str(output),
            seed=row_seed(config.seed, round_index, "tune", ""),
            scratch_dir=str(scratch / "train"),
            previous_adapter=campaign.adapter_dir(round_index) if config.tuning.start == "previous" else None,
            trust_remote_code=campaign.model.trust_remote_code,
            log_path=campaign.log_path(stage),
            on_progress=on_progress,
            chat=prompter.is_chat,
            tags=campaign.tags(stage),
        )
        progress.advance(metrics["num_steps"] - progress.done, f"loss {metrics['last_loss']:.3f}")
    return metrics


def _canary(campaign: Campaign, adapter: Path, prompter: Prompter, log: str) -> dict[str, Any]:
    """PEFT's side of the canary; the next observation checks the serving engine against it."""
    config = campaign.config
    table = campaign.stage("questions").table(["question_id", "question"]).sort_by("question_id")
    prompts = [prompter.text(question) for question in table["question"].to_pylist()[:_CANARY_PROMPTS]]
    gpus = min(1.0, config.tuning.gpus_per_worker)
    arguments = {
        "model_path": campaign.model.path,
        "adapter_dir": str(adapter),
        "prompts": prompts,
        "max_tokens": min(16, config.sampler.max_tokens),
        "dtype": "bfloat16" if gpus and campaign.model.dtype in ("auto", "bfloat16") else "float32",
        "device": "cuda" if gpus else "cpu",
        "trust_remote_code": campaign.model.trust_remote_code,
        "chat": prompter.is_chat,
    }
    with campaign.hold(1, config.tuning.cpus_per_worker, gpus):
        result = run_canary(arguments, cpus=config.tuning.cpus_per_worker, gpus=gpus, log_path=log)
    check_canary(result)
    return result
