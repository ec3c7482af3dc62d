"""Adapters: their config, how they are added to the base model, which engines can serve them, how they are saved."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ka2l.errors import ConfigError, ModelError, first_line
from ka2l.model.loading import ModelConfig, is_directory, load_causal_lm, split_source
from ka2l.model.loading import load_tokenizer as _load_tokenizer
from ka2l.section import Section

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOW_RANK = ("lora", "rslora", "dora", "qlora")
PROMPTS = ("p_tuning", "prefix")
MAX_SERVED_RANK = 512
"""vLLM's largest ``max_lora_rank``."""
MERGED = "merged"
"""Folder in an adapter's own that holds the whole model, where no engine serves the adapter."""
PROMPT_ENCODER = "prompt_encoder.safetensors"
"""What P-tuning goes on from: PEFT keeps the virtual tokens alone, not the network that makes them."""


class AdapterConfig(Section):
    """What is trained. docs/tuning.md says which kind is for what."""

    KINDS: ClassVar[tuple[str, ...]] = (*LOW_RANK, *PROMPTS, "full")

    kind: str = "lora"
    """``lora``: a low-rank update beside the frozen model; ``rslora``: scaled by alpha / sqrt(r); ``dora``: with a
    learnt magnitude; ``qlora``: on a base in 4 bits, GPU only; ``p_tuning``, ``prefix``: virtual tokens; ``full``: all
    weights."""
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r; with ``rslora`` by alpha / sqrt(r)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the update's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, a regular expression, or ``all-linear`` (every linear layer but the LM head)."""
    num_virtual_tokens: int = Field(20, ge=1)
    """Virtual tokens before the prompt, of ``p_tuning`` (their embeddings) and ``prefix`` (keys and values of every
    layer)."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of the network that makes P-tuning's virtual tokens; null for the model's own."""

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a low-rank update."""
        return self.kind in LOW_RANK

    @property
    def is_prompt(self) -> bool:
        """Whether it is virtual tokens, and no weight is changed."""
        return self.kind in PROMPTS

    @property
    def is_merged(self) -> bool:
        """Whether a whole model is written beside the adapter, since vLLM cannot serve the adapter (its
        ``lora/peft_helper.py``: no DoRA; its ``config/lora.py``: the largest rank)."""
        return self.kind == "dora" or (self.is_low_rank and self.r > MAX_SERVED_RANK)

    def result_fields(self) -> dict[str, Any]:
        """As any section's, less what has no meaning for the kind."""
        virtual = {"num_virtual_tokens"} | ({"encoder_hidden_size"} if self.kind == "p_tuning" else set())
        low_rank = {"r", "alpha", "dropout", "target_modules"}
        meant = low_rank if self.is_low_rank else virtual if self.is_prompt else set()
        return {name: value for name, value in super().result_fields().items() if name in meant | {"kind"}}

    def served(self, sampler_kind: str) -> str:
        """How a trained state reaches the sampler, in a sentence; raises ConfigError where it cannot."""
        if self.is_prompt:
            if sampler_kind == "vllm":
                raise ConfigError(
                    f"tuning.adapter.kind {self.kind} trains virtual tokens, which vLLM cannot serve",
                    hint="Set sampler.kind=transformers, which is slower, or tuning.adapter.kind=lora.",
                )
            return f"{self.kind}: its {self.num_virtual_tokens} virtual tokens are sampled with {sampler_kind}."
        if self.kind == "full":
            return "full: every round trains all weights and writes a whole model, which the sampler loads."
        if self.is_merged:
            why = "vLLM serves no DoRA" if self.kind == "dora" else f"vLLM serves ranks up to {MAX_SERVED_RANK}"
            return f"{self.kind} of rank {self.r}: merged into a whole model after training, since {why}."
        return f"{self.kind} of rank {self.r}: the adapter is served on the base model as it is."


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


def load_in_4_bits(model_path: str, trust_remote_code: bool, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """The base model on this process's GPU in 4-bit NormalFloat (QLoRA, https://arxiv.org/abs/2305.14314).

    Raises:
        ConfigError: there is no GPU, or bitsandbytes is not installed.
    """
    import torch

    check_quantisation(has_gpu=torch.cuda.is_available())
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32,
    )
    device = torch.cuda.current_device()
    base = load_causal_lm(
        model_path, "auto", trust_remote_code, quantization_config=quantisation, device_map={"": device}
    )
    prepared: PreTrainedModel = prepare_model_for_kbit_training(base, use_gradient_checkpointing=gradient_checkpointing)
    return prepared


def check_quantisation(*, has_gpu: bool) -> None:
    """Raise ConfigError unless a base model in 4 bits can be trained on."""
    if not has_gpu:
        raise ConfigError(
            "tuning.adapter.kind qlora holds the base model in 4 bits, which needs a GPU",
            hint="Set tuning.gpus_per_worker=1 where there is one, else tuning.adapter.kind=lora.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "tuning.adapter.kind qlora needs bitsandbytes, which is not installed",
            hint="pip install 'ka2l[qlora]', on every node.",
        )


