"""What a run will take, before anything is spent: counts from the config, rates from a short measured warm-up.

The warm-up runs the real stages on a few dozen questions in a temporary folder, so start-up, prompt lengths, answer
lengths and the machine's speed are measured and not guessed. Reference answers it uses are thrown away with it.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from engine import stages
from engine.artifacts import RunDirectory
from engine.campaign import Campaign
from engine.config import RunConfig
from engine.events import Events
from ka2l.models import ModelConfig
from ka2l.pool import ColumnsConfig, PoolConfig
from ka2l.records import SPLITS
from ka2l.tuning import num_steps

_WARM_UP_QUESTIONS = 48
_WARM_UP_STEPS = 10


class Prediction(NamedTuple):
    """One stage of one round."""

    round_index: int
    stage: str
    questions: int
    """Questions, or optimiser steps for ``tune`` and ``decoder``."""
    forward_passes: int
    """Prompts prefilled by the extractor."""
    tokens_prompt: int
    tokens_generated: int
    annotations: int
    seconds: float


class ObserveRate(NamedTuple):
    """How fast a model state answers."""

    start_s: float
    """Of the engine, its model and, with an adapter, the check of it."""
    s_per_token: float
    """Seconds a generated token."""


class DecodingRates(NamedTuple):
    """How long a decoder takes to fit and to use."""

    fit_start_s: float
    fit_s_per_step: float
    decode_s: float
    """Of the warm-up's few drafts: mostly the start of two models."""
    forwarded_share: float
    """Of the drafts, those that are new enough to be forwarded again."""


class Rates(NamedTuple):
    """What the warm-up measured."""

    tokens_per_prompt: float
    tokens_per_answer: float
    base: ObserveRate
    adapted: ObserveRate
    """With a LoRA adapter, as in every round but the first: slower, on CPUs by a lot."""
    cluster_s: float
    extract_start_s: float
    extract_s_per_question: float
    fit_s: float
    tune_start_s: float
    tune_s_per_step: float
    decoding: DecodingRates | None = None
    """None without a decoder."""


def estimate(config: RunConfig, model: ModelConfig, pool_path: str, console: Console) -> list[Prediction]:
    """Predict a run and print it. Ray must be initialised.

    Raises:
        KA2LError: whatever the real stages would raise on the first questions.
    """
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory(prefix="ka2l-estimate-") as folder:
        full = RunDirectory(f"{folder}/full")
        campaign = Campaign(config, full, Events(full, quiet), model, pool_path)
        Path(full.path).mkdir()
        stages.pool(campaign)
        stages.check_budget(campaign)
        counts = {split: int(campaign.stage("questions").require().metrics[split]) for split in SPLITS}
        if config.decoder.kind != "none":
            stages.corpus(campaign)
            counts["corpus"] = int(campaign.stage("corpus").require().metrics["num_questions"])
        console.print(f"pool: {counts}; warming up on {_WARM_UP_QUESTIONS} questions a split ...", highlight=False)
        rates = _warm_up(campaign, Path(folder))
        cap = campaign.budget_cap()
    predictions = predict(config, counts, rates, cap)
    _print(predictions, console)
    return predictions


