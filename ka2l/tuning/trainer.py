"""What SFT and DPO share: trainer arguments, the trainable model, losses, saving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import ConfigError, EngineError
from ka2l.model.adapter import (
    MERGED,
    check_quantisation,
    load_adapter,
    load_in_4_bits,
    load_model,
    load_prompt_encoder,
    new_adapter,
    save_adapter,
    save_model,
)
from ka2l.tuning.checkpoints import Checkpoints, checkpoint_keeper, clear_checkpoints, step_arguments

if TYPE_CHECKING:
    from ka2l.tuning.config import TuningConfig


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


def trainer_arguments(
    config: TuningConfig, schedule: Schedule, output_dir: str, seed: int, *, kept: bool = False
) -> dict[str, Any]:
    """Arguments of any of TRL's trainers, for rows that are trained on in their order.

    Args:
        kept: someone keeps the checkpoints.
    """
    rows_per_worker = math.ceil(schedule.batch_size / world_size())
    accumulation = math.ceil(rows_per_worker / (schedule.micro_batch_size or rows_per_worker))
    planned_steps = schedule.max_steps or math.ceil(schedule.num_rows / schedule.batch_size)
    logging_steps = max(1, min(10, planned_steps // 10))
    sharded = config.parallel == "fsdp" and world_size() > 1
    return step_arguments(config, planned_steps, logging_steps, kept=kept) | {
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
        "gradient_checkpointing": config.gradient_checkpointing and not sharded,
        **(_sharded(config) if sharded else {}),
        "use_cpu": not use_gpu(config),
        "bf16": uses_bfloat16(config),
        "max_length": None,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": use_gpu(config),
        "logging_steps": logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }


def _sharded(config: TuningConfig) -> dict[str, Any]:
    """FSDP2: each worker holds a part of weights, gradients and optimiser states and gathers a layer when it is due."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",  # whole on rank 0, which writes it
            "activation_checkpointing": config.gradient_checkpointing,
        },
    }


def trainable_model(
    model_path: str, config: TuningConfig, start: str | None = None, trust_remote_code: bool = False
) -> Any:
    """What is trained: the base model with an adapter, or all of it.

    Args:
        start: what an earlier training wrote, to go on from; None for a new adapter on the base model.

    Raises:
        ConfigError: it needs a GPU or a package that is not there.
        ModelError: model or adapter cannot be loaded, or the target modules match nothing.
    """
    adapter = config.adapter
    if adapter.kind == "full":
        # In float32, whatever the products are computed in: small updates would be lost in bfloat16 weights.
        return load_model(start or model_path, trust_remote_code, "float32")
    if adapter.kind == "qlora":
        base = load_in_4_bits(model_path, trust_remote_code, gradient_checkpointing=config.gradient_checkpointing)
    else:
        base = load_model(model_path, trust_remote_code, weights_dtype(config))
    return new_adapter(base, adapter) if start is None else load_adapter(base, start, trainable=True)


def train(trainer: Any, config: TuningConfig, checkpoints: Checkpoints | None) -> list[float]:
    """Train to the end, from a checkpoint where there is one; returns the losses logged over the whole training."""
    trainer.add_callback(checkpoint_keeper(checkpoints))
    if trainer.is_world_process_zero():
        clear_checkpoints(trainer.args.output_dir)  # of a training that was killed
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoints.resume_from if checkpoints else None)
    if config.holdout and trainer.state.best_model_checkpoint:
        load_prompt_encoder(trainer.model, trainer.state.best_model_checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def training_metrics(
    trainer: Any, model: Any, losses: Sequence[float], num_trained: int, num_given: int
) -> dict[str, Any]:
    """What is reported of every training.

    Args:
        losses: as `train` returned them.
        num_trained: rows of the data set.
        num_given: rows that were to be trained on, those too long included.
    """
    args = trainer.args
    return {
        "num_rows": num_trained,
        "num_over_long": num_given - num_trained,
        "num_steps": trainer.state.global_step,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def save_trained(trainer: Any, config: TuningConfig, model_path: str, output_dir: str, trust_remote_code: bool) -> None:
    """Write what was trained, from rank 0: an adapter, merged into a whole model where no engine serves it, or a whole
    model."""
    import torch

    sharded = config.parallel == "fsdp" and world_size() > 1
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.is_world_process_zero():
        clear_checkpoints(output_dir)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if config.adapter.kind != "full":
            save_adapter(model, model_path, output_dir, state)
            if config.adapter.is_merged:
                from ka2l.model.merging import merge_adapter  # which needs this module

                merge_adapter(model_path, output_dir, str(Path(output_dir) / MERGED), trust_remote_code)
        else:
            dtype = getattr(torch, weights_dtype(config))
            if state is None:
                model.to(dtype)
            else:
                state = {name: value.to(dtype) for name, value in state.items()}
            save_model(model, model_path, output_dir, trust_remote_code, state)
    trainer.accelerator.wait_for_everyone()


def check_tuning(config: TuningConfig) -> None:
    """Raise ConfigError where something that a training needs can be seen to be missing, before anything is spent."""
    if config.adapter.kind == "qlora":
        check_quantisation(has_gpu=config.gpus_per_worker > 0)


def check_packing(model: Any) -> None:
    """Raise ConfigError unless rows that are laid end to end see themselves alone."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([[5, 9, 6, 7, 8]], device=base.device)
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=base.device)
    was_training = base.training
    base.eval()
    with torch.no_grad():
        packed = base(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 2:].float()
        alone = base(input_ids=ids[:, 2:], use_cache=False).logits[0].float()
    base.train(was_training)
    if not torch.allclose(packed, alone, rtol=0.05, atol=0.05 * float(alone.abs().max())):
        raise ConfigError(
            f"tuning.packing: the attention of {type(base).__name__} ({base.config._attn_implementation}) lets rows "
            "that share a sequence see each other",
            hint="Set tuning.packing=false.",
        )


def loss_watcher(progress: Callable[[dict[str, Any]], None] | None) -> Any:
    """A trainer callback that stops at a loss that is not finite and reports progress from rank 0."""
    from transformers import TrainerCallback

    class LossWatcher(TrainerCallback):
        def __init__(self) -> None:
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
