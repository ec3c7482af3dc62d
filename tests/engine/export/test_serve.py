"""The printed command says what the run said to vLLM."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from engine.config import RunConfig
from engine.export.serve import Served, not_servable, serve_command

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 16}
ADAPTER = Served("org/base", "mine", "/exports/mine", None)


def words(served: Served = ADAPTER, adapter: dict[str, Any] = LORA, **sections: Any) -> list[str]:
    return shlex.split(serve_command(served, RunConfig(**sections), adapter, served.base))


def option(found: list[str], name: str) -> str:
    assert found.count(name) == 1
    return found[found.index(name) + 1]


def test_it_serves_the_adapter_on_this_machine_alone() -> None:
    found = words()
    assert found[:4] == ["vllm", "serve", "org/base", "--enable-lora"]
    assert option(found, "--lora-modules") == "mine=/exports/mine"
    assert option(found, "--host") == "127.0.0.1"


@pytest.mark.parametrize(("rank", "limit"), [(1, "8"), (16, "16"), (17, "32"), (512, "512")])
def test_the_rank_that_is_allowed_is_one_that_vllm_knows(rank: int, limit: str) -> None:
    assert option(words(adapter={"peft_type": "LORA", "r": rank}), "--max-lora-rank") == limit


def test_the_largest_rank_of_any_module_counts() -> None:
    assert option(words(adapter=LORA | {"rank_pattern": {"q_proj": 40}}), "--max-lora-rank") == "64"


def test_length_dtype_and_gpus_are_the_run_s() -> None:
    found = words(
        model={"path": "org/base", "dtype": "auto", "trust_remote_code": True, "revision": "abc"},
        sampler={
            "max_model_len": 4096,
            "gpus_per_replica": 2,
            "tensor_parallel_size": 2,
            "engine_args": {"quantization": "fp8", "enforce_eager": True, "hf_overrides": {"a": [1]}, "seed": None},
        },
    )
    assert option(found, "--max-model-len") == "4096"
    assert option(found, "--dtype") == "auto"
    assert option(found, "--tensor-parallel-size") == "2"
    assert option(found, "--revision") == "abc"
    assert option(found, "--quantization") == "fp8"
    assert json.loads(option(found, "--hf-overrides")) == {"a": [1]}
    assert {"--trust-remote-code", "--enforce-eager"} < set(found)
    assert "--seed" not in found


def test_without_gpus_it_computes_in_float32_as_the_run_did() -> None:
    assert option(words(), "--dtype") == "float32"
    assert option(words(model={"dtype": "bfloat16"}), "--dtype") == "bfloat16"


def test_folders_with_blanks_and_commas_survive_the_shell_and_vllm() -> None:
    found = words(Served("/my models/base", "mine", "/exports/a, b", None))
    assert found[2] == "/my models/base"
    assert json.loads(option(found, "--lora-modules")) == {"name": "mine", "path": "/exports/a, b"}


def test_merged_weights_are_served_as_a_model() -> None:
    found = words(Served("org/base", "mine", None, "/exports/mine/merged"))
    assert found[2] == "/exports/mine/merged"
    assert option(found, "--served-model-name") == "mine"
    assert "--enable-lora" not in found


@pytest.mark.parametrize("fields", [{"peft_type": "P_TUNING"}, LORA | {"use_dora": True}])
def test_adapters_that_vllm_does_not_serve_are_told(fields: dict[str, Any]) -> None:
    assert not_servable(LORA) is None
    assert "vLLM" in (not_servable(fields) or "")
