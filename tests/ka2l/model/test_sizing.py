"""What a model needs is read off its config, and packed into whole parts of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ka2l.errors import ConfigError, ModelError
from ka2l.model.sizing import ModelNeeds, engine_shape, model_needs

GIB = 2**30
ARCHITECTURES = ["llama-2", "llama-3.1", "mistral-v0.1", "qwen2.5", "glm-4", "gemma-2", "phi-3.5"]


def needs(gib: float, heads: int = 32) -> ModelNeeds:
    return ModelNeeds(int(gib * GIB / 2), int(gib * GIB), 128 * 1024, heads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_counted_as_the_loaded_model_has_them(name: str, tiny_models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = str(tiny_models(name))
    counted = model_needs(path, "float32")
    assert counted.num_parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert counted.weight_bytes == 4 * counted.num_parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cache_is_as_wide_as_the_one_that_a_forward_pass_makes(name: str, tiny_models: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = str(tiny_models(name))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    cache = model(torch.ones(1, 6, dtype=torch.long), use_cache=True).past_key_values
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model_needs(path, "float32").kv_bytes_per_token == num_bytes / 6


def test_half_the_width_takes_half_the_memory(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("llama-2"))
    wide, narrow = model_needs(path, "float32"), model_needs(path, "bfloat16")
    assert narrow.weight_bytes * 2 == wide.weight_bytes
    assert narrow.kv_bytes_per_token * 2 == wide.kv_bytes_per_token


@pytest.mark.parametrize(
    ("gib", "gpu_gib", "shape"),
    [
        (4, 80, (1, 0.25)),  # a 2B model in bfloat16
        (15, 80, (1, 0.5)),  # 7B: weights, 4 GiB of cache and 3 beside them are over a quarter
        (15, 24, (1, 1.0)),
        (18, 24, (2, 1.0)),  # 9B does not fit one card of 24 GiB with its cache
        (132, 80, (2, 1.0)),
        (132, 24, (8, 1.0)),
    ],
)
def test_an_engine_gets_the_smallest_part_of_gpus_that_holds_it(
    gib: float, gpu_gib: float, shape: tuple[int, float]
) -> None:
    found = engine_shape(needs(gib), gpu_gib, num_tokens=32 * 1024)
    assert (found.tensor_parallel_size, found.gpu_share) == shape
    assert found.gpus == shape[0] * shape[1]
    assert found.gpu_memory_utilization <= found.gpu_share


def test_more_cache_asks_for_more() -> None:
    small, large = (engine_shape(needs(15), 80, num_tokens=n).gpus for n in (8 * 1024, 512 * 1024))
    assert small < large


def test_a_model_that_no_number_of_gpus_holds_says_how_much_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"144 GiB.*2 GPUs of 24 GiB.*6 attention heads"):
        engine_shape(needs(140, heads=6), 24, num_tokens=32 * 1024)


def test_no_model_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        model_needs(str(tmp_path))
