"""What a model of transformers answers greedily, one prompt at a time: no padding that could matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def greedy_tokens(model: Any, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Tokens after each prompt."""
    rows = []
    for ids in prompts:
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        rows.append(out[0, len(ids) :].tolist())
    return rows
