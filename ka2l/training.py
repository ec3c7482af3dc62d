"""What all training of the model under study shares: tokens of a row, the trainer's arguments, its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ka2l.tuning import TuningConfig


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens. A rendered chat prompt holds its special tokens already; others get them here."""
    return list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])


def row_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, chat: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of what is to follow it, the end token included."""
    prompt_ids = prompt_token_ids(tokenizer, prompt, chat)
    joint_ids = prompt_token_ids(tokenizer, prompt + completion, chat)
    # Tokenizers that end a text with a special token put it behind prompt and completion alike; it is added below.
    while prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        prompt_ids.pop()
    while joint_ids and joint_ids[-1] == tokenizer.eos_token_id:
        joint_ids.pop()
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = joint_ids[len(prompt_ids) :]
    else:
        # The completion would merge into the prompt's last token. When answering, the model sees the prompt's own
        # tokens, so train on these.
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*completion_ids, tokenizer.eos_token_id]


class Schedule(NamedTuple):
    """How long, how fast and in which portions."""

    num_rows: int
    """In all, each trained on once."""
    batch_size: int
    """Rows an optimiser step, over all workers."""
    micro_batch_size: int | None
    """Rows a forward pass on one worker; None: all of a step."""
    learning_rate: float
    max_steps: int | None = None
    """Optimiser steps, where that is not what the rows make."""


def trainer_arguments(config: TuningConfig, schedule: Schedule, output_dir: str, seed: int) -> dict[str, Any]:
    """Arguments of any of TRL's trainers, for rows that are trained on in their order."""
    rows_per_worker = math.ceil(schedule.batch_size / world_size())
    accumulation = math.ceil(rows_per_worker / (schedule.micro_batch_size or rows_per_worker))
    planned_steps = schedule.max_steps or math.ceil(schedule.num_rows / schedule.batch_size)
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": math.ceil(rows_per_worker / accumulation),
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "max_steps": schedule.max_steps or -1,
        "train_sampling_strategy": "sequential",  # the rows come in their order
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": config.scheduler,
        # As a count, since a ratio of exactly 1 would read as one step. The first step of a warm-up changes nothing.
        "warmup_steps": min(math.ceil(config.warmup_ratio * planned_steps), planned_steps - 1),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_cpu": not use_gpu(config),
        "bf16": uses_bfloat16(config),
        "max_length": None,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": use_gpu(config),
        "logging_steps": max(1, min(10, planned_steps // 10)),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }


def loss_watcher(progress: Callable[[dict[str, Any]], None] | None) -> Any:
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


def use_gpu(config: TuningConfig) -> bool:
    """Whether training runs on a GPU."""
    import torch

    return config.gpus_per_worker > 0 and torch.cuda.is_available()


def uses_bfloat16(config: TuningConfig) -> bool:
    """Whether products are computed in bfloat16."""
    import torch

    if config.dtype == "auto":
        return bool(torch.cuda.is_bf16_supported()) if use_gpu(config) else cpu_has_bfloat16()
    return config.dtype == "bfloat16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated and slower than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def weights_dtype(config: TuningConfig) -> str:
    """What the base model's weights are loaded as."""
    # On CPUs bfloat16 only speeds up the products (autocast); memory is no reason to round the base model's weights.
    return "bfloat16" if uses_bfloat16(config) and use_gpu(config) else "float32"


def world_size() -> int:
    """Data-parallel workers."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
