"""Hosts vLLM: one engine a replica, the round's adapter through LoRARequest. The only module that imports vllm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from actors.host import Stats, wait_for_gpu_memory
from ka2l.errors import ModelError
from ka2l.model.canary import check_canary
from ka2l.model.loading import max_model_len, split_source
from ka2l.prompts import Prompter
from ka2l.sampling.early_stop import draw_until_settled
from ka2l.sampling.sampler import Generation, Request, Sampler, SamplerConfig, rejected
from ka2l.schemas import SAMPLES
from ka2l.seeds import row_seed

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMSampler:
    """A vLLM engine with prefix caching and, where an adapter is given, LoRA."""

    def __init__(
        self,
        model_path: str,
        config: SamplerConfig,
        *,
        dtype: str = "auto",
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        prepare_environment(config)
        wait_for_gpu_memory(config.gpu_memory_utilization)
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        arguments = engine_arguments(model_path, config, dtype, trust_remote_code)
        self.lora = None
        if adapter is not None:
            fields = json.loads((Path(adapter) / "adapter_config.json").read_text())
            arguments = {"enable_lora": True, "max_lora_rank": max_lora_rank(fields["r"]), "max_loras": 1} | arguments
            self.lora = LoRARequest("adapter", 1, adapter)
            if not _has_gpu():
                multiply_one_adapter()
        try:
            path, revision = split_source(model_path)
            self.engine = LLM(path, revision=revision, tokenizer_revision=revision, **arguments)
        except (OSError, ValueError) as error:
            raise ModelError(f"vLLM cannot load {model_path}: {error}", hint="Check model and sampler.") from error
        self.config = config
        self.max_len = self.engine.llm_engine.model_config.max_model_len

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """``num_samples`` answers a request, in order; prompts that do not fit are marked ``rejected``."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        fits = [len(request.prompt_token_ids) + self.config.max_tokens <= self.max_len for request in requests]
        wanted = [request for request, fit in zip(requests, fits, strict=True) if fit]
        parameters = [
            SamplingParams(
                n=request.num_samples,
                temperature=request.temperature,
                max_tokens=self.config.max_tokens,
                stop=list(self.config.stop),
                seed=request.seed if request.temperature > 0 else None,
                logprobs=0,
                structured_outputs=None
                if request.json_schema is None
                else StructuredOutputsParams(json=dict(request.json_schema)),
            )
            for request in wanted
        ]
        prompts: Any = [{"prompt_token_ids": request.prompt_token_ids} for request in wanted]
        outputs = iter(self.engine.generate(prompts, parameters, use_tqdm=False, lora_request=self.lora))
        return [
            [
                Generation(
                    output.text.strip(),
                    tuple(output.token_ids),
                    float(output.cumulative_logprob or 0.0),
                    len(request.prompt_token_ids),
                    output.finish_reason or "stop",
                )
                for output in next(outputs).outputs
            ]
            if fit
            else rejected(request)
            for request, fit in zip(requests, fits, strict=True)
        ]


class ObservePlan(NamedTuple):
    """Which answers a round wants of which question."""

    run_seed: int
    round_index: int
    num_rehearsal: int
    """Answers per rehearsed candidate; 0 for none."""
    rehearsal_share: float
    """Share of the candidates that is rehearsed, chosen by a hash of the question's id."""
    rehearsal_greedy: bool
    probe_candidates: bool
    """Sample every candidate as if it were a seed question (for ``semantic_entropy`` and ``entropy``)."""
    num_agreement: int = 0
    """Answers sampled for each eval question, beside the greedy one."""

    def purposes(self, question_id: str, split: str) -> list[str]:
        """The purposes that this question is sampled for."""
        if split == "seed":
            return ["probe"]
        if split == "eval":
            return ["eval", "agreement"] if self.num_agreement else ["eval"]
        chosen = ["probe"] if self.probe_candidates else []
        draw = row_seed(self.run_seed, 0, "rehearsal", question_id) / 2**31
        if self.num_rehearsal and draw < self.rehearsal_share:
            chosen.append("rehearsal")
        return chosen

    def request(self, question_id: str, purpose: str, prompt_token_ids: list[int], config: SamplerConfig) -> Request:
        """The request for one purpose of one question."""
        seed = row_seed(self.run_seed, self.round_index, f"observe/{purpose}", question_id)
        if purpose == "eval" or (purpose == "rehearsal" and self.rehearsal_greedy):
            return Request(prompt_token_ids, 1, 0.0, seed)
        counts = {"rehearsal": self.num_rehearsal, "agreement": self.num_agreement}
        count = counts.get(purpose, config.num_samples)
        return Request(prompt_token_ids, count, config.temperature, seed)


