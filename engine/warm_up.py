"""Measures how fast this machine takes this config's steps: the real stages on some hundred questions, thrown away.

No annotator is asked: the reference annotator stands in for it, and the answers that it reveals are thrown away, too.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from engine import stages
from engine.artifacts import Manifest, RunDirectory, read_shard
from engine.campaign import Campaign
from engine.config import BudgetConfig
from engine.events import Events, read_events
from engine.stages.tables import among
from ka2l.annotation import AnnotatorConfig
from ka2l.models import load_tokenizer
from ka2l.pool import ColumnsConfig, PoolConfig
from ka2l.prompts import Prompter
from ka2l.records import SPLITS
from ka2l.tuning_config import TuningConfig

#: Questions of each split in the warm-up, in so many shards: the first shows the start, the others repeat.
_QUESTIONS, _SHARDS = 144, 3
#: Optimiser steps; the first third is left out, being slower.
_STEPS = 42
#: Questions of each split that are tokenised.
_TOKENISED = 2_000
#: What is measured once may as well take so much more or less.
MEASURED_ONCE = 0.25
#: Standard errors in a 95 % interval.
_Z = 1.96


@dataclass(frozen=True)
class Range:
    """A prediction with the interval that the measurements leave open."""

    value: float
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        # As if both erred the same way: what rates they share is wrong for both.
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def hull(self, other: Range) -> Range:
        """The same value with an interval that covers the other's, too."""
        return Range(self.value, min(self.low, other.low), max(self.high, other.high))


def exactly(value: float) -> Range:
    """What is known."""
    return Range(value, value, value)


def measured_once(value: float) -> Range:
    """What no repetition says anything about."""
    return Range(value, value * (1 - MEASURED_ONCE), value * (1 + MEASURED_ONCE))


def mean_of(values: Sequence[float], num_all: int | None = None) -> Range:
    """The mean of all, by some drawn from them: 95 % interval from the spread between those drawn.

    Args:
        num_all: how many there are; None for many more than were drawn.
    """
    mean = sum(values) / len(values)
    if num_all == len(values):
        return exactly(mean)
    if len(values) < 2:
        return measured_once(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    error = _Z * deviation / math.sqrt(len(values))
    return Range(mean, mean - error, mean + error)


class Pace(NamedTuple):
    """How long a stage takes: its start, and each unit of its work on one worker."""

    start_s: Range
    s_per_unit: Range

    def seconds(self, units: float, workers: int = 1) -> Range:
        """Seconds for so much work."""
        return self.start_s + self.s_per_unit * (units / workers)


class Decoding(NamedTuple):
    """How long a decoder takes to fit and to use."""

    fit: Pace
    """A unit is an optimiser step."""
    decode_s: Range
    """Of the warm-up's few drafts: mostly the start of two models."""
    forwarded_share: float
    """Of the drafts, those that are new enough to be forwarded again."""


class Refining(NamedTuple):
    """How long KnowTuning takes beside tuning, with a writer that costs nothing."""

    facts: Pace
    """A unit is an answer, as in the next two."""
    difficulty: Pace
    augment: Pace
    compare: Pace | None
    """A unit is an optimiser step; None without comparisons."""
    pairs: Mapping[str, float]
    """Pairs an answer, by part (records.PAIRS)."""
    num_facts: float
    """Of an answer: each is a forward pass."""
    num_tokens: float
    """Of an answer's facts, with their prompts."""


class Scoring(NamedTuple):
    """How long it takes to find the perplexity of candidates."""

    pace: Pace
    """A unit is a candidate."""
    num_tokens: float
    """Of a candidate with its prompt."""


class Rates(NamedTuple):
    """What the warm-up measured."""

    prompt_tokens: dict[str, Range]
    """Tokens of a prompt, by split."""
    shared_tokens: float
    """Of them, those that all prompts begin with and that extraction forwards only once."""
    answer_tokens: dict[str, Range]
    """Tokens of an answer of the base model, by purpose."""
    adapted_tokens: dict[str, Range]
    """Tokens of an answer after a short tuning, by purpose."""
    observe: Pace
    """A unit is an answer."""
    observe_adapted: Pace
    """With a LoRA adapter, as in every round but the first."""
    extract: Pace
    """A unit is a question, as in all that follow but the last."""
    extract_adapted: Pace
    cluster: Pace
    feedback: Pace
    driver: tuple[dict[str, Pace], dict[str, Pace]]
    """Of what the driver does itself, in the first round, where it pays for a start, and in later ones. A unit is a
    seed question for label and probe."""
    tune: Pace
    """A unit is an optimiser step."""
    decoding: Decoding | None = None
    """None without a decoder."""
    refining: Refining | None = None
    """None where nothing is taken apart, or a teacher does it."""
    scoring: Scoring | None = None
    """None but for ``selection.kind: perplexity``."""


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
