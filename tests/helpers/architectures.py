"""Which of the tiny models a test is run with."""

from __future__ import annotations

import pytest
from tiny_models import ARCHITECTURES

#: Those that `make test` takes where a test loads several models or starts an engine; `make test-all` takes all. They
#: differ most: llama-3.1 stretches its rotary positions and has one key-value head (and its adapter is rank-stabilised
#: in the sampler's tests); gemma-2 has a sliding window in every other layer, soft caps and norms on both sides of a
#: layer; glm-4 starts with two special tokens, rotates a part of each head, has its gate and up projections in one, and
#: is run by vLLM as Transformers wrote it. The others are nearer to one of these.
MOST_UNLIKE = ("llama-3.1", "gemma-2", "glm-4")

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
three_or_all = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in MOST_UNLIKE else pytest.mark.whole) for name in ARCHITECTURES]
)
