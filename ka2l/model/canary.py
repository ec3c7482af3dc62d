"""The canary: proof that training changed the model, and that two engines give the same answers with it.

An adapter can silently do nothing: not loaded, loaded under another name, its update zero. The canary answers a few
fixed prompts greedily with PEFT; the engine that serves the adapter must then answer them with the same tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ka2l.errors import CanaryError
from ka2l.model.adapter import is_adapter, load_tokenizer
from ka2l.model.tokens import prompt_token_ids
from ka2l.model.virtual_tokens import expand_cache, open_state

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

#: Logits of base and adapter nearer than this are the same but for rounding.
MIN_LOGIT_DIFFERENCE = 1e-6
#: Two best tokens whose logits are nearer than this are a tie that another engine may break the other way.
TIE_MARGINS = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def canary(
    model_path: str,
    adapter_dir: str,
    prompts: Sequence[str],
    max_tokens: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    *,
    chat: bool,
) -> dict[str, Any]:
    """Answer ``prompts`` greedily with what training wrote, in PEFT or transformers; compare it with the base model.

    Args:
        adapter_dir: an adapter, or a whole model that was trained.
        max_tokens: generated tokens a prompt, fewer where an end token comes first.
        dtype: float32, bfloat16 or float16; the other engine's.
        chat: the prompts were rendered by a chat template.

    Returns:
        JSON-able: ``max_logit_difference`` (largest absolute difference between the logits of base and adapter over the
        answers), ``num_changed_tokens`` (positions of the answers at which the base would go on with another token),
        ``dtype``, ``eos_token_ids``, ``prompts``, and a list a prompt each of ``prompt_token_ids``,
        ``peft_tokens`` (the answer, end token included), ``margins`` (logit of the best minus that of the second
        token, a step) and ``runner_up_tokens`` (the second token, a step).

    Raises:
        ModelError: model or adapter cannot be loaded.
    """
    import torch
    from peft import PeftModel

    tokenizer = load_tokenizer(model_path, trust_remote_code)
    state, virtual = _open(model_path, adapter_dir, dtype, device, trust_remote_code)
    eos_ids = _eos_token_ids(state.generation_config.eos_token_id, tokenizer.eos_token_id)
    result: dict[str, Any] = {
        "max_logit_difference": 0.0,
        "num_changed_tokens": 0,
        "dtype": dtype,
        "eos_token_ids": eos_ids,
        "prompts": list(prompts),
        "prompt_token_ids": [prompt_token_ids(tokenizer, prompt, chat) for prompt in prompts],
        "peft_tokens": [],
        "margins": [],
        "runner_up_tokens": [],
    }
    with torch.inference_mode():
        for ids in result["prompt_token_ids"]:
            tokens, margins, runners_up = _greedy(state, ids, max_tokens, eos_ids, virtual)
            result["peft_tokens"].append(tokens)
            result["margins"].append(margins)
            result["runner_up_tokens"].append(runners_up)
        answers = list(zip(result["prompt_token_ids"], result["peft_tokens"], strict=True))
        tuned = [_answer_logits(state, *answer, virtual) for answer in answers]
    if not is_adapter(adapter_dir):
        del state  # two models need not fit
        state, _ = open_state(model_path, None, dtype, device, trust_remote_code)
    unadapted: Any = state.disable_adapter() if isinstance(state, PeftModel) else contextlib.nullcontext()
    with torch.inference_mode(), unadapted:
        before = [_answer_logits(state, *answer) for answer in answers]
    differences = [(a - b).abs().max().item() for a, b in zip(tuned, before, strict=True)]
    result["max_logit_difference"] = math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)
    result["num_changed_tokens"] = sum(
        a != b
        for (_, tokens), logits in zip(answers, before, strict=True)
        for a, b in zip(tokens, logits.argmax(-1).tolist(), strict=True)
    )
    return result


def _open(
    model_path: str, trained: str, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, DynamicCache | None]:
    """What training wrote, as PEFT or transformers reads it: an adapter, merged or not, or a whole model."""
    if not is_adapter(trained) and (Path(trained) / "config.json").is_file():
        return open_state(trained, None, dtype, device, trust_remote_code)
    return open_state(model_path, trained, dtype, device, trust_remote_code)


def _answer_logits(
    model: Any, prompt_ids: list[int], answer_ids: list[int], virtual: DynamicCache | None = None
) -> torch.Tensor:
    """Logits that predict each token of the answer, shape (num_answer_tokens, vocabulary), float32, on the CPU."""
    import torch

    sequence = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    cache = None if virtual is None else expand_cache(virtual, 1)
    logits = model(
        input_ids=sequence,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=len(answer_ids) + 1,
    ).logits
    return logits[0, :-1].float().cpu()


def check_canary(
    result: dict[str, Any], other_tokens: Sequence[Sequence[int]] | None = None, tie_margin: float | None = None
) -> None:
    """Compare what `canary` found with another engine's greedy tokens for ``result["prompt_token_ids"]``.

    A difference is tolerated only at a genuine tie: PEFT's two best logits are within ``tie_margin`` (default: by
    dtype, `TIE_MARGINS`) and the other engine chose the second. What follows a tie is not compared.

    Args:
        result: from `canary`.
        other_tokens: generated token ids a prompt, in the order of the prompts, with or without the end token.
            None checks only that the adapter changes something.

    Raises:
        CanaryError: the adapter changes nothing, or the engines disagree; names the first prompt where they do.
    """
    difference = result["max_logit_difference"]
    if not difference > MIN_LOGIT_DIFFERENCE:  # also true for NaN
        raise CanaryError(
            f"The adapter changes nothing: its logits differ from the base model's by at most {difference:.2g}.",
            hint="Raise tuning.learning_rate or the number of steps, and look at the loss in the tuning log.",
        )
    if other_tokens is None:
        return
    if len(other_tokens) != len(result["prompts"]):
        raise CanaryError(f"The canary has {len(result['prompts'])} prompts but got {len(other_tokens)} answers.")
    margin = TIE_MARGINS[result["dtype"]] if tie_margin is None else tie_margin
    eos = set(result["eos_token_ids"])
    for index, prompt in enumerate(result["prompts"]):
        ours, theirs = list(result["peft_tokens"][index]), list(other_tokens[index])
        step = _first_difference(ours, theirs, eos)
        if step is None:
            continue
        tie = step < len(ours) and result["margins"][index][step] <= margin
        runner_up = result["runner_up_tokens"][index][step] if tie else None
        if tie and (theirs[step] == runner_up if step < len(theirs) else runner_up in eos):
            continue
        raise CanaryError(
            f"Two engines disagree about the adapter from token {step} on, for the prompt ending in "
            f"{prompt[-80:]!r}: PEFT says {ours}, the other engine {theirs}.",
            hint="The engine serves another adapter, the base model alone, or other weights.",
        )


def greedy_answers(
    model_path: str,
    result: dict[str, Any],
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[list[int]]:
    """Greedy tokens of a model without any adapter for the prompts of a canary, for `check_canary`.

    Args:
        result: from `canary`; each answer is as long as PEFT's or ends before.

    Raises:
        ModelError: the model cannot be loaded.
    """
    import torch

    model, _ = open_state(model_path, None, dtype, device, trust_remote_code)
    asked = zip(result["prompt_token_ids"], result["peft_tokens"], strict=True)
    with torch.inference_mode():
        return [_greedy(model, ids, len(ours), result["eos_token_ids"])[0] for ids, ours in asked]


def _first_difference(ours: list[int], theirs: list[int], eos: set[int]) -> int | None:
    """Position of the first token that differs; None where there is none. A left-out end token is no difference."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return step
    step = min(len(ours), len(theirs))
    rest = ours[step:] or theirs[step:]
    return None if not rest or (len(rest) == 1 and rest[0] in eos) else step


def _greedy(
    model: Any, prompt_ids: list[int], max_tokens: int, eos_ids: list[int], virtual: DynamicCache | None = None
) -> tuple[list[int], list[float], list[int]]:
    """Greedy tokens, margins and runners-up. Not ``generate``: it applies penalties of the generation config."""
    import torch

    tokens: list[int] = []
    margins: list[float] = []
    runners_up: list[int] = []
    inputs, cache = prompt_ids, None if virtual is None else expand_cache(virtual, 1)
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in eos_ids):
        out = model(input_ids=torch.tensor([inputs], device=model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        runners_up.append(int(best.indices[1]))
        margins.append(float(best.values[0] - best.values[1]))
        inputs = tokens[-1:]
    return tokens, margins, runners_up


def _eos_token_ids(generation: int | list[int] | None, tokenizer: int) -> list[int]:
    ids = generation if isinstance(generation, list) else [] if generation is None else [generation]
    return sorted({*ids, tokenizer})
