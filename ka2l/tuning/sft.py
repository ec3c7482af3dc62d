"""Supervised fine-tuning of an adapter on annotated answers, with rehearsal of the model's own answers.

Tuning on unknown questions alone makes a model forget what it knew. Rehearsal keeps it: questions that were not
annotated are trained towards answers the model gave itself, which cost no annotation. See `training_rows` for how the
two are weighted, and `tune` for the training itself (TRL's ``SFTTrainer``; PEFT's LoRA, https://arxiv.org/abs/2106.09685,
and others, see `ka2l.model.adapter`).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import AnnotationError, ConfigError
from ka2l.model.adapter import load_tokenizer
from ka2l.model.tokens import row_token_ids
from ka2l.schemas import HELD_OUT, TrainingRow
from ka2l.seeds import row_seed
from ka2l.tuning.checkpoints import Checkpoints, early_stopper
from ka2l.tuning.config import TuningConfig
from ka2l.tuning.knowtuning import FINE_GRAINED
from ka2l.tuning.trainer import (
    Schedule,
    check_packing,
    loss_watcher,
    save_trained,
    train,
    trainable_model,
    trainer_arguments,
    training_metrics,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss."""


class TuneResult(NamedTuple):
    """What `tune` hands back."""

    adapter_dir: str
    """Folder of ``adapter_model.safetensors`` and ``adapter_config.json``, or of a whole model; a whole model beside an
    adapter that no engine serves is in its folder ``merged``."""
    metrics: dict[str, Any]
    """num_rows, num_over_long, num_questions, num_steps, batch_size, first_loss, last_loss (nats a token),
    num_trainable_parameters, num_tokens (not padding), seconds, training_seconds (without loading), and ``example``:
    one row with what is trained on in brackets. With ``holdout`` also num_held_out, held_out_loss (the lowest, nats a
    token) and best_step (where it was)."""


def is_rehearsed(question_id: str, config: TuningConfig, seed: int) -> bool:
    """Whether a candidate without annotation belongs to the rehearsed share; fixed by (run seed, question id)."""
    return rehearsal_draw(question_id, seed) < config.rehearsal * 2**31


def rehearsal_draw(question_id: str, seed: int) -> int:
    """A number in [0, 2**31) from (run seed, question id); the lowest are rehearsed first."""
    return row_seed(seed, 0, "rehearsal", question_id)


def is_held_out(question_id: str, config: TuningConfig, seed: int) -> bool:
    """Whether an annotated question, with all that is made of it, belongs to the share that is not trained on."""
    return _held_out_draw(question_id, seed) < config.holdout * 2**31


def _held_out_draw(question_id: str, seed: int) -> int:
    return row_seed(seed, 0, "holdout", question_id.removesuffix(f"#{FINE_GRAINED}"))


def _held_out(ids: Sequence[str], config: TuningConfig, seed: int) -> set[str]:
    """Annotated questions that are not trained on: at least one, and not all, where there are two or more."""
    found = {name for name in ids if is_held_out(name, config, seed)}
    if not config.holdout or len(ids) < 2:
        return set()
    by_draw = sorted(ids, key=lambda name: (_held_out_draw(name, seed), name))
    lowest, highest = (_held_out_draw(by_draw[place], seed) for place in (0, -1))
    found = found or {name for name in ids if _held_out_draw(name, seed) == lowest}
    return found if len(found) < len(ids) else {name for name in ids if _held_out_draw(name, seed) != highest}


def rows_per_pass(config: TuningConfig, num_annotated: int, num_rehearsed: int) -> int:
    """Rows of one pass: annotated questions, and rehearsed ones by ``rehearsal_ratio`` (all, without annotations)."""
    wanted = math.ceil(config.rehearsal_ratio * num_annotated) if num_annotated else num_rehearsed
    return num_annotated + min(num_rehearsed, wanted)


def num_steps(config: TuningConfig, num_annotated: int, num_rehearsed: int) -> int:
    """Optimiser steps that tuning on so many questions takes, if it is not ended early."""
    num_annotated -= round(config.holdout * num_annotated)
    rows = rows_per_pass(config, num_annotated, num_rehearsed)
    return config.max_steps or math.ceil(
        config.num_epochs * rows / min(config.batch_size, num_annotated + num_rehearsed)
    )


def completion(answer: str, chat: bool) -> str:
    """The text to follow the prompt, before the end token: bare after a chat template, after a space otherwise."""
    return answer if chat else f" {answer}"


