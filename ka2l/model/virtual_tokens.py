"""Virtual tokens of P-tuning and prefix tuning as keys and values before the prompt.

Every reader treats both alike: it starts from a cache that holds them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ka2l.model.adapter import load_adapter
from ka2l.model.loading import load_causal_lm

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache


def open_state(
    model_path: str, adapter: str | None, dtype: str, device: str | torch.device, trust_remote_code: bool = False
) -> tuple[Any, DynamicCache | None]:
    """A model state to read with: the model on its device, with the layers of a low-rank adapter in place, and the keys
    and values of virtual tokens for one row; None where the adapter has none.

    Raises:
        ModelError: model or adapter cannot be loaded.
    """
    model: Any = load_causal_lm(model_path, dtype, trust_remote_code)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return split_state(model.to(device).eval())


def split_state(model: Any) -> tuple[Any, DynamicCache | None]:
    """A loaded model on its device, and the keys and values of its virtual tokens for one row, if it has any."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or not config.is_prompt_learning:
        return model, None
    return model.get_base_model(), _virtual_cache(model)


def num_virtual_tokens(cache: DynamicCache | None) -> int:
    """How many tokens a cache holds; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def _virtual_cache(model: Any) -> DynamicCache:
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        made = model.get_prompt(batch_size=1)
        if isinstance(made, DynamicCache):
            return made
        base = model.get_base_model()
        cache = DynamicCache(config=base.config)
        # Without the LM head: what the virtual tokens would say is not asked.
        base.base_model(inputs_embeds=made.to(base.dtype), past_key_values=cache, use_cache=True)
    return cache


def expand_cache(cache: DynamicCache, num_rows: int) -> DynamicCache:
    """A cache of one row as one of ``num_rows`` rows; its keys and values are views until the first update."""
    from transformers.cache_utils import DynamicLayer

    expanded = copy.deepcopy(cache)
    for layer in expanded.layers:
        # Layers above the deepest wanted one were cut off and hold nothing.
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys = layer.keys.expand(num_rows, -1, -1, -1)
            layer.values = layer.values.expand(num_rows, -1, -1, -1)
    return expanded
