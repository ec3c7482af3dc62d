"""The adapter: what it is, how it is put on a model, and how it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ka2l.errors import ConfigError, ModelError, first_line
from ka2l.models import ModelConfig, load_causal_lm
from ka2l.models import load_tokenizer as _load_tokenizer
from ka2l.section import Section

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AdapterConfig(Section):
    """What is trained: a low-rank update beside the frozen base model."""

    KINDS: ClassVar[tuple[str, ...]] = ("lora",)

    kind: str = "lora"
    """Only ``lora``."""
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, a regular expression, or ``all-linear`` (every linear layer but the LM head)."""


def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError where it is missing or has no end token."""
    tokenizer = _load_tokenizer(ModelConfig(path=model_path, trust_remote_code=trust_remote_code))
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {model_path} has no end-of-sequence token, so a tuned model could not learn to stop",
            hint="Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def load_model(model_path: str, trust_remote_code: bool = False, dtype: str = "float32") -> PreTrainedModel:
    """The base model with its LM head. Raises ModelError where config or weights are missing or unreadable."""
    return load_causal_lm(model_path, dtype, trust_remote_code)


def new_adapter(base: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """The base model, frozen, with a new adapter; raises ModelError where the target modules match nothing."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if config.kind != "lora":
        raise ConfigError(f"tuning.adapter.kind {config.kind!r} is not known", hint="Use lora.")
    targets = config.target_modules
    _check_targets(base, targets)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise _target_error(base, f"LoRA cannot be put on the model: {first_line(error)}") from error
    # TRL computes the loss from the LM head's own weight, so an adapter on it would never be trained.
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise _target_error(base, "tuning.adapter.target_modules: the LM head cannot be adapted.")
    return model


def load_adapter(base: PreTrainedModel, adapter_dir: str, trainable: bool = False) -> PeftModel:
    """The base model with a saved adapter; raises ModelError where it is missing or was made for another model."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (Path(adapter_dir) / "adapter_config.json").is_file():  # PEFT would look for a hub id of that name
        raise ModelError(f"{adapter_dir} holds no adapter_config.json", hint="Give the folder that tuning wrote.")
    try:
        return PeftModel.from_pretrained(base, adapter_dir, is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter in {adapter_dir}: {first_line(error)}") from error


def _check_targets(base: PreTrainedModel, targets: str | list[str]) -> None:
    names = [name for name, _ in base.named_modules()]
    if isinstance(targets, str):
        return  # 'all-linear' or a regular expression: PEFT checks that it matches something
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _target_error(base, f"tuning.adapter.target_modules: the model has no module named {target!r}.")


def _target_error(base: PreTrainedModel, message: str) -> ModelError:
    import torch

    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return ModelError(message, hint=f"Linear modules of this model: {', '.join(sorted(linear)) or 'none'}.")


def save_adapter(model: PeftModel, model_path: str, output_dir: str) -> None:
    """Write the adapter so that the same training gives the same bytes and names no folder of this machine."""
    model.save_pretrained(output_dir, save_embedding_layers=False, selected_adapters=["default"])
    folder = Path(output_dir)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    if Path(model_path).exists():
        fields["base_model_name_or_path"] = Path(model_path).resolve().name
    if isinstance(fields["target_modules"], list):  # a set in PEFT, in any order
        fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def check_adapter(model_path: str, config: AdapterConfig, trust_remote_code: bool = False) -> None:
    """Raise ModelError where the adapter does not fit the model; reads the model's config, not its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
        new_adapter(base, config)
