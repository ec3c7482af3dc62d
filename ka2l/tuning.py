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
from ka2l.errors import AnnotationError, ConfigError, EngineError
from ka2l.records import TrainingRow
from ka2l.section import Section
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

IGNORED = -100
"""Label of a token that carries no loss."""


class TuningConfig(Section):
    """How an adapter is trained each round."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    KINDS: ClassVar[tuple[str, ...]] = ("sft",)
    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {"workers", "cpus_per_worker", "gpus_per_worker", "micro_batch_size", "gradient_checkpointing"}
    )

    kind: str = "sft"
    """``sft``: supervised fine-tuning, loss on the answer's tokens."""
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
    from trl import SFTTrainer

    started = time.monotonic()
    if not rows:
        raise AnnotationError("There are no rows to train on.", hint="Annotate questions or rehearse some.")
    set_seed(seed)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    base = load_model(model_path, trust_remote_code, _weights_dtype(config))
    dataset, example_index = _tokenized(tokenizer, rows, config, chat)
    if config.start == "previous" and previous_adapter is not None:
        model = load_adapter(base, previous_adapter, trainable=True)
    else:
        model = new_adapter(base, config.adapter)
    num_questions = len({row.question_id for row in rows})
    args = _trainer_arguments(config, num_questions, len(dataset), output_dir, seed)
    watcher = _loss_watcher(progress)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[watcher])
    trainer.remove_callback(PrinterCallback)
    example = _marked_example(tokenizer, trainer.data_collator([dataset[example_index]]))
    began = time.monotonic()
    trainer.train()
    training_seconds = time.monotonic() - began

    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * _world_size()
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


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens. A rendered chat prompt holds its special tokens already; others get them here."""
    return list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])


def _row_token_ids(tokenizer: PreTrainedTokenizerBase, row: TrainingRow, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row: the loss falls on the completion and the end token."""
    prompt_ids = prompt_token_ids(tokenizer, row.prompt, chat)
    joint_ids = prompt_token_ids(tokenizer, row.prompt + row.completion, chat)
    # Tokenizers that end a text with a special token put it behind prompt and completion alike; it is added below.
    while prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not row.prompt.endswith(tokenizer.eos_token):
        prompt_ids.pop()
    while joint_ids and joint_ids[-1] == tokenizer.eos_token_id:
        joint_ids.pop()
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = joint_ids[len(prompt_ids) :]
    else:
        # The completion would merge into the prompt's last token. When answering, the model sees the prompt's own
        # tokens, so train on these.
        completion_ids = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    completion_ids = [*completion_ids, tokenizer.eos_token_id]
    return prompt_ids + completion_ids, [IGNORED] * len(prompt_ids) + completion_ids


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
            cache[key] = _row_token_ids(tokenizer, row, chat)
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


def _trainer_arguments(
    config: TuningConfig, num_questions: int, num_rows: int, output_dir: str, seed: int
) -> SFTConfig:
    from trl import SFTConfig

    world_size = _world_size()
    rows_per_worker = math.ceil(min(config.batch_size, num_questions) / world_size)
    accumulation = math.ceil(rows_per_worker / (config.micro_batch_size or rows_per_worker))
    planned_steps = config.max_steps or math.ceil(num_rows / min(config.batch_size, num_questions))
    return SFTConfig(
        output_dir=output_dir,
        per_device_train_batch_size=math.ceil(rows_per_worker / accumulation),
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_steps=config.max_steps or -1,
        train_sampling_strategy="sequential",  # the rows come in their order
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        # A ratio of exactly 1 would read as one step.
        warmup_steps=math.ceil(config.warmup_ratio * planned_steps) if config.warmup_ratio else 0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not _use_gpu(config),
        bf16=_uses_bfloat16(config),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        completion_only_loss=True,
        packing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=_use_gpu(config),
        logging_steps=max(1, min(10, planned_steps // 10)),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )


def _loss_watcher(progress: Callable[[dict[str, Any]], None] | None) -> Any:
    """A trainer callback that keeps the losses, stops at one that is not finite and reports progress from rank 0."""
    from transformers import TrainerCallback

    class LossWatcher(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.began = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            loss, gradient_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                raise EngineError(
                    f"Training diverged at step {state.global_step} of {state.max_steps}: the loss is {loss}, "
                    f"the gradient norm {gradient_norm}.",
                    hint="Lower tuning.learning_rate or set tuning.dtype to float32.",
                )
            self.losses.append(loss)
            if progress is not None and state.is_world_process_zero:
                learning_rate = float(logs["learning_rate"])
                report = {"step": state.global_step, "num_steps": state.max_steps, "loss": loss}
                progress(report | {"learning_rate": learning_rate, "seconds": time.monotonic() - self.began})

    return LossWatcher()


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


def _use_gpu(config: TuningConfig) -> bool:
    import torch

    return config.gpus_per_worker > 0 and torch.cuda.is_available()


def _uses_bfloat16(config: TuningConfig) -> bool:
    import torch

    if config.dtype == "auto":
        return bool(torch.cuda.is_bf16_supported()) if _use_gpu(config) else cpu_has_bfloat16()
    return config.dtype == "bfloat16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated and slower than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def _weights_dtype(config: TuningConfig) -> str:
    # On CPUs bfloat16 only speeds up the products (autocast); memory is no reason to round the base model's weights.
    return "bfloat16" if _uses_bfloat16(config) and _use_gpu(config) else "float32"


def _world_size() -> int:
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
