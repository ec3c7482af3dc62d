"""Rows to adapter: LoRA fine-tuning on annotated answers, rehearsed with the model's own answers to the rest.

Tuning on unknown questions alone makes a model forget what it knew. Rehearsal keeps it: questions that were not
annotated are trained towards answers the model gave itself, which cost no annotation. See `training_rows` for how the
two are weighted, and `tune` for the training itself (TRL's ``SFTTrainer`` on PEFT's LoRA, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from ka2l.adapter import AdapterConfig, load_adapter, load_model, load_tokenizer, new_adapter, save_adapter
from ka2l.errors import AnnotationError, ConfigError
from ka2l.knowtuning import KnowTuningConfig
from ka2l.records import TrainingRow
from ka2l.section import Section
from ka2l.seeds import row_seed
from ka2l.training import Schedule, loss_watcher, row_token_ids, trainer_arguments, weights_dtype, world_size

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss."""


class TuningConfig(Section):
    """How an adapter is trained each round."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    KINDS: ClassVar[tuple[str, ...]] = ("sft", "knowtuning")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {"workers", "cpus_per_worker", "gpus_per_worker", "micro_batch_size", "gradient_checkpointing"}
    )

    kind: str = "sft"
    """``sft``: supervised fine-tuning, loss on the answer's tokens; ``knowtuning``: the same with the hardest facts of
    each answer, then a comparison of better and worse answers (`ka2l.knowtuning`), for answers of several facts."""
    knowtuning: KnowTuningConfig = KnowTuningConfig()
    """Both stages of ``knowtuning``."""
    adapter: AdapterConfig = AdapterConfig()
    """The adapter's shape."""
    learning_rate: float = Field(2e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    num_epochs: float = Field(3.0, gt=0.0)
    """Passes over the annotated questions, each with its share of rehearsed rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; replaces ``num_epochs`` where given."""
    batch_size: int = Field(64, ge=1)
    """Rows an optimiser step, over all workers; at most the number of questions."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows a forward pass on one worker; the rest of the batch is accumulated. Default: the whole batch."""
    warmup_ratio: float = Field(0.05, ge=0.0, le=1.0)
    """Share of the steps in which the learning rate rises from zero."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are clipped to this norm."""
    max_length: int = Field(512, ge=2)
    """Tokens of a prompt with its answer. Longer rows are left out and counted, never cut."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products: ``auto`` is bfloat16 on GPUs and CPUs that multiply it themselves, float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter slower."""
    rehearsal: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the candidates without annotation that are rehearsed with the model's own answers; 0: none."""
    rehearsal_ratio: float = Field(1.0, gt=0.0)
    """Rehearsed rows beside each annotated row. Rehearsed questions take turns, so a large pool does not drown the few
    annotated answers of an early round."""
    rehearsal_labels: Literal["samples", "greedy"] = "samples"
    """Own answers to train on: ``samples`` keep the model's uncertainty as it is, ``greedy`` sharpens it."""
    num_rehearsal_samples: int = Field(10, ge=1)
    """Own answers sampled for each rehearsed question."""
    start: Literal["base", "previous"] = Field("base", alias="from")
    """What training starts from: a new adapter on the base model, or the adapter of the round before."""
    workers: int = Field(1, ge=1)
    """Data-parallel workers."""
    cpus_per_worker: float = Field(1.0, ge=0.0)
    """CPUs, and so threads, of a worker."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """GPUs of a worker; 0 trains on the CPU."""

    @property
    def augments(self) -> bool:
        """Whether annotated answers are taken apart into pairs to train on."""
        return self.kind == "knowtuning" and (self.knowtuning.augment or bool(self.knowtuning.aspects))

    @property
    def compares(self) -> tuple[str, ...]:
        """The aspects in which answers are compared after tuning; empty where tuning is all."""
        return self.knowtuning.aspects if self.kind == "knowtuning" else ()

    def result_fields(self) -> dict[str, Any]:
        """As any section's, less what has no meaning for the kind."""
        fields = super().result_fields()
        if self.kind != "knowtuning":
            del fields["knowtuning"]
        return fields


class TuneResult(NamedTuple):
    """What `tune` hands back."""

    adapter_dir: str
    """Folder of ``adapter_model.safetensors`` and ``adapter_config.json``."""
    metrics: dict[str, Any]
    """num_rows, num_over_long, num_questions, num_steps, batch_size, first_loss, last_loss (nats a token),
    num_trainable_parameters, num_tokens (not padding), seconds, training_seconds (without loading), and ``example``:
    one row with what is trained on in brackets."""


def is_rehearsed(question_id: str, config: TuningConfig, seed: int) -> bool:
    """Whether a candidate without annotation belongs to the rehearsed share; fixed by (run seed, question id)."""
    return rehearsal_draw(question_id, seed) < config.rehearsal * 2**31


def rehearsal_draw(question_id: str, seed: int) -> int:
    """A number in [0, 2**31) from (run seed, question id); the lowest are rehearsed first."""
    return row_seed(seed, 0, "rehearsal", question_id)


def rows_per_pass(config: TuningConfig, num_annotated: int, num_rehearsed: int) -> int:
    """Rows of one pass: annotated questions, and rehearsed ones by ``rehearsal_ratio`` (all, without annotations)."""
    wanted = math.ceil(config.rehearsal_ratio * num_annotated) if num_annotated else num_rehearsed
    return num_annotated + min(num_rehearsed, wanted)


def num_steps(config: TuningConfig, num_annotated: int, num_rehearsed: int) -> int:
    """Optimiser steps that tuning on so many questions takes."""
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
    each turn of a question shows the next of its own answers, in an order of its own.

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
    per_pass = rows_per_pass(config, len(annotated), len(rehearsed))
    if config.max_steps is None:
        num_rows = math.ceil(config.num_epochs * per_pass)
    else:
        num_rows = config.max_steps * min(config.batch_size, len(questions))
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
    *,
    chat: bool,
) -> TuneResult:
    """Train an adapter on ``rows``, once through and in their order (see `training_rows`).

    Works alone or inside an initialised ``torch.distributed`` process group, where every worker calls it with the same
    arguments and rank 0 alone writes and reports.

    Args:
        model_path: model directory or hub id.
        previous_adapter: adapter directory to go on from when ``config.start`` is ``previous``.
        progress: called about every tenth step with {step, num_steps, loss (nats a token), learning_rate,
            seconds (since training began)}.
        chat: the prompts were rendered by a chat template, so they hold their special tokens already.

    Raises:
        AnnotationError: no rows.
        ConfigError: every row is longer than ``max_length``.
        ModelError: the model or adapter cannot be loaded, or the target modules match nothing.
        EngineError: the loss is not a finite number.
    """
    from transformers import PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    started = time.monotonic()
    if not rows:
        raise AnnotationError("There are no rows to train on.", hint="Annotate questions or rehearse some.")
    set_seed(seed)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    base = load_model(model_path, trust_remote_code, weights_dtype(config))
    dataset, example_index = _tokenized(tokenizer, rows, config, chat)
    if config.start == "previous" and previous_adapter is not None:
        model = load_adapter(base, previous_adapter, trainable=True)
    else:
        model = new_adapter(base, config.adapter)
    num_questions = len({row.question_id for row in rows})
    batch_size = min(config.batch_size, num_questions)
    schedule = Schedule(len(dataset), batch_size, config.micro_batch_size, config.learning_rate, config.max_steps)
    args = SFTConfig(
        **trainer_arguments(config, schedule, output_dir, seed),
        dataset_kwargs={"skip_prepare_dataset": True},
        completion_only_loss=True,
        packing=False,
    )
    watcher = loss_watcher(progress)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[watcher])
    trainer.remove_callback(PrinterCallback)
    example = _marked_example(tokenizer, trainer.data_collator([dataset[example_index]]))
    began = time.monotonic()
    trainer.train()
    training_seconds = time.monotonic() - began

    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size()
    num_trained = min(len(dataset), trainer.state.global_step * batch_size)
    metrics = {
        "num_rows": len(dataset),
        "num_over_long": len(rows) - len(dataset),
        "num_questions": num_questions,
        "num_steps": trainer.state.global_step,
        "batch_size": batch_size,
        "first_loss": watcher.losses[0],
        "last_loss": watcher.losses[-1],
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_tokens": sum(map(len, dataset[:num_trained]["input_ids"])),
        "seconds": time.monotonic() - started,
        "training_seconds": training_seconds,
        "example": example,
    }
    if trainer.is_world_process_zero():
        save_adapter(model, model_path, output_dir)
    trainer.accelerator.wait_for_everyone()
    return TuneResult(output_dir, metrics)


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
    ids, labels, mask = (batch[key][0].tolist() for key in ("input_ids", "labels", "attention_mask"))
    parts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            span = [token for token, real in zip(ids[start:end], mask[start:end], strict=True) if real]
            text = str(tokenizer.decode(span, skip_special_tokens=False))
            parts.append(text if labels[start] == IGNORED else f"⟦{text}⟧")
            start = end
    return "".join(parts)