def new_adapter(base: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """The base model, frozen, with a new adapter; with ``full`` the base model itself, all of it trainable.

    Raises:
        ModelError: the target modules match nothing.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if config.kind not in AdapterConfig.KINDS:
        raise ConfigError(
            f"tuning.adapter.kind {config.kind!r} is not known", hint=f"One of {', '.join(AdapterConfig.KINDS)}."
        )
    if config.kind == "full":
        return base  # type: ignore[return-value]
    if config.is_low_rank:
        _check_targets(base, config.target_modules)
    try:
        model = get_peft_model(base, _peft_config(config, base))
    except ValueError as error:
        raise _target_error(base, f"{config.kind} cannot be put on the model: {first_line(error)}") from error
    # TRL computes the loss from the LM head's own weight, so an adapter on it would never be trained.
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise _target_error(base, "tuning.adapter.target_modules: the LM head cannot be adapted.")
    return model


def _peft_config(config: AdapterConfig, base: PreTrainedModel) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig

    if config.kind == "p_tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            encoder_hidden_size=config.encoder_hidden_size or base.config.get_text_config(decoder=True).hidden_size,
        )
    if config.kind == "prefix":
        # From zero on: random keys would draw attention from the prompt before anything is learnt.
        return PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, init_weights="zero"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
    )


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter; what training wrote is otherwise a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def is_prompt_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter that is virtual tokens."""
    if not is_adapter(folder):
        return False
    peft_type = json.loads((Path(folder) / "adapter_config.json").read_text()).get("peft_type")
    return peft_type in ("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")


def load_adapter(base: PreTrainedModel, adapter_dir: str, trainable: bool = False) -> PeftModel:
    """The base model with a saved adapter; raises ModelError where it is missing or was made for another model."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not is_adapter(adapter_dir):  # PEFT would look for a hub id of that name
        raise ModelError(f"{adapter_dir} holds no adapter_config.json", hint="Give the folder that tuning wrote.")
    try:
        if trainable and is_prompt_adapter(adapter_dir):
            return _trainable_prompt(base, adapter_dir)
        return PeftModel.from_pretrained(base, adapter_dir, is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter in {adapter_dir}: {first_line(error)}") from error


def _trainable_prompt(base: PreTrainedModel, adapter_dir: str) -> PeftModel:
    """Virtual tokens to train on. PEFT loads them to read with alone, since it does not keep what P-tuning needs."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(adapter_dir)
    config.inference_mode = False
    model: PeftModel = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(adapter_dir, device="cpu"))
    load_prompt_encoder(model, adapter_dir)
    return model


def save_prompt_encoder(model: Any, folder: str) -> None:
    """Keep the network that makes P-tuning's virtual tokens; nothing where there is none."""
    from safetensors.torch import save_file

    encoders = getattr(model, "prompt_encoder", None)
    if encoders is not None and len(state := encoders["default"].state_dict()) > 1:
        save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / PROMPT_ENCODER)


def load_prompt_encoder(model: Any, folder: str) -> None:
    """Take up what `save_prompt_encoder` kept; nothing where it kept nothing."""
    from safetensors.torch import load_file

    path = Path(folder) / PROMPT_ENCODER
    if path.is_file():
        model.prompt_encoder["default"].load_state_dict(load_file(path))


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


def save_adapter(model: Any, model_path: str, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapter so that the same training gives the same bytes and names no folder of this machine.

    Args:
        state_dict: the model's, where its weights are spread over workers.
    """
    model.save_pretrained(output_dir, save_embedding_layers=False, selected_adapters=["default"], state_dict=state_dict)
    folder = Path(output_dir)
    save_prompt_encoder(model, output_dir)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    if Path(model_path).exists():
        fields["base_model_name_or_path"] = Path(model_path).resolve().name
    else:
        fields["base_model_name_or_path"], fields["revision"] = split_source(model_path)
    if isinstance(fields.get("target_modules"), list):  # a set in PEFT, in any order
        fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def save_model(
    model: Any, model_path: str, output_dir: str, trust_remote_code: bool, state_dict: dict[str, Any] | None = None
) -> None:
    """Write a whole model with its tokenizer, so that it loads wherever the model that it was trained from does."""
    from transformers import AutoTokenizer

    model.save_pretrained(output_dir, state_dict=state_dict)
    path, revision = split_source(model_path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
    tokenizer.save_pretrained(output_dir)
    if trust_remote_code and is_directory(model_path):
        for file in Path(model_path).expanduser().glob("*.py"):
            shutil.copy(file, output_dir)


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
