"""DPO on better and worse answers: stage II of KnowTuning (arXiv 2402.11176, equations 9 to 11).

From the stage-I adapter on, L = L_DPO + gamma * L_SFT(better), by TRL's ``DPOTrainer`` (DPO: arXiv 2305.18290). The
reference is the stage-I model: a frozen copy of its adapter on the same base weights, switched to for the reference's
log-probabilities, so no second model is in memory.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import AnnotationError, ConfigError
from ka2l.model.adapter import load_tokenizer
from ka2l.model.tokens import row_token_ids
from ka2l.seeds import row_seed
from ka2l.tuning.checkpoints import Checkpoints
from ka2l.tuning.knowtuning import KnowTuningConfig
from ka2l.tuning.sft import TuneResult, TuningConfig, completion
from ka2l.tuning.trainer import (
    Schedule,
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


class ComparisonRow(NamedTuple):
    """Two answers to one prompt."""

    prompt: str
    better: str
    """As it follows the prompt, see `ka2l.tuning.sft.completion`."""
    worse: str
    aspect: str
    """What is worse about it: one of `ka2l.tuning.knowtuning.ASPECTS`."""
    question_id: str


def comparison_rows(
    pairs: Sequence[tuple[str, str, str, str, str]], config: KnowTuningConfig, seed: int, *, chat: bool
) -> list[ComparisonRow]:
    """All rows of stage II in the order they are trained on: ``num_epochs`` passes, each in an order of its own.

    Args:
        pairs: (question_id, aspect, prompt, better answer, worse answer), in any order.
        seed: the run's.
        chat: the prompts were rendered by a chat template.
    """
    ordered = sorted(pairs)
    num_rows = math.ceil(config.num_epochs * len(ordered))
    rows: list[ComparisonRow] = []
    for pass_index in range(math.ceil(config.num_epochs)):
        order = random.Random(row_seed(seed, pass_index, "comparison_rows", "")).sample(ordered, len(ordered))
        rows += [
            ComparisonRow(prompt, completion(better, chat), completion(worse, chat), aspect, question_id)
            for question_id, aspect, prompt, better, worse in order
        ]
    return rows[:num_rows]


def compare(
    model_path: str,
    rows: Sequence[ComparisonRow],
    config: TuningConfig,
    output_dir: str,
    seed: int,
    adapter_dir: str,
    trust_remote_code: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    *,
    chat: bool,
) -> TuneResult:
    """Train what is in ``adapter_dir`` on ``rows``, once through and in their order.

    Works alone or in a ``torch.distributed`` process group, as `ka2l.tuning.sft.tune` does.

    Args:
        model_path: model directory or hub id.
        config: ``config.knowtuning`` says how stage II trains, the rest is as in stage I.
        adapter_dir: the stage-I adapter, or the whole model: where training starts, and the reference.
        progress, checkpoints: as for `ka2l.tuning.sft.tune`.
        chat: the prompts were rendered by a chat template.

    Returns:
        Metrics num_rows, num_over_long, num_steps, batch_size, first_loss, last_loss (nats), num_trainable_parameters,
        num_tokens (not padding, of better and worse answers with their prompts), seconds, training_seconds.

    Raises:
        AnnotationError: no rows.
        ConfigError: every row is longer than ``max_length``.
        ModelError: the model or adapter cannot be loaded.
        EngineError: the loss is not a finite number.
    """
    from transformers import PrinterCallback, set_seed
    from trl import DPOConfig

    started = time.monotonic()
    if not rows:
        raise AnnotationError("There is nothing to compare.", hint="Set tuning.knowtuning.aspects to [].")
    config = config.model_copy(update={"holdout": 0.0})  # of comparisons nothing is held out
    set_seed(seed)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    dataset = _tokenized(tokenizer, rows, config, chat)
    model = trainable_model(model_path, config, adapter_dir, trust_remote_code)
    own = config.knowtuning
    schedule = Schedule(len(dataset), min(own.batch_size, len(dataset)), own.micro_batch_size, own.learning_rate)
    args = DPOConfig(
        **trainer_arguments(config, schedule, output_dir, seed, kept=checkpoints is not None),
        # Where all weights are trained there is no adapter to switch: the reference speaks before training begins.
        precompute_ref_log_probs=config.adapter.kind == "full" and config.parallel == "ddp",
        beta=own.dpo_beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, own.sft_weight],
    )
    trainer = _trainer_class()(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[loss_watcher(progress)]
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    losses = train(trainer, config, checkpoints)
    training_seconds = time.monotonic() - began
    metrics = training_metrics(trainer, model, losses, len(dataset), len(rows)) | {
        "num_tokens": sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset
        ),
        "seconds": time.monotonic() - started,
        "training_seconds": training_seconds,
    }
    save_trained(trainer, config, model_path, output_dir, trust_remote_code)
    return TuneResult(output_dir, metrics)


def _trainer_class() -> Any:
    from trl import DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """Takes rows that are tokenized already: TRL would add a second BOS to prompts that a chat template rendered,
        and end a prompt early where its last token would merge with the answer."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenizedDPOTrainer


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[ComparisonRow], config: TuningConfig, chat: bool
) -> Dataset:
    """Rows as prompt_ids, chosen_ids and rejected_ids; those that are too long are left out, never cut."""
    from datasets import Dataset

    kept: list[dict[str, list[int]]] = []
    shortest = 0
    for row in rows:
        prompt_ids, chosen_ids = row_token_ids(tokenizer, row.prompt, row.better, chat)
        _, rejected_ids = row_token_ids(tokenizer, row.prompt, row.worse, chat)
        length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        shortest = min(shortest or length, length)
        if length <= config.max_length:
            kept.append({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    if not kept:
        raise ConfigError(
            f"Every comparison is longer than tuning.max_length = {config.max_length} tokens.",
            hint=f"The shortest has {shortest} tokens: set tuning.max_length to more than that.",
        )
    return Dataset.from_list(kept)