def training_rows(
    annotations: Sequence[tuple[str, str, str]],
    rehearsal: Sequence[tuple[str, str, list[str]]],
    config: TuningConfig,
    seed: int,
    *,
    chat: bool,
) -> list[TrainingRow]:
    """All rows of a training run, in the order they are trained on.

    The rows are ``num_epochs`` passes, each in a new order (or as many rows as ``max_steps`` batches hold). A pass
    holds every annotated question once and rehearsed questions by ``config.rehearsal_ratio``; these take turns, and
    each turn of a question shows the next of its own answers, in an order of its own. Behind them stands, with source
    ``held_out``, a row for each annotated question that is held out.

    Args:
        annotations: (question_id, prompt, answer) of the annotated questions.
        rehearsal: (question_id, prompt, own answers) of candidates. Annotated ones, those outside the share
            ``config.rehearsal`` and empty answers are dropped.
        seed: the run's seed.
        chat: the prompts were rendered by a chat template.

    Raises:
        AnnotationError: an empty annotated answer, or nothing to train on.
    """
    questions: dict[str, tuple[str, str, list[str]]] = {}
    for question_id, prompt, answer in annotations:
        if not answer.strip():
            raise AnnotationError(
                f"The annotated answer of question {question_id!r} is empty.", hint="Annotate it again or remove it."
            )
        questions.setdefault(question_id, (prompt, "annotation", []))[2].append(answer.strip())
    for question_id, prompt, answers in rehearsal:
        kept = [answer.strip() for answer in answers if answer.strip()]
        if question_id not in questions and kept and is_rehearsed(question_id, config, seed):
            questions[question_id] = (prompt, "rehearsal", kept)
    if not questions:
        raise AnnotationError(
            "There is nothing to train on: no annotation and no own answer.",
            hint="Annotate at least one question, or set tuning.rehearsal above 0.",
        )
    for question_id, (_, _, answers) in questions.items():
        random.Random(row_seed(seed, 0, "training_rows", question_id)).shuffle(answers)

    # Sorted first: the caller's order, which may depend on how work was spread, must not change the result.
    annotated = sorted(name for name, (_, source, _) in questions.items() if source == "annotation")
    rehearsed = sorted(questions.keys() - set(annotated))
    held_out = sorted(_held_out(annotated, config, seed))
    annotated = [name for name in annotated if name not in set(held_out)]
    per_pass = rows_per_pass(config, len(annotated), len(rehearsed))
    if config.max_steps is None:
        num_rows = math.ceil(config.num_epochs * per_pass)
    else:
        num_rows = config.max_steps * min(config.batch_size, len(annotated) + len(rehearsed))
    turns = _turns(rehearsed, seed)
    shown: Counter[str] = Counter()
    rows: list[TrainingRow] = []
    for pass_index in range(math.ceil(num_rows / per_pass)):
        order = annotated + [next(turns) for _ in range(per_pass - len(annotated))]
        random.Random(row_seed(seed, pass_index, "training_rows", "")).shuffle(order)
        for question_id in order[: num_rows - len(rows)]:
            prompt, source, answers = questions[question_id]
            text = completion(answers[shown[question_id] % len(answers)], chat)
            shown[question_id] += 1
            rows.append(TrainingRow(prompt, text, source, question_id))
    for question_id in held_out:
        prompt, _, answers = questions[question_id]
        rows.append(TrainingRow(prompt, completion(answers[0], chat), HELD_OUT, question_id))
    return rows


def _turns(ids: Sequence[str], seed: int) -> Iterator[str]:
    """All ids again and again, each time in a new order."""
    for turn in count():
        yield from random.Random(row_seed(seed, turn, "rehearsal_turns", "")).sample(ids, len(ids))


