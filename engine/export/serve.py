"""The vLLM command that serves an export, with the run's own engine settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from actors.sampler import max_lora_rank
from engine.config import RunConfig
from ka2l.model.loading import max_model_len

HOST, PORT = "127.0.0.1", 8000


class Served(NamedTuple):
    """What is served, and where it lies."""

    base: str
    """Folder or hub id of the base model."""
    name: str
    """What requests call the adapter or the merged model."""
    adapter: str | None
    """Its folder; None where the merged weights are served."""
    merged: str | None
    """Folder of the merged weights; None where the adapter is served."""


def not_servable(adapter_config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve an adapter, in a sentence; None where it can."""
    kind = adapter_config.get("peft_type")
    if kind != "LORA":
        return f"vLLM serves LoRA adapters, not PEFT's {kind}."
    if adapter_config.get("use_dora"):
        return "vLLM does not serve DoRA adapters."
    return None


def serve_command(served: Served, config: RunConfig, adapter_config: Mapping[str, Any], base_dir: str) -> str:
    """``vllm serve ...``, quoted for a shell, on this machine's loopback only.

    Args:
        base_dir: where the base model can be read, if that is a folder: of some models the longest prompt depends on
            its config.
    """
    sampler, model = config.sampler, config.model
    words = ["vllm", "serve", served.merged or served.base]
    if served.adapter is None:
        words += ["--served-model-name", served.name]
    else:
        place = f"{served.name}={served.adapter}"
        if "," in place:
            place = json.dumps({"name": served.name, "path": served.adapter})
        ranks = [adapter_config["r"], *(adapter_config.get("rank_pattern") or {}).values()]
        words += ["--enable-lora", "--lora-modules", place, "--max-lora-rank", str(max_lora_rank(max(ranks)))]
    if (longest := sampler.max_model_len or max_model_len(base_dir)) is not None:
        words += ["--max-model-len", str(longest)]
    # On CPUs the run has vLLM compute in float32 where nothing else is said.
    words += ["--dtype", "float32" if model.dtype == "auto" and not sampler.gpus_per_replica else model.dtype]
    if sampler.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(sampler.tensor_parallel_size)]
    if model.trust_remote_code:
        words.append("--trust-remote-code")
    if model.revision is not None and served.merged is None:
        words += ["--revision", model.revision]
    for name, value in sampler.engine_args.items():
        words += _option(name, value)
    return shlex.join([*words, "--host", HOST, "--port", str(PORT)])


def _option(name: str, value: Any) -> list[str]:
    """An argument of vLLM's ``LLM`` as an option of ``vllm serve``."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if value is None:
        return []
    return [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