def predict(config: RunConfig, counts: dict[str, int], rates: Rates, cap: int) -> list[Prediction]:
    """Every stage of every round from counts and rates."""
    total = sum(counts[split] for split in SPLITS)
    made: list[Prediction] = []
    annotated = 0
    for index in range(config.rounds + 1):
        samples = counts["seed"] * config.sampler.num_samples + counts["eval"]
        prompts = counts["seed"] + counts["eval"]
        rehearsed = round(counts["candidate"] * config.tuning.rehearsal)
        if index == 0:
            own = 1 if config.tuning.rehearsal_labels == "greedy" else config.tuning.num_rehearsal_samples
            samples += rehearsed * own
            prompts += rehearsed
        if config.selection.kind == "semantic_entropy" and index < config.rounds:
            samples += counts["candidate"] * config.sampler.num_samples
            prompts += counts["candidate"]
        tokens = round(samples * rates.tokens_per_answer)
        asked = round(prompts * rates.tokens_per_prompt)
        rate = rates.adapted if index else rates.base
        seconds = rate.start_s + tokens * rate.s_per_token
        made.append(Prediction(index, "observe", prompts, 0, asked, tokens, 0, seconds))
        made.append(Prediction(index, "cluster", prompts, 0, 0, 0, 0, rates.cluster_s))
        wanted = min(config.selection.budget, cap - annotated)
        if index == config.rounds or wanted <= 0:
            break
        seconds = rates.extract_start_s + total * rates.extract_s_per_question
        made.append(Prediction(index, "extract", total, total, round(total * rates.tokens_per_prompt), 0, 0, seconds))
        made.append(Prediction(index, "probe", counts["seed"], 0, 0, 0, 0, rates.fit_s))
        if rates.decoding is not None:
            made += _predict_decoding(config, counts, rates, rates.decoding, index, wanted)
        annotated += wanted
        made.append(Prediction(index, "annotate", wanted, 0, 0, 0, wanted, 0.0))
        left = counts["seed"] + rehearsed - annotated if config.tuning.rehearsal > 0 else 0
        steps = num_steps(config.tuning, annotated, max(0, left))
        seconds = rates.tune_start_s + steps * rates.tune_s_per_step
        made.append(Prediction(index, "tune", steps, 0, 0, 0, 0, seconds))
    return made


def _predict_decoding(
    config: RunConfig, counts: dict[str, int], rates: Rates, decoding: DecodingRates, index: int, wanted: int
) -> list[Prediction]:
    """The stages of the decoder in one round. It is taken for granted that tuning moves the states every time."""
    decoder, corpus = config.decoder, counts["corpus"]
    made = []
    if corpus:
        seconds = rates.extract_start_s + corpus * rates.extract_s_per_question
        tokens = round(corpus * rates.tokens_per_prompt)
        made.append(Prediction(index, "corpus_states", corpus, corpus, tokens, 0, 0, seconds))
    num_pairs = corpus + counts["candidate"]
    epochs = decoder.refit_epochs if index else decoder.num_epochs
    steps = math.ceil(epochs * num_pairs / min(decoder.batch_size, num_pairs))
    seconds = decoding.fit_start_s + steps * decoding.fit_s_per_step
    made.append(Prediction(index, "decoder", steps, 0, 0, 0, 0, seconds))
    drafts = wanted * (decoder.num_sampled + decoder.num_noised + decoder.num_interpolated)
    passes = round(drafts * decoding.forwarded_share)
    seconds = decoding.decode_s + passes * rates.extract_s_per_question
    made.append(Prediction(index, "decode", drafts, passes, round(passes * rates.tokens_per_prompt), 0, 0, seconds))
    return made


