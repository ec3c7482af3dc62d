"""Loads what a ``vllm serve`` command says: ``python vllm_serve_answers.py JOB.json OUT.json``.

The command is read by vLLM's own parser; the engine gets what it says, and answers prompts with each adapter it names.
Job: command, prompt_token_ids, max_tokens. In a process of its own, since vLLM changes the one it runs in.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from actors.sampler import prepare_environment
from ka2l.sampling.sampler import SamplerConfig


def main(job_path: str, out_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    prepare_environment(SamplerConfig())
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm, serve, *words = shlex.split(job["command"])
    assert (vllm, serve) == ("vllm", "serve")
    said = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(said)
    said.model = said.model_tag  # as `vllm serve` does
    arguments = EngineArgs.from_cli_args(said)
    # What only costs a test time.
    arguments.enforce_eager, arguments.max_num_seqs = True, 8
    engine = LLM.from_engine_args(arguments)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompt_token_ids"]]
    parameters = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    found = {}
    for index, module in enumerate(said.lora_modules, start=1):
        request = LoRARequest(module.name, index, module.path)
        outputs = engine.generate(prompts, parameters, use_tqdm=False, lora_request=request)
        found[module.name] = [list(made.outputs[0].token_ids) for made in outputs]
    Path(out_path).write_text(json.dumps({"host": said.host, "answers": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
