"""Predicts what a run will take: counts from the config, rates from a short measured warm-up."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
from rich.console import Console

from actors.decoder import MOST_PAIRS
from engine import stages
from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.forecast.prediction import NOTHING, Estimate, Prediction, print_estimate
from engine.forecast.rates import Decoding, Pace, Range, Rates, Refining, Scoring, exactly, measured_once
from engine.forecast.warm_up import measure
from engine.stages.pool import check_budget
from engine.stages.tables import among
from engine.store.events import Events
from engine.store.ledger import committed_stages
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard
from ka2l.model.loading import ModelConfig
from ka2l.prompts import teacher_messages
from ka2l.schemas import SPLITS
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.request import ShortAnswer, TeacherPrompt, request_body
from ka2l.tuning.config import TuningConfig
from ka2l.tuning.knowtuning import FINE_GRAINED
from ka2l.tuning.sft import num_steps

#: Characters that make a token, in English: usually, and at most and at least for the interval.
_CHARACTERS_PER_TOKEN = (4.0, 5.0, 3.0)
#: Questions that say how long a teacher's prompts and replies are.
_TAUGHT = 500


class Teaching(NamedTuple):
    """What one annotation by a teacher takes, by the length of prompts and of the shortest replies."""

    tokens_prompt: Range
    tokens_generated: Range
    money: Range


def estimate(config: RunConfig, model: ModelConfig, pool_path: str, console: Console) -> Estimate:
    """Predict a run and print it. Ray must be initialised.

    Raises:
        KA2LError: whatever the real stages would raise on the first questions.
    """
    quiet = Console(quiet=True)
    uncapped = config.model_copy(update={"budget": config.budget.model_copy(update={"hours": None})})
    with tempfile.TemporaryDirectory(prefix="ka2l-estimate-") as folder:
        full = RunDirectory(f"{folder}/full")
        campaign = Campaign(uncapped, full, Events(full, quiet), model, pool_path)
        Path(full.path).mkdir()
        stages.pool(campaign)
        check_budget(campaign)
        counts = {split: int(campaign.stage("questions").require().metrics[split]) for split in SPLITS}
        stages.corpus(campaign)
        if config.decoder.kind != "none":
            counts["corpus"] = int(campaign.stage("corpus").require().metrics["num_questions"])
        console.print(f"pool: {counts}; warming up on some questions of each split ...", highlight=False)
        rates = measure(campaign, Path(folder))
        teaching = _teaching(campaign) if config.annotator.teacher and config.annotator.kind == "teacher" else None
        cap = campaign.config.annotation_cap
        reading = [stage.require().seconds for stage in committed_stages(full)]
    predictions, notes = _capped(config, counts, rates, cap, teaching)
    pool = _held(Prediction(-1, "pool", sum(counts.values()), seconds=measured_once(sum(reading))), config)
    made = Estimate(counts, [pool, *predictions], notes)
    print_estimate(made, console)
    return made


def _capped(
    config: RunConfig, counts: dict[str, int], rates: Rates, cap: int, teaching: Teaching | None
) -> tuple[list[Prediction], list[str]]:
    """The stages and what is to be said about them."""
    notes = []
    money = config.budget.money
    if teaching is not None:
        notes.append(
            "The teacher was not asked: its tokens are taken from the characters of prompts and of replies like the "
            "pool's references. Reasoning, malformed replies and its own time come on top."
        )
        if money is not None and teaching.money.value * cap > money:
            cap = int(money / teaching.money.value)
            notes.append(f"The budget of {money:g} for annotation lets about {cap:,} annotations through.")
    if config.tuning.augments and rates.refining is None:
        notes.append(
            f"KnowTuning's writer was not asked: its requests, up to {_num_requests(config.tuning):,} an annotation, "
            "and what is trained on what it writes are not in the figures."
        )
    if config.evaluation.judges or config.evaluation.text:
        notes.append("What evaluation measures by a judge or by text metrics is not in the figures.")
    if config.selection.kind in config.selection.COMPARED:
        notes.append(f"The time of {config.selection.kind} grows with candidates times budget, which is not foreseen.")
    if config.annotator.kind == "human":
        notes.append("People's time is not in the figures.")
    made = predict(config, counts, rates, cap, teaching)
    hours, seconds = config.budget.hours, sum(row.seconds.value for row in made)
    if hours is not None and seconds > 3600 * hours:
        notes.append(f"The budget of {hours:g} hours ends the run before it has done all this.")
    return made, notes


def predict(
    config: RunConfig, counts: Mapping[str, int], rates: Rates, cap: int, teaching: Teaching | None = None
) -> list[Prediction]:
    """Every stage of every round from counts and rates, with ``cap`` annotations at most."""
    made: list[Prediction] = []
    annotated = 0
    for index in range(config.rounds + 1):
        made += _predict_measuring(config, counts, rates, index)
        wanted = min(config.selection.budget, cap - annotated)
        if config.has_feedback(index):
            made.append(_predict_feedback(config, counts, rates, index))
        if index == config.rounds or wanted <= 0:
            break
        made += _predict_probing(config, counts, rates, index)
        if rates.decoding is not None:
            made += _predict_decoding(config, counts, rates, rates.decoding, index, wanted)
        annotated += wanted
        teacher = teaching or Teaching(NOTHING, NOTHING, NOTHING)
        made.append(
            Prediction(index, "annotate", wanted, 0, wanted, teacher.tokens_prompt * wanted,
                       teacher.tokens_generated * wanted, money=teacher.money * wanted)
        )  # fmt: skip
        rehearsed = counts["seed"] + round(counts["candidate"] * config.tuning.rehearsal)
        left = max(0, rehearsed - annotated) if config.tuning.rehearsal > 0 else 0
        finer = 0
        if rates.refining is not None:
            made += _predict_refining(config, rates.refining, index, wanted)
            finer = round(annotated * rates.refining.pairs.get(FINE_GRAINED, 0.0))
        steps = num_steps(config.tuning, annotated + finer, left)
        made.append(_held(Prediction(index, "tune", steps, seconds=rates.tune.seconds(steps)), config))
        if rates.refining is not None and rates.refining.compare is not None:
            made.append(
                _held(_predict_comparing(config, rates.refining, rates.refining.compare, index, annotated), config)
            )
    return made


def _num_requests(tuning: TuningConfig) -> int:
    """What a writer is asked about one annotated answer."""
    aspects = tuning.compares
    # The better answer, a worse one for each aspect; wrong facts before the answer that states them.
    compared = 1 + len(aspects) + ("factuality" in aspects) if aspects else 0
    return 1 + tuning.knowtuning.augment + compared


def _predict_refining(config: RunConfig, refining: Refining, index: int, num_answers: int) -> list[Prediction]:
    """What KnowTuning makes of a round's annotated answers."""
    made = [
        Prediction(index, "facts", num_answers, seconds=refining.facts.seconds(num_answers)),
        Prediction(
            index, "difficulty", num_answers, round(refining.num_facts * num_answers),
            tokens_prompt=measured_once(refining.num_tokens * num_answers),
            seconds=refining.difficulty.seconds(num_answers, config.extraction.replicas),
        ),
        Prediction(index, "augment", num_answers, seconds=refining.augment.seconds(num_answers)),
    ]  # fmt: skip
    return [_held(row, config) for row in made]


