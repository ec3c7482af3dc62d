"""A causal language model whose layers can be read: loaded with its adapter, its blocks found, its layers numbered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ka2l.errors import ConfigError, ModelError
from ka2l.model.adapter import is_prompt_adapter, load_adapter
from ka2l.model.loading import load_causal_lm
from ka2l.model.virtual_tokens import split_state

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel


def resolve_layers(layers: Literal["all"] | list[int], depth: int) -> list[int]:
    if layers == "all":
        return list(range(depth + 1))
    wrong = [layer for layer in layers if not -depth - 1 <= layer <= depth]
    if wrong:
        raise ConfigError(
            f"extraction.layers: {wrong} are not layers of this model",
            hint=f"It has layers 0 (embedding output) to {depth}.",
        )
    return sorted({layer % (depth + 1) for layer in layers})


def rope_switch(config: PreTrainedConfig) -> int | None:
    """Number of tokens above which LongRoPE takes its long factors, or None for other position encodings."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def find_blocks(decoder: nn.Module, num_hidden_layers: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder blocks with their owner and name there: the one list of modules as long as the model is deep."""
    from torch import nn

    for owner in decoder.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_hidden_layers:
                return owner, name, child
    raise ModelError(
        f"{type(decoder).__name__} has no list of {num_hidden_layers} decoder layers",
        hint="Hidden states can be read from decoder-only language models of transformers.",
    )


def load_readable_model(
    model_path: str, dtype: str, adapter: str | None, trust_remote_code: bool, device: torch.device
) -> tuple[Any, DynamicCache | None]:
    """The causal language model, with the adapter's layers in place or its virtual tokens beside it."""
    model = load_causal_lm(model_path, dtype, trust_remote_code)
    if adapter is None:
        return model, None
    if is_prompt_adapter(adapter):  # read before the layers above the deepest wanted one are cut off
        return split_state(load_adapter(model, adapter).to(device).eval())
    _add_adapter(model, adapter)
    return model, None


def _add_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Put the LoRA layers of ``adapter`` into ``model``; raises ModelError unless every one of them finds its place."""
    from peft.utils import load_peft_weights

    adapted = load_adapter(model, adapter)
    # PEFT only warns about weights that find no module, and modules that find no weights.
    saved = {name for name in load_peft_weights(adapter, device="cpu") if ".lora_A." in name}
    placed = {name.replace(".default", "") for name, _ in adapted.named_parameters() if ".lora_A." in name}
    if saved != placed:
        raise ModelError(
            f"adapter {adapter} holds weights of {len(saved)} modules, {len(saved & placed)} of which the model has; "
            f"{len(placed - saved)} adapted modules would stay untrained",
            hint="Use the base model the adapter was trained on; its name is in adapter_config.json.",
        )