class SamplerHost:
    """Questions in, samples out: one shard a call."""

    def __init__(
        self,
        sampler: Sampler,
        prompter: Prompter,
        config: SamplerConfig,
        plan: ObservePlan,
        canary: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampler = sampler
        self.prompter = prompter
        self.config = config
        self.plan = plan
        if canary is not None:
            _check_engine(self.sampler, canary)

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """From ``questions`` to ``samples`` (schemas.SAMPLES)."""
        wanted = []
        for row in tables["questions"].select(["question_id", "question", "split"]).to_pylist():
            purposes = self.plan.purposes(row["question_id"], row["split"])
            if purposes:
                prompt = self.prompter.token_ids(row["question"])
                wanted += [(row["question_id"], purpose, prompt) for purpose in purposes]
        requests = [self.plan.request(name, purpose, prompt, self.config) for name, purpose, prompt in wanted]
        start = time.perf_counter()
        generations = self._generate(requests, [purpose for _, purpose, _ in wanted])
        seconds = time.perf_counter() - start
        rows: list[dict[str, Any]] = [
            {
                "question_id": question_id,
                "purpose": purpose,
                "sample_index": index,
                "answer": made.answer,
                "logprob": made.logprob,
                "num_tokens": len(made.token_ids),
                "num_prompt_tokens": made.num_prompt_tokens,
                "finish_reason": made.finish_reason,
            }
            for (question_id, purpose, _), answers in zip(wanted, generations, strict=True)
            for index, made in enumerate(answers)
        ]
        stats = {
            "generate_seconds": seconds,
            "forward_passes": float(sum(answers[0].finish_reason != "rejected" for answers in generations)),
            "tokens_prompt": float(sum(len(request.prompt_token_ids) for request in requests)),
            "tokens_generated": float(sum(row["num_tokens"] for row in rows)),
            "num_rejected": float(sum(row["finish_reason"] == "rejected" for row in rows)),
        }
        return pa.Table.from_pylist(rows, schema=SAMPLES), stats

    def _generate(self, requests: Sequence[Request], purposes: Sequence[str]) -> list[list[Generation]]:
        if not requests:
            return []
        if self.config.stop_early:
            return draw_until_settled(self.sampler, requests, [purpose == "probe" for purpose in purposes])
        return self.sampler.generate(requests)


def _check_engine(sampler: Sampler, canary: Mapping[str, Any]) -> None:
    """Raise CanaryError unless the sampler answers the canary's prompts with PEFT's tokens.

    The canary knows no stop strings and may be shorter than an answer: compared is what both engines wrote.
    """
    prompts = [Request(list(ids), 1, 0.0, 0) for ids in canary["prompt_token_ids"]]
    others = []
    for made, ours in zip(sampler.generate(prompts), canary["peft_tokens"], strict=True):
        theirs = list(made[0].token_ids)[: len(ours)]
        others.append(theirs + list(ours)[len(theirs) :])
    check_canary(dict(canary), others)


def engine_arguments(
    model_path: str, config: SamplerConfig, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` besides the model and its adapter."""
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    longest = config.max_model_len or max_model_len(model_path)
    if longest is not None:
        arguments["max_model_len"] = longest
    if _has_gpu():
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        arguments |= {"enforce_eager": True, "dtype": "float32" if dtype == "auto" else dtype}
        # Where a prompt is cut between two steps vLLM rewinds the request's random stream, which CPU streams refuse
        # ("CPU Generator does not use offset").
        arguments["enable_chunked_prefill"] = False
    return arguments | config.engine_args


def max_lora_rank(rank: int) -> int:
    """The least of vLLM's limits that lets an adapter of this rank in."""
    return min(limit for limit in _LORA_RANKS if limit >= rank)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def prepare_environment(config: SamplerConfig) -> None:
    """vLLM reads its settings from the environment when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not _has_gpu():
        # In-process engine: on CPUs the engine process doubles start-up and serves no purpose.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.cpu_kv_cache_gib)))
        # vLLM still compiles how it ranks chosen tokens: seconds at the first request, and in need of a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # Ray has given this process its cores; vLLM must not pin it to others.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def multiply_one_adapter() -> None:
    """Make vLLM's LoRA on CPUs multiply by the adapter where there is only one.

    vLLM copies each token's adapter matrices before it multiplies, so that a batch may mix adapters; with one adapter
    that is the same product, and most of the time of an answer.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    def product(inputs: Any, weights: Any, dtype: Any) -> Any:
        return inputs.to(dtype) @ weights.flatten(0, -3)[0].to(dtype).T

    def shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        if len(weights) > 1:
            return copying["bgmv_shrink"](inputs, weights, output, indices, scaling)
        made = product(inputs, weights, output.dtype)
        output[:, : made.shape[1]] = scaling * made

    def expand(inputs: Any, weights: Any, output: Any, indices: Any, add_inputs: bool = True) -> None:
        if len(weights) > 1:
            return copying["bgmv_expand"](inputs, weights, output, indices, add_inputs)
        # Adapter and model may pad their outputs differently.
        expand_slice(inputs, weights, output, indices, 0, min(weights.shape[-2], output.shape[1]), add_inputs)

    def expand_slice(
        inputs: Any, weights: Any, output: Any, indices: Any, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        if len(weights) > 1:
            return copying["bgmv_expand_slice"](inputs, weights, output, indices, offset, size, add_inputs)
        made = product(inputs, weights, output.dtype)[: len(output), :size]
        if add_inputs:
            output[:, offset : offset + size] += made
        else:
            output[:, offset : offset + size] = made

    copying = {name: getattr(lora_ops, name) for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")}
    if copying["bgmv_shrink"].__module__ == __name__:
        return  # done before, in this process
    for name, multiplying in zip(copying, (shrink, expand, expand_slice), strict=True):
        for module in (lora_ops, punica_cpu):
            setattr(module, name, multiplying)
