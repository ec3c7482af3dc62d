"""Asks vLLM engines, one after another, and writes what they answered: ``python vllm_answers.py JOBS.json OUT.json``.

vLLM changes the process it runs in (environment, thread count, global seeds), so tests ask it in a process of its own.
Jobs: architecture -> {model, adapter, prompts, max_tokens, temperature, seed, num_samples, crowd, too_long,
stop: [prompt, string]}.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from actors.sampler import VLLMSampler
from ka2l.sampling.sampler import Generation, Request, SamplerConfig


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """All questions about one model put to one engine that serves it with its adapter."""
    config = SamplerConfig(max_tokens=job["max_tokens"], stop=())
    sampler = VLLMSampler(job["model"], config, adapter=job["adapter"])
    greedy = [Request(ids, 1, 0.0, 0) for ids in job["prompts"]]
    sampled = [Request(ids, job["num_samples"], job["temperature"], job["seed"]) for ids in job["prompts"]]
    crowd = [Request(ids, 1, 1.0, seed) for seed, ids in enumerate(job["crowd"])]
    too_long = Request(job["too_long"], 2, 1.0, 0)
    found = {"adapted": fields(sampler.generate(greedy))}
    sampler.lora = None
    found["base"] = fields(sampler.generate(greedy))
    found["sampled"] = fields(sampler.generate(sampled))
    found["alone"] = fields([made for request in sampled for made in sampler.generate([request])])
    # The crowd comes first, so that prompts do not fit into the step they would be asked in alone.
    found["crowded"] = fields(sampler.generate([*crowd, *sampled])[len(crowd) :])
    found["too_long"] = fields(sampler.generate([greedy[0], too_long, greedy[1]]))
    found["only_too_long"] = fields(sampler.generate([too_long]))
    prompt, stop = job["stop"]
    sampler.config = config.model_copy(update={"stop": (stop,)})
    found["stopped"] = fields(sampler.generate([Request(prompt, 1, 0.0, 0)]))
    return found


def fields(answers: list[list[Generation]]) -> list[list[dict[str, Any]]]:
    return [[made._asdict() for made in row] for row in answers]


def inspect_models_here() -> None:
    """vLLM asks a new process what each architecture can do, lest CUDA start in this one: half a minute of imports."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def main(jobs_path: str, out_path: str) -> None:
    results: dict[str, Any] = {}
    inspect_models_here()
    for name, job in json.loads(Path(jobs_path).read_text()).items():
        try:
            results[name] = ask(job)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
