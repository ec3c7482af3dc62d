"""The processes that ``bench_overhead.py`` times: ``python overhead_processes.py PHASE SPEC.json STARTED_AT``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from engine.config import RunConfig


def load_settings(spec: dict[str, Any]) -> RunConfig:
    """The quickstart's config for this benchmark's pool."""
    from engine.config import load_config

    cpus = 0.9 * spec["threads"]  # leaves room for Ray's own work beside the one actor
    changes = {
        "rounds": 1,
        "pool.path": spec["pool"],
        "pool.num_eval": 0,
        "model.path": spec["model"],
        "sampler.num_samples": spec["num_samples"],
        "sampler.max_tokens": spec["max_tokens"],
        "sampler.cpus_per_replica": cpus,
        "extraction.cpus_per_replica": cpus,
        "tuning.rehearsal": 0,
        "extraction.layers": "all",
        "extraction.position": "last_token",
        "decoder.kind": "none",
        "annotator.reference_table": "null",
        "ray.address": "local",
        "ray.num_cpus": spec["threads"],
    }
    return load_config("quickstart", [f"{key}={value}" for key, value in changes.items()])


def read_prompts(spec: dict[str, Any], config: RunConfig) -> list[tuple[str, str, list[int]]]:
    """(question id, split, prompt tokens) of the pool's rows."""
    from ka2l.model.loading import load_tokenizer
    from ka2l.prompts import Prompter

    prompter = Prompter(load_tokenizer(config.model), config.prompt)
    rows = [json.loads(line) for line in Path(spec["pool"]).read_text().splitlines()]
    return [(row["id"], row["split"], prompter.token_ids(row["question"])) for row in rows]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def run_engine(spec: dict[str, Any], started: float) -> dict[str, Any]:
    """The campaign's own stages, with Ray started as the command line does."""
    from rich.console import Console

    from engine import stages
    from engine.execution.campaign import Campaign
    from engine.execution.cluster import RaySession
    from engine.store.events import Events
    from engine.store.run_directory import RunDirectory

    config = load_settings(spec)
    target = RunDirectory(spec["run_dir"])
    campaign = Campaign(config, target, Events(target, Console(stderr=True)), config.model, config.pool.path)
    with RaySession(config.ray, f"{target.logs()}/driver.log"):
        stages.pool(campaign)
        stages.observe(campaign, 0)
        observed_after = time.time() - started
        stages.extract(campaign, 0)
    observed, extracted = (target.stage(name, 0).require() for name in ("observe", "extract"))
    return {
        "generate_seconds": observed.cost["generate_seconds"],
        "generate_from_start_seconds": observed_after,
        "observe_stage_seconds": observed.seconds,
        "tokens_generated": int(observed.cost["tokens_generated"]),
        "num_samples": observed.metrics["num_samples"],
        "num_shards": len(observed.files),
        "forward_seconds": extracted.cost["forward_seconds"],
        "extract_stage_seconds": extracted.seconds,
        "num_states": extracted.metrics["num_questions"],
    }


def run_vllm(spec: dict[str, Any], started: float) -> dict[str, Any]:
    """``LLM.generate`` with n samples a prompt, then with one sample a prompt in n passes."""
    import torch

    from actors.sampler import engine_arguments, prepare_environment
    from ka2l.seeds import row_seed

    torch.set_num_threads(spec["threads"])
    config = load_settings(spec)
    settings = config.sampler
    prepare_environment(settings)
    from vllm import LLM, SamplingParams

    def parameters(question_id: str, num_samples: int, first: int) -> SamplingParams:
        return SamplingParams(
            n=num_samples,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            stop=list(settings.stop),
            seed=row_seed(config.seed, 0, "observe/probe", question_id) + first,
            logprobs=0,
        )

    def generate(num_samples: int, first: int = 0) -> int:
        wanted = [parameters(question_id, num_samples, first) for question_id in ids]
        made = engine.generate(prompts, wanted, use_tqdm=False)
        return sum(len(answer.token_ids) for row in made for answer in row.outputs)

    rows = [row for row in read_prompts(spec, config) if row[1] == "seed"]
    ids = [row[0] for row in rows]
    prompts: Any = [{"prompt_token_ids": row[2]} for row in rows]
    engine = LLM(config.model.path, **engine_arguments(config.model.path, settings, config.model.dtype))
    _, warm_up = timed(lambda: engine.generate(prompts[:32], [parameters("", 2, 0)] * len(ids[:32]), use_tqdm=False))
    engine.reset_prefix_cache()
    tokens, seconds = timed(lambda: generate(settings.num_samples))
    from_start = time.time() - started - warm_up
    engine.reset_prefix_cache()
    passes_tokens, passes_seconds = timed(lambda: sum(generate(1, first) for first in range(settings.num_samples)))
    return {
        "generate_seconds": seconds,
        "generate_from_start_seconds": from_start,
        "warm_up_seconds": warm_up,
        "tokens_generated": tokens,
        "passes_seconds": passes_seconds,
        "passes_tokens_generated": passes_tokens,
    }


def run_transformers(spec: dict[str, Any], started: float) -> dict[str, Any]:
    """A forward pass a batch that keeps the last token's states, then ``generate`` that keeps them all."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    config = load_settings(spec)
    rows = [row[2] for row in read_prompts(spec, config)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    size = config.extraction.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()

    def padded(batch: Sequence[int], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(rows[index]) for index in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            where = slice(width - len(rows[index]), width) if left else slice(0, len(rows[index]))
            ids[place, where] = torch.tensor(rows[index])
            mask[place, where] = 1
        return ids, mask

    @torch.inference_mode()
    def prefill(wanted: Sequence[Sequence[int]]) -> np.ndarray:
        found: list[Any] = [None] * len(rows)
        for batch in wanted:
            ids, mask = padded(batch, left=False)
            out = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            last = mask.sum(1) - 1
            states = torch.stack([layer[torch.arange(len(batch)), last] for layer in out.hidden_states], 1).numpy()
            for index, row in zip(batch, states, strict=True):
                found[index] = row
        return np.stack([row for row in found if row is not None])

    @torch.inference_mode()
    def generate(wanted: Sequence[Sequence[int]]) -> np.ndarray:
        found: list[Any] = [None] * len(rows)
        for batch in wanted:
            ids, mask = padded(batch, left=True)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=config.sampler.max_tokens,
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
            states = torch.stack([layer[:, -1] for layer in out.hidden_states[0]], dim=1).numpy()
            for index, row in zip(batch, states, strict=True):
                found[index] = row
        return np.stack([row for row in found if row is not None])

    states, seconds = timed(lambda: prefill(batches))  # as cold as the engine's
    generate(batches[:1])
    kept, kept_seconds = timed(lambda: generate(batches))
    np.save(spec["states"], states)
    return {
        "forward_seconds": seconds,
        "keep_all_seconds": kept_seconds,
        "keep_all_max_difference": float(np.abs(states - kept).max()),
    }


PROCESSES = {"engine": run_engine, "vllm": run_vllm, "transformers": run_transformers}

if __name__ == "__main__":
    phase, spec_path, started_at = sys.argv[1:]
    outcome = PROCESSES[phase](json.loads(Path(spec_path).read_text()), float(started_at))
    print(json.dumps(outcome), flush=True)