def _warm_up(campaign: Campaign, folder: Path) -> Rates:
    rows = _subset(campaign)
    source = folder / "pool.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ColumnsConfig(split="split")
    config = campaign.config.model_copy(
        update={
            "rounds": 1,
            "shard_rows": len(rows),
            "pool": PoolConfig(path=str(source), columns=columns),
            "selection": campaign.config.selection.model_copy(update={"budget": min(16, len(rows) // 3)}),
            "tuning": campaign.config.tuning.model_copy(update={"max_steps": _WARM_UP_STEPS}),
            "decoder": campaign.config.decoder.model_copy(
                update={
                    "corpus": campaign.corpus_path(),
                    "num_corpus": _WARM_UP_STEPS * campaign.config.decoder.batch_size,
                    "num_epochs": 1.0,
                }
            ),
            "annotator": campaign.config.annotator.model_copy(
                update={"reference_table": campaign.reference_table_path()}
            ),
        }
    )
    run = RunDirectory(folder / "warm-up")
    Path(run.path).mkdir()
    warm = Campaign(config, run, campaign.events, campaign.model, str(source))
    stages.pool(warm)
    for stage in (stages.observe, stages.cluster, stages.label, stages.extract, stages.probe, stages.knowledge):
        stage(warm, 0)
    stages.select(warm, 0)
    decoding = _warm_up_decoding(warm) if config.decoder.kind != "none" else None
    stages.annotate(warm, 0)
    stages.tune(warm, 0)
    stages.observe(warm, 1)
    extract, tune = (warm.stage(name, 0).require() for name in ("extract", "tune"))
    drawn = warm.stage("observe", 0).table(["num_tokens", "num_prompt_tokens"])
    working = tune.metrics["training_seconds"]
    return Rates(
        tokens_per_prompt=pc.mean(drawn["num_prompt_tokens"]).as_py(),
        tokens_per_answer=pc.mean(drawn["num_tokens"]).as_py(),
        base=_observe_rate(warm, 0),
        adapted=_observe_rate(warm, 1),
        cluster_s=warm.stage("cluster", 0).require().seconds,
        extract_start_s=extract.seconds - extract.cost["forward_seconds"],
        extract_s_per_question=extract.cost["forward_seconds"] / len(rows),
        fit_s=sum(warm.stage(name, 0).require().seconds for name in ("label", "probe", "knowledge", "select")),
        tune_start_s=tune.seconds - working,
        tune_s_per_step=working / tune.metrics["num_steps"],
        decoding=decoding,
    )


def _warm_up_decoding(campaign: Campaign) -> DecodingRates:
    stages.corpus(campaign)
    stages.fit_decoder(campaign, 0)
    stages.decode(campaign, 0)
    fitted, decoded = (campaign.stage(name, 0).require() for name in ("decoder", "decode"))
    working = fitted.metrics["training_seconds"]
    return DecodingRates(
        fit_start_s=fitted.seconds - working,
        fit_s_per_step=working / fitted.metrics["num_steps"],
        decode_s=decoded.seconds,
        forwarded_share=decoded.cost.get("forward_passes", 0.0) / max(1, decoded.metrics["num_drafts"]),
    )


def _observe_rate(campaign: Campaign, round_index: int) -> ObserveRate:
    observed = campaign.stage("observe", round_index).require()
    generating = observed.cost["generate_seconds"]
    return ObserveRate(observed.seconds - generating, generating / max(1.0, observed.cost["tokens_generated"]))


def _subset(campaign: Campaign) -> list[dict[str, object]]:
    """The first questions of each split, with their answers."""
    questions = campaign.stage("questions").table(["question_id", "question", "split"])
    picked = pa.concat_tables(
        [questions.filter(pc.equal(questions["split"], split)).slice(0, _WARM_UP_QUESTIONS) for split in SPLITS]
    )
    references = campaign.stage("references").table()
    references = references.filter(pc.is_in(references["question_id"], picked["question_id"].combine_chunks()))
    answers = dict(zip(references["question_id"].to_pylist(), references["answers"].to_pylist(), strict=True))
    return [
        {
            "id": row["question_id"],
            "question": row["question"],
            "split": row["split"],
            "answers": answers[row["question_id"]],
        }
        for row in picked.to_pylist()
    ]


def _print(predictions: list[Prediction], console: Console) -> None:
    headings = ("round", "stage", "rows", "passes", "prompt tok.", "new tok.", "annot.", "seconds")
    table = Table(*headings, title="estimate (rows: questions; optimiser steps for decoder and tune)")
    for row in predictions:
        table.add_row(
            str(row.round_index),
            row.stage,
            *(f"{value:,}" if value else "" for value in row[2:7]),
            f"{row.seconds:.0f}",
        )
    sums = [
        sum(row.forward_passes for row in predictions),
        sum(row.tokens_prompt for row in predictions),
        sum(row.tokens_generated for row in predictions),
        sum(row.annotations for row in predictions),
    ]
    table.add_section()
    table.add_row("", "total", "", *(f"{value:,}" for value in sums), f"{sum(row.seconds for row in predictions):.0f}")
    console.print(table)