def _predict_comparing(config: RunConfig, refining: Refining, pace: Pace, index: int, annotated: int) -> Prediction:
    own = config.tuning.knowtuning
    num_pairs = max(1, round(annotated * sum(refining.pairs.get(aspect, 0.0) for aspect in config.tuning.compares)))
    steps = math.ceil(own.num_epochs * num_pairs / min(own.batch_size, num_pairs))
    return Prediction(index, "compare", steps, seconds=pace.seconds(steps))


def _held(row: Prediction, config: RunConfig) -> Prediction:
    """The stage with the seconds of the CPUs and GPUs that it holds."""
    cpus, gpus = stages.room_of(row.stage, config)
    return replace(row, cpu_seconds=row.seconds * cpus, gpu_seconds=row.seconds * gpus)


def _predict_measuring(config: RunConfig, counts: Mapping[str, int], rates: Rates, index: int) -> list[Prediction]:
    """Observe and cluster: what the round's state answers."""
    asked = {"probe": counts["seed"], "eval": counts["eval"]}  # questions by purpose
    prompts = rates.prompt_tokens["seed"] * counts["seed"] + rates.prompt_tokens["eval"] * counts["eval"]
    answers = {"probe": config.sampler.num_samples, "eval": 1}  # of each question
    if config.evaluation.num_samples:
        asked["agreement"], answers["agreement"] = counts["eval"], config.evaluation.num_samples
        prompts += rates.prompt_tokens["eval"] * counts["eval"]
    if config.selection.samples_candidates and index < config.rounds:
        asked["probe"] += counts["candidate"]
        prompts += rates.prompt_tokens["candidate"] * counts["candidate"]
    judged = sum(asked.values())
    if index == 0 and config.rounds:
        rehearsed = round(counts["candidate"] * config.tuning.rehearsal)
        asked["rehearsal"] = rehearsed
        answers["rehearsal"] = config.tuning.num_own_answers
        prompts += rates.prompt_tokens["candidate"] * rehearsed
    # What a longer tuning does to the length of answers is between what none and a short one do, or beyond.
    lengths = {
        name: (tokens if index == 0 else rates.adapted_tokens.get(name, tokens).hull(tokens))
        for name, tokens in rates.answer_tokens.items()
    }
    written = sum((lengths.get(name, NOTHING) * (asked[name] * answers[name]) for name in asked), NOTHING)
    pace = rates.observe_adapted if index else rates.observe
    seconds = pace.seconds(sum(asked[name] * answers[name] for name in asked), config.sampler.replicas)
    passes = sum(asked.values())
    observe = Prediction(index, "observe", passes, passes, 0, prompts, written, seconds)
    return [
        _held(observe, config),
        _held(Prediction(index, "cluster", judged, seconds=rates.cluster.seconds(judged)), config),
    ]


