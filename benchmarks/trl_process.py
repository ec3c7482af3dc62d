"""A side of ``bench_trl.py``: ``python trl_process.py SIDE SPEC.json``, where SIDE is ``ka2l`` or ``trl``.

``trl`` is what TRL's documentation shows: its trainers on rows of text, with a LoRA config or an adapter.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sides import serve, timed

from ka2l.model.adapter import load_tokenizer
from ka2l.schemas import TrainingRow
from ka2l.tuning.config import TuningConfig
from ka2l.tuning.dpo import ComparisonRow, compare
from ka2l.tuning.sft import tune
from ka2l.tuning.trainer import Schedule, trainer_arguments


class Training:
    """SFT from the base model, and DPO from the adapter that the first SFT made.

    Args:
        spec: ``model``, ``config`` (a `TuningConfig`), ``rows`` and ``pairs`` as tuples of their fields, ``folder``.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.model: str = spec["model"]
        self.config = TuningConfig.model_validate(spec["config"])
        self.rows = [TrainingRow(*row) for row in spec["rows"]]
        self.pairs = [ComparisonRow(*row) for row in spec["pairs"]]
        self.folder = Path(spec["folder"])

    def answer(self, what: str, adapter: str = "") -> dict[str, Any]:
        """One training from loading to the saved adapter.

        Returns:
            ``seconds`` of the training alone, ``total_seconds``, ``num_steps``, ``losses`` as they were logged, and
            ``peak_mib``: the process's highest resident memory meanwhile.
        """
        output = self.folder / what
        shutil.rmtree(output, ignore_errors=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        made, total = timed(lambda: getattr(self, what)(str(output), adapter))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        return made | {"total_seconds": total, "peak_mib": int(peak[1]) / 1024}


class Ours(Training):
    """`ka2l.tuning.sft.tune` and `ka2l.tuning.dpo.compare`."""

    def sft(self, output: str, _: str) -> dict[str, Any]:
        """A new adapter."""
        losses: list[float] = []
        report = lambda step: losses.append(step["loss"])  # noqa: E731
        metrics = tune(self.model, self.rows, self.config, output, 0, progress=report, chat=False).metrics
        return {"seconds": metrics["training_seconds"], "num_steps": metrics["num_steps"], "losses": losses}

    def dpo(self, output: str, adapter: str) -> dict[str, Any]:
        """An adapter trained further."""
        losses: list[float] = []
        report = lambda step: losses.append(step["loss"])  # noqa: E731
        metrics = compare(self.model, self.pairs, self.config, output, 0, adapter, progress=report, chat=False).metrics
        return {"seconds": metrics["training_seconds"], "num_steps": metrics["num_steps"], "losses": losses}


class Plain(Training):
    """TRL by itself, with the same arguments."""

    def sft(self, output: str, _: str) -> dict[str, Any]:
        """A new adapter."""
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, set_seed
        from trl import SFTConfig, SFTTrainer

        set_seed(0)
        config, adapter = self.config, self.config.adapter
        schedule = Schedule(len(self.rows), config.batch_size, config.micro_batch_size, config.learning_rate)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.model, dtype="float32"),
            args=SFTConfig(**trainer_arguments(config, schedule, output, 0)),
            train_dataset=Dataset.from_list(
                [{"prompt": row.prompt, "completion": row.completion} for row in self.rows]
            ),
            processing_class=load_tokenizer(self.model),
            peft_config=lora,
        )
        return self._trained(trainer, output)

    def dpo(self, output: str, adapter: str) -> dict[str, Any]:
        """An adapter trained further; TRL itself copies it as the reference."""
        from datasets import Dataset
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, set_seed
        from trl import DPOConfig, DPOTrainer

        set_seed(0)
        own = self.config.knowtuning
        schedule = Schedule(len(self.pairs), own.batch_size, own.micro_batch_size, own.learning_rate)
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype="float32")
        rows = [{"prompt": row.prompt, "chosen": row.better, "rejected": row.worse} for row in self.pairs]
        trainer = DPOTrainer(
            model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
            args=DPOConfig(
                **trainer_arguments(self.config, schedule, output, 0), beta=own.dpo_beta, loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, own.sft_weight],
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(self.model),
        )  # fmt: skip
        return self._trained(trainer, output)

    def _trained(self, trainer: Any, output: str) -> dict[str, Any]:
        _, seconds = timed(trainer.train)
        trainer.save_model(output)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"seconds": seconds, "num_steps": trainer.state.global_step, "losses": losses}


if __name__ == "__main__":
    import datasets

    # The second time TRL would find its tokenized rows in the disk cache, and a first one is what users pay.
    datasets.disable_caching()
    side = {"ka2l": Ours, "trl": Plain}[sys.argv[1]]
    serve(side(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))).answer)
