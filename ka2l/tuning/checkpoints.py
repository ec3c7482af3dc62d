"""Checkpoints within a training: written as it goes on, and resumed from after it was killed.

A checkpoint is transformers' own: weights, optimiser, schedule, random states and losses so far. A training that goes
on from one makes the same steps that it would have made, in the same order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.model.adapter import load_prompt_encoder, save_prompt_encoder

if TYPE_CHECKING:
    from pyarrow import fs as pafs

    from ka2l.tuning.config import TuningConfig

#: Checkpoints of a training, and evaluations on what is held out, where the config does not say.
_SHARES = 10
#: Fewer steps than this are trained again sooner than their checkpoint is written.
_FEWEST_STEPS = 20
_BEST = "best"


class CheckpointFolder(NamedTuple):
    """Where checkpoints are kept while they are needed."""

    path: str
    """A folder that all nodes see."""
    filesystem: pafs.FileSystem | None = None
    """Of the path; None for the local disk."""


class Checkpoints(NamedTuple):
    """Where a training's checkpoints go and come from."""

    keep: Callable[[str | None], None]
    """Called on every worker for each checkpoint: on rank 0 with its folder, which may be gone afterwards, on others
    with None."""
    resume_from: str | None = None
    """Folder of the checkpoint to go on from."""


def step_arguments(config: TuningConfig, num_steps: int, logging_steps: int, *, kept: bool) -> dict[str, Any]:
    """The trainer's arguments about evaluation and checkpoints.

    Args:
        kept: checkpoints are kept by someone.
    """
    if config.holdout:  # the best state is among the checkpoints, so there is one with each evaluation
        steps = config.evaluate_steps or _multiple(max(1, num_steps // _SHARES), logging_steps)
        return {
            "eval_strategy": "steps",
            "eval_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    if not kept or config.checkpoint_steps == 0:
        return {"save_strategy": "no"}
    # With a logged loss, so that the mean over the steps since the last one is the same after a resume.
    steps = config.checkpoint_steps or _multiple(max(_FEWEST_STEPS, num_steps // _SHARES), logging_steps)
    return {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 1}


def _multiple(steps: int, of: int) -> int:
    return -(-steps // of) * of


def checkpoint_keeper(checkpoints: Checkpoints | None) -> Any:
    """A trainer callback that hands on every checkpoint, whole, and takes up what transformers does not."""
    from transformers import TrainerCallback

    resume_from = checkpoints.resume_from if checkpoints else None

    class CheckpointKeeper(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if resume_from is None:
                return
            load_prompt_encoder(model, resume_from)
            if not state.best_global_step:
                return
            is_last = state.best_global_step == state.global_step
            source = Path(resume_from) if is_last else Path(resume_from) / _BEST / "state"
            target = _folder(args, state.best_global_step)
            if state.is_world_process_zero:
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(_BEST), dirs_exist_ok=True)
            state.best_model_checkpoint = str(target)

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            folder = _folder(args, state.global_step)
            if state.is_world_process_zero:
                save_prompt_encoder(model, str(folder))
                # The frozen reference of a comparison; transformers would load it and nothing else.
                shutil.rmtree(folder / "ref", ignore_errors=True)
                best = state.best_model_checkpoint
                if best is not None and Path(best) != folder:
                    # Two folders down: one with an adapter in it would be taken for one of several adapters.
                    only = shutil.ignore_patterns("optimizer*", "scheduler*", "rng_state*", _BEST)
                    shutil.copytree(best, folder / _BEST / "state", ignore=only)
            _wait_for_all()
            # Not at the end: what goes on from there would make one step more.
            if checkpoints is not None and not control.should_training_stop:
                checkpoints.keep(str(folder) if state.is_world_process_zero else None)
            _wait_for_all()

    return CheckpointKeeper()


def early_stopper(patience: int) -> Any:
    """A trainer callback that ends a training whose held-out loss has not improved ``patience`` times in a row.

    Reckoned from the losses logged so far, which a checkpoint holds, so that a resumed training ends at the same step.
    """
    from transformers import TrainerCallback

    class EarlyStopper(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            if len(losses) - 1 - losses.index(min(losses)) >= patience:
                control.should_training_stop = True

    return EarlyStopper()


def clear_checkpoints(output_dir: str) -> None:
    """Remove the trainer's own copies."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _wait_for_all() -> None:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