def _predict_probing(config: RunConfig, counts: Mapping[str, int], rates: Rates, index: int) -> list[Prediction]:
    """From states to what is selected."""
    num_all = sum(counts[split] for split in SPLITS)
    made = [_predict_extract(config, rates, index, "extract", {split: counts[split] for split in SPLITS})]
    for name, pace in rates.driver[min(index, 1)].items():
        if name == "select" and rates.scoring is not None:
            made.append(_predict_scoring(config, rates.scoring, index, counts["candidate"]))
        num = counts["seed"] if name in ("label", "probe") else num_all
        made.append(_held(Prediction(index, name, num, seconds=pace.seconds(num)), config))
    return made


def _predict_scoring(config: RunConfig, scoring: Scoring, index: int, num: int) -> Prediction:
    seconds = scoring.pace.seconds(num, config.extraction.replicas)
    tokens = measured_once(scoring.num_tokens * num)
    return _held(Prediction(index, "perplexity", num, num, tokens_prompt=tokens, seconds=seconds), config)


def _predict_feedback(config: RunConfig, counts: Mapping[str, int], rates: Rates, index: int) -> Prediction:
    """Own answers are grouped once; later they are only graded."""
    work = round(counts["candidate"] * config.tuning.rehearsal) if index == 0 else 0
    return _held(Prediction(index, "feedback", work, seconds=rates.feedback.seconds(work)), config)


def _predict_extract(config: RunConfig, rates: Rates, index: int, stage: str, counts: Mapping[str, int]) -> Prediction:
    num = sum(counts.values())
    tokens = sum(
        (rates.prompt_tokens.get(split, rates.prompt_tokens["candidate"]) * count for split, count in counts.items()),
        NOTHING,
    ) + exactly(-rates.shared_tokens * num)
    pace = rates.extract_adapted if index else rates.extract
    seconds = pace.seconds(num, config.extraction.replicas)
    return _held(Prediction(index, stage, num, num, 0, tokens, seconds=seconds), config)


def _predict_decoding(
    config: RunConfig, counts: Mapping[str, int], rates: Rates, decoding: Decoding, index: int, wanted: int
) -> list[Prediction]:
    """The stages of the decoder in one round. It is taken for granted that tuning moves the states every time."""
    decoder, corpus = config.decoder, counts["corpus"]
    made = []
    if corpus:
        made.append(_predict_extract(config, rates, index, "corpus_states", {"corpus": corpus}))
    num_pairs = sum(min(count, MOST_PAIRS) for count in (corpus, counts["candidate"]))
    epochs = decoder.refit_epochs if index else decoder.num_epochs
    steps = math.ceil(epochs * num_pairs / min(decoder.batch_size, num_pairs))
    fit = Prediction(index, "decoder", steps, seconds=decoding.fit.seconds(steps))
    made.append(_held(fit, config))
    drafts = wanted * (decoder.num_sampled + decoder.num_noised + decoder.num_interpolated)
    passes = round(drafts * decoding.forwarded_share)
    tokens = (rates.prompt_tokens["candidate"] + exactly(-rates.shared_tokens)) * passes
    seconds = decoding.decode_s + rates.extract.s_per_unit * passes
    decode = Prediction(index, "decode", drafts, passes, 0, tokens, seconds=seconds)
    made.append(_held(decode, config))
    return made


def _teaching(campaign: Campaign) -> Teaching:
    """What a teacher's answer takes, from the pool's questions and references; the teacher itself is not asked."""
    config = campaign.config.annotator.teacher
    assert config is not None
    questions: list[dict[str, Any]] = []
    stage = campaign.stage("questions")
    for name in stage.shard_names():
        if len(questions) < _TAUGHT:
            columns = ["question_id", "question"]
            questions += read_shard(stage.url, name, columns, pc.field("split") == "candidate").to_pylist()
    questions = questions[:_TAUGHT]
    references = campaign.stage("references").table(["answers"], among(row["question_id"] for row in questions))
    return teaching_of(config, [row["question"] for row in questions], references["answers"].to_pylist())


def teaching_of(config: TeacherConfig, questions: list[str], references: list[list[str]]) -> Teaching:
    """What an answer takes, on average over questions with their accepted answers."""
    asked = [
        json.dumps(
            request_body(config, TeacherPrompt(teacher_messages(text, config.allow_abstain), ShortAnswer), False)
        )
        for text in questions
    ]
    replies = [json.dumps({"answers": answers[:2], "abstain": False}) for answers in references]
    prompt, reply = (
        Range(
            *(config.num_samples * sum(map(len, texts)) / max(1, len(texts)) / size for size in _CHARACTERS_PER_TOKEN)
        )
        for texts in (asked, replies)
    )
    money = Range(*(config.cost(getattr(prompt, end), getattr(reply, end)) for end in ("value", "low", "high")))
    return Teaching(prompt, reply, money)


# -- for people ------------------------------------------------------------------------------------------------------
