"""Computes how many GPUs a model's engine needs from the model's config; no weight is loaded."""

from __future__ import annotations

import math
from typing import NamedTuple

from ka2l.errors import ConfigError, ModelError, first_line
from ka2l.model.loading import split_source

_GIB = 2**30
#: Bytes an element.
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Beside weights and KV cache, on each GPU: activations, CUDA's context and graphs. An assumption, to be measured.
_OVERHEAD_GIB = 3.0
#: What of a GPU's memory an engine may fill.
_USABLE = 0.92
#: Shares of a GPU that engines are given; they pack without a remainder.
_SHARES = (0.25, 0.5, 1.0)


class ModelNeeds(NamedTuple):
    """What a model takes, whatever it runs on."""

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    """Keys and values of all layers; 0 for a model without attention heads in its config."""
    num_heads: int
    """Attention heads: tensor parallelism divides them."""
    max_positions: int = 0
    """Longest sequence that the config names, tokens; 0 where it names none."""


class EngineShape(NamedTuple):
    """The GPUs of one engine."""

    tensor_parallel_size: int
    gpu_share: float
    """Of each GPU: below 1 only for an engine on a single one, which shares it with others."""
    gpu_memory_utilization: float
    """Of each GPU's memory, as vLLM counts it."""

    @property
    def gpus(self) -> float:
        """GPUs in all, as Ray counts them."""
        return self.tensor_parallel_size * self.gpu_share


def model_needs(path: str, dtype: str = "bfloat16", *, trust_remote_code: bool = False) -> ModelNeeds:
    """Counts parameters on the meta device.

    Args:
        path: directory or hub id, or ``id@revision``.
        dtype: ``auto`` counts as bfloat16, unless the config says float32.

    Raises:
        ModelError: there is no config that transformers can build a causal model from.
        ConfigError: an unknown dtype.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        folder, revision = split_source(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the size of {path} cannot be read from its config: {first_line(error)}",
            hint="Name a directory or hub id with a config.json of a causal language model.",
        ) from error
    if dtype == "auto":
        dtype = "float32" if str(getattr(config, "dtype", None)) == "torch.float32" else "bfloat16"
    if dtype not in _WIDTHS:
        raise ConfigError(f"model.dtype {dtype!r} is not known", hint=f"Use one of auto, {', '.join(_WIDTHS)}.")
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    head_dim = int(getattr(text, "head_dim", 0) or (text.hidden_size // heads if heads else 0))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelNeeds(
        num_parameters=num_parameters,
        weight_bytes=num_parameters * _WIDTHS[dtype],
        kv_bytes_per_token=2 * int(text.num_hidden_layers) * kv_heads * head_dim * _WIDTHS[dtype],
        num_heads=max(1, heads),
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 0),
    )


def engine_shape(needs: ModelNeeds, gpu_gib: float, num_tokens: int) -> EngineShape:
    """The smallest part of GPUs of ``gpu_gib`` GiB that holds the model and a KV cache of ``num_tokens``.

    A quarter or half of one GPU, a whole one, or a power of two of them that divides the attention heads.

    Raises:
        ConfigError: not even as many GPUs as the heads can be divided by are enough.
    """
    held_gib = (needs.weight_bytes + num_tokens * needs.kv_bytes_per_token) / _GIB
    for share in _SHARES:
        if held_gib + _OVERHEAD_GIB <= _USABLE * share * gpu_gib:
            return EngineShape(1, share, round(_USABLE * share, 3))
    parts = 2
    while needs.num_heads % parts == 0:
        if held_gib / parts + _OVERHEAD_GIB <= _USABLE * gpu_gib:
            return EngineShape(parts, 1.0, _USABLE)
        parts *= 2
    raise ConfigError(
        f"the model needs {math.ceil(held_gib)} GiB for weights and cache; {parts // 2} GPUs of {gpu_gib:g} GiB, the "
        f"most that its {needs.num_heads} attention heads can be divided among, do not hold that",
        hint="Use GPUs with more memory, a smaller sampler.max_model_len, or a smaller model.",
    )
