"""Merges an adapter into the base model's weights, for tools that cannot load adapters."""

from __future__ import annotations

from typing import Any

from ka2l.errors import CanaryError, ModelError, first_line
from ka2l.model.adapter import load_adapter, load_model, save_model
from ka2l.model.canary import TIE_MARGINS, check_canary, greedy_answers


def merge_adapter(model_path: str, adapter_dir: str, output_dir: str, trust_remote_code: bool = False) -> str:
    """Write the base model with the adapter merged into its weights, and its tokenizer.

    Merged in float32 on the CPU, so rounded once, and saved in what the base model is saved in.

    Returns:
        That dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: model or adapter cannot be loaded, or the adapter is not one that can be merged.
    """
    from peft.tuners.tuners_utils import BaseTuner

    base = load_model(model_path, trust_remote_code, "auto")
    dtype = base.dtype
    model = load_adapter(base.float(), adapter_dir)
    if not isinstance(model.base_model, BaseTuner):
        kind = model.peft_config["default"].peft_type
        raise ModelError(
            f"an adapter of PEFT's kind {getattr(kind, 'value', kind)} has no place in the model's weights",
            hint="Hand over the adapter itself: leave --merged out.",
        )
    try:
        merged: Any = model.merge_and_unload(safe_merge=True).to(dtype)
        save_model(merged, model_path, output_dir, trust_remote_code)
    except ValueError as error:  # weights that are not numbers, a generation config that contradicts itself
        raise ModelError(f"the adapter cannot be merged into {model_path}: {first_line(error)}") from error
    return str(dtype).removeprefix("torch.")


def check_merged(merged_dir: str, dtype: str, canary: dict[str, Any], trust_remote_code: bool = False) -> None:
    """Raise CanaryError unless the written merged model answers the canary's prompts greedily as the adapter did.

    Tolerated is a genuine tie in the coarser of both dtypes, as `ka2l.model.canary.check_canary` explains.

    Args:
        dtype: that the merged weights are saved in.
        canary: from `ka2l.model.canary.canary`, of the adapter.
    """
    answers = greedy_answers(merged_dir, canary, canary["dtype"], trust_remote_code=trust_remote_code)
    margin = max(TIE_MARGINS[dtype], TIE_MARGINS[canary["dtype"]])
    try:
        check_canary(canary, answers, margin)
    except CanaryError as error:
        raise CanaryError(
            f"The merged weights do not answer as the adapter does. {error.message}",
            hint=f"Rounding to {dtype} may have changed them. Nothing was written; hand over the adapter itself: "
            "leave --merged out.",
        ) from error