def tune(
    model_path: str,
    rows: Sequence[TrainingRow],
    config: TuningConfig,
    output_dir: str,
    seed: int,
    previous_adapter: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    *,
    chat: bool,
) -> TuneResult:
    """Train an adapter on ``rows``, once through and in their order (see `training_rows`).

    Works alone or inside an initialised ``torch.distributed`` process group, where every worker calls it with the same
    arguments and rank 0 alone writes and reports.

    Args:
        model_path: model directory or hub id.
        previous_adapter: what an earlier training wrote, to go on from when ``config.start`` is ``previous``.
        progress: called about every tenth step with step, num_steps, loss (nats a token), learning_rate and seconds.
        checkpoints: who keeps them, and which to go on from; None: trained in one go.
        chat: the prompts were rendered by a chat template, so they hold their special tokens already.

    Raises:
        AnnotationError: no rows.
        ConfigError: every row is longer than ``max_length``, or something that the adapter needs is not there.
        ModelError: the model or adapter cannot be loaded, or the target modules match nothing.
        EngineError: the loss is not a finite number.
    """
    from transformers import set_seed

    started = time.monotonic()
    held_out = [row for row in rows if row.source == HELD_OUT]
    rows = [row for row in rows if row.source != HELD_OUT]
    if not rows:
        raise AnnotationError("There are no rows to train on.", hint="Annotate questions or rehearse some.")
    if not held_out:
        config = config.model_copy(update={"holdout": 0.0})
    set_seed(seed)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    start = previous_adapter if config.start == "previous" else None
    model = trainable_model(model_path, config, start, trust_remote_code)
    if config.packing:
        check_packing(model)
    dataset, example_index = _tokenized(tokenizer, rows, config, chat)
    num_questions = len({row.question_id for row in rows})
    size = min(config.batch_size, num_questions)
    schedule = Schedule(len(dataset), size, config.micro_batch_size, config.learning_rate, config.max_steps)
    arguments = trainer_arguments(config, schedule, output_dir, seed, kept=checkpoints is not None)
    held_out_rows = _tokenized(tokenizer, held_out, config, chat)[0] if held_out else None
    trainer = _trainer(model, tokenizer, config, arguments, dataset, held_out_rows, progress)
    example = _marked_example(tokenizer, trainer.data_collator([dataset[example_index]]))
    began = time.monotonic()
    losses = train(trainer, config, checkpoints)
    training_seconds = time.monotonic() - began
    metrics = training_metrics(trainer, model, losses, len(dataset), len(rows))
    num_trained = min(len(dataset), metrics["num_steps"] * metrics["batch_size"])
    metrics |= {
        "num_questions": num_questions,
        "num_tokens": sum(map(len, dataset[:num_trained]["input_ids"])),
        "seconds": time.monotonic() - started,
        "training_seconds": training_seconds,
        "example": example,
    }
    if held_out:
        best = {"held_out_loss": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
        metrics |= {"num_held_out": len(held_out)} | best
    save_trained(trainer, config, model_path, output_dir, trust_remote_code)
    return TuneResult(output_dir, metrics)


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: TuningConfig,
    arguments: dict[str, Any],
    dataset: Any,
    held_out: Any | None,
    progress: Callable[[dict[str, Any]], None] | None,
) -> Any:
    """TRL's trainer on rows that are tokenized already."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments,
            dataset_kwargs={"skip_prepare_dataset": True},
            completion_only_loss=True,
            packing=False,
            padding_free=config.packing,
        ),
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[loss_watcher(progress), *([] if held_out is None else [early_stopper(config.patience)])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TrainingRow], config: TuningConfig, chat: bool
) -> tuple[Dataset, int]:
    """Rows as input_ids and labels, and the position of the first annotated one. Each distinct row is tokenized once.

    Done here, not by TRL: TRL adds a second BOS to prompts that a chat template rendered, cuts over-long rows at the
    answer, and passes over the rows five times through a disk cache.
    """
    from datasets import Dataset

    cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    kept: list[tuple[list[int], list[int]]] = []
    example_index = -1
    for row in rows:
        key = (row.prompt, row.completion)
        if key not in cache:
            prompt_ids, completion_ids = row_token_ids(tokenizer, *key, chat)
            cache[key] = (prompt_ids + completion_ids, [IGNORED] * len(prompt_ids) + completion_ids)
        if len(cache[key][0]) > config.max_length:
            continue
        if example_index < 0 and row.source == "annotation":
            example_index = len(kept)
        kept.append(cache[key])
    if not kept:
        shortest = min(len(ids) for ids, _ in cache.values())
        raise ConfigError(
            f"Every training row is longer than tuning.max_length = {config.max_length} tokens.",
            hint=f"The shortest has {shortest} tokens: set tuning.max_length to more than that.",
        )
    columns = {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}
    return Dataset.from_dict(columns), max(example_index, 0)


def _marked_example(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> str:
    """A collated row as text, the tokens that carry loss in brackets: ``Answer:⟦ Paris</s>⟧``."""
    ids, labels = (batch[key][0].tolist() for key in ("input_ids", "labels"))
    mask = batch["attention_mask"][0].tolist() if "attention_mask" in batch else [1] * len(ids)  # or not padded
    parts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            span = [token for token, real in zip(ids[start:end], mask[start:end], strict=True) if real]
            text = str(tokenizer.decode(span, skip_special_tokens=False))
            parts.append(text if labels[start] == IGNORED else f"⟦{text}⟧")
            start = end
    return "".join(parts)
