"""Measures the speed of this machine with this config: runs the real stages on some hundred questions.

No annotator is asked: the reference annotator stands in for it, and the answers that it reveals are thrown away, too.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from engine import stages
from engine.config import BudgetConfig
from engine.execution.campaign import Campaign
from engine.forecast.rates import Decoding, Pace, Range, Rates, Refining, Scoring, exactly, mean_of, measured_once
from engine.stages.tables import among
from engine.store.events import Events, read_events
from engine.store.manifest import Manifest
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard
from ka2l.annotation.annotator import AnnotatorConfig
from ka2l.model.loading import load_tokenizer
from ka2l.pool.config import ColumnsConfig, PoolConfig
from ka2l.prompts import Prompter
from ka2l.schemas import SPLITS
from ka2l.tuning.config import TuningConfig

#: Questions of each split in the warm-up, in so many shards: the first shows the start, the others repeat.
_QUESTIONS, _SHARDS = 144, 3
#: Optimiser steps; the first third is left out, being slower.
_STEPS = 42
#: Questions of each split that are tokenised.
_TOKENISED = 2_000


def measure(campaign: Campaign, folder: Path) -> Rates:
    """Run one small round, and the stages of the next that an adapter makes slower.

    Args:
        campaign: the whole run's, with its pool read.
        folder: for the warm-up's files; the caller removes it.
    """
    rows = _subset(campaign)
    warm = _small_campaign(campaign, folder, rows)
    for stage in stages.POOL:
        stage(warm)
    # A leaf may ask a judge, which costs money.
    for stage in stages.round_stages():
        if not stage.is_leaf:
            stage(warm, 0)
    for stage in stages.KNOW:
        if not stage.is_leaf:
            stage(warm, 1)

    def pace(name: str, round_index: int) -> Pace:
        return _pace(warm.stage(name, round_index).require())

    return Rates(
        prompt_tokens=_prompt_tokens(campaign),
        shared_tokens=_shared_tokens(warm),
        answer_tokens=_answer_tokens(warm, 0),
        adapted_tokens=_answer_tokens(warm, 1),
        observe=pace("observe", 0),
        observe_adapted=pace("observe", 1),
        extract=pace("extract", 0),
        extract_adapted=pace("extract", 1),
        cluster=pace("cluster", 1),
        feedback=pace("feedback", 0 if warm.config.has_feedback(0) else 1),
        driver=_driver_paces(warm, sum(row["split"] == "seed" for row in rows), len(rows)),
        tune=_tuning_pace(warm),
        decoding=_decoding(warm) if warm.config.decoder.kind != "none" else None,
        refining=_refining(warm) if warm.config.tuning.augments else None,
        scoring=_scoring(warm) if warm.config.selection.kind == "perplexity" else None,
    )


def _subset(campaign: Campaign) -> list[dict[str, object]]:
    """Some questions of each split with their answers, the splits in turn."""
    picked = _drawn(campaign, _QUESTIONS).values()
    mixed = [row for turn in zip_longest(*picked) for row in turn if row is not None]
    references = campaign.stage("references").table(where=among(str(row["question_id"]) for row in mixed))
    answers = dict(zip(references["question_id"].to_pylist(), references["answers"].to_pylist(), strict=True))
    return [
        {
            "id": row["question_id"],
            "question": row["question"],
            "split": row["split"],
            "answers": answers[str(row["question_id"])],
        }
        for row in mixed
    ]


def _drawn(campaign: Campaign, count: int) -> dict[str, list[dict[str, object]]]:
    """Some questions of each split, by split, in the order that they were drawn in."""
    questions, draw = campaign.stage("questions"), random.Random(campaign.config.seed)
    counts = questions.require().metrics
    chosen = {split: draw.sample(range(counts[split]), min(count, counts[split])) for split in SPLITS}
    found: dict[str, dict[int, dict[str, object]]] = {split: {} for split in SPLITS}
    seen = Counter[str]()
    for name in questions.shard_names():
        table = read_shard(questions.url, name, ["question_id", "question", "split"])
        for split in SPLITS:
            rows = table.filter(pc.equal(table["split"], split))
            inside = [place for place in chosen[split] if 0 <= place - seen[split] < rows.num_rows]
            taken = rows.take(pa.array([place - seen[split] for place in inside], pa.int64()))
            found[split] |= zip(inside, taken.to_pylist(), strict=True)
            seen[split] += rows.num_rows
    return {split: [found[split][place] for place in chosen[split]] for split in SPLITS}


def _small_campaign(campaign: Campaign, folder: Path, rows: Sequence[Mapping[str, object]]) -> Campaign:
    """The same config on these rows, one worker a stage, with nobody to pay."""
    source = folder / "pool.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = campaign.config
    budget = min(16, len(rows) // 3)
    decoder = {"corpus": campaign.corpus_path(), "num_corpus": _STEPS * whole.decoder.batch_size, "num_epochs": 1.0}
    config = whole.model_copy(
        update={
            "rounds": 1,
            "shard_rows": math.ceil(len(rows) / _SHARDS),
            "pool": PoolConfig(path=str(source), columns=ColumnsConfig(split="split")),
            "sampler": whole.sampler.model_copy(update={"replicas": 1}),
            "extraction": whole.extraction.model_copy(update={"replicas": 1}),
            "selection": whole.selection.model_copy(update={"budget": budget}),
            "tuning": _short_tuning(whole.tuning, budget),
            "decoder": whole.decoder.model_copy(update=decoder),
            "annotator": AnnotatorConfig(reference_table=campaign.reference_table_path()),
            "budget": BudgetConfig(),
        }
    )
    run = RunDirectory(folder / "warm-up")
    Path(run.path).mkdir()
    return Campaign(config, run, Events(run, Console(quiet=True)), campaign.model, str(source))


def _short_tuning(tuning: TuningConfig, num_annotated: int) -> TuningConfig:
    """A few steps of each kind of training. A writer that would have to be paid is not asked."""
    own = tuning.knowtuning
    if own.writer != "testbed":
        tuning = tuning.model_copy(update={"kind": "sft"})
    num_pairs = num_annotated * max(1, len(own.aspects))
    passes = _STEPS * min(own.batch_size, num_pairs) / num_pairs
    return tuning.model_copy(update={"max_steps": _STEPS, "knowtuning": own.model_copy(update={"num_epochs": passes})})


def _refining(campaign: Campaign) -> Refining:
    def pace(name: str) -> Pace:
        seconds = campaign.stage(name, 0).require().seconds
        return Pace(measured_once(seconds), Range(0.0, 0.0, seconds / num_answers))

    num_answers = max(1, campaign.stage("facts", 0).require().metrics["num_answers"])
    pairs = campaign.stage("augment", 0).require().metrics["num_pairs"]
    compare = None
    if campaign.config.tuning.compares:
        compare = _trained_pace(campaign.stage("compare", 0).require())
    measured = campaign.stage("difficulty", 0).require()
    return Refining(
        facts=pace("facts"),
        difficulty=_pace(measured),
        augment=pace("augment"),
        compare=compare,
        pairs={part: count / num_answers for part, count in pairs.items()},
        num_facts=measured.cost["forward_passes"] / num_answers,
        num_tokens=measured.cost["tokens_prompt"] / num_answers,
    )


def _scoring(campaign: Campaign) -> Scoring:
    measured = campaign.stage("perplexity", 0).require()
    return Scoring(_pace(measured), measured.cost["tokens_prompt"] / max(1.0, measured.cost["forward_passes"]))


def _trained_pace(manifest: Manifest) -> Pace:
    """Of a training that tells the time of its steps: those, and all the rest as its start."""
    working = manifest.metrics["training_seconds"]
    start = measured_once(manifest.seconds - working)
    return Pace(start, measured_once(working / manifest.metrics["num_steps"]))


def _pace(manifest: Manifest) -> Pace:
    """Of a stage with shards: what the later shards repeat, and all the rest as its start."""
    shards = [entry for entry in manifest.files if entry.num_rows]
    if not shards:
        return Pace(measured_once(manifest.seconds), exactly(0.0))
    repeated = shards[1:] or shards
    rates = [entry.stats["seconds"] / (entry.num_rows or 1) for entry in repeated]
    rate = sum(entry.stats["seconds"] for entry in repeated) / sum(entry.num_rows or 0 for entry in repeated)
    working = rate * sum(entry.num_rows or 0 for entry in shards)
    return Pace(measured_once(max(0.0, manifest.seconds - working)), Range(rate, min(rates), max(rates)))


def _driver_paces(campaign: Campaign, num_seed: int, num_all: int) -> tuple[dict[str, Pace], dict[str, Pace]]:
    """Mostly start; how far they grow with the questions, between not at all and in proportion, is left open."""
    first, later = {}, {}
    for name, count in {"label": num_seed, "probe": num_seed, "knowledge": num_all, "select": num_all}.items():
        seconds = campaign.stage(name, 0).require().seconds
        repeated = campaign.stage(name, 1).manifest()
        again = repeated.seconds if repeated else seconds
        growth = Range(0.0, 0.0, min(seconds, again) / count)
        first[name], later[name] = Pace(measured_once(seconds), growth), Pace(measured_once(again), growth)
    return first, later


def _tuning_pace(campaign: Campaign) -> Pace:
    """From the times that training reported on its way."""
    tuned = campaign.stage("tune", 0).require()
    events = read_events(campaign.run)
    reports = [event for event in events if event["event"] == "training_step" and event["stage"] == "tune"]
    later = [report for report in reports if report["step"] > _STEPS / 3]
    rates = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"]) for before, after in pairwise(later)
    ]
    rate = (later[-1]["seconds"] - later[0]["seconds"]) / (later[-1]["step"] - later[0]["step"])
    start = max(0.0, tuned.seconds - rate * tuned.metrics["num_steps"])
    return Pace(measured_once(start), Range(rate, min(rates), max(rates)))


def _prompt_tokens(campaign: Campaign) -> dict[str, Range]:
    """Tokens of a prompt, by split: of every question, or of some of a large pool."""
    prompter = Prompter(load_tokenizer(campaign.model), campaign.config.prompt)
    num_all = campaign.stage("questions").require().metrics
    found = {}
    for split, rows in _drawn(campaign, _TOKENISED).items():
        counts = [len(prompter.token_ids(str(row["question"]))) for row in rows]
        found[split] = mean_of(counts, int(num_all[split])) if counts else exactly(0.0)
    return found


def _shared_tokens(campaign: Campaign) -> float:
    """Tokens of a prompt that extraction did not forward again."""
    prompter = Prompter(load_tokenizer(campaign.model), campaign.config.prompt)
    shards = campaign.stage("extract", 0).require().files[1:]
    if not shards:
        return 0.0
    texts = [
        text
        for entry in shards
        for text in read_shard(campaign.stage("questions").url, entry.path, ["question"])["question"].to_pylist()
    ]
    whole = sum(len(prompter.token_ids(text)) for text in texts) / len(texts)
    forwarded = sum(entry.stats["tokens_prompt"] for entry in shards) / sum(entry.num_rows or 0 for entry in shards)
    return max(0.0, whole - forwarded)


def _answer_tokens(campaign: Campaign, round_index: int) -> dict[str, Range]:
    """Tokens of an answer, by purpose; the interval is the spread between questions."""
    drawn = campaign.stage("observe", round_index).table(["question_id", "purpose", "num_tokens"])
    means = drawn.group_by(["question_id", "purpose"]).aggregate([("num_tokens", "mean")])
    found: dict[str, list[float]] = {}
    for row in means.to_pylist():
        found.setdefault(row["purpose"], []).append(row["num_tokens_mean"])
    return {purpose: mean_of(counts) for purpose, counts in found.items()}


def _decoding(campaign: Campaign) -> Decoding:
    fitted, decoded = (campaign.stage(name, 0).require() for name in ("decoder", "decode"))
    return Decoding(
        fit=_trained_pace(fitted),
        decode_s=measured_once(decoded.seconds),
        forwarded_share=decoded.cost.get("forward_passes", 0.0) / max(1, decoded.metrics["num_drafts"]),
    )
