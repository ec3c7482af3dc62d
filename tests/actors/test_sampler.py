"""Three implementations must say the same: vLLM, our plain sampler, and ``generate`` of transformers and PEFT."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from architectures import every_architecture, three_or_all
from greedy_tokens import greedy_tokens
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from actors.sampler import ObservePlan, SamplerHost
from ka2l.model.adapter import load_adapter
from ka2l.model.loading import ModelConfig, load_causal_lm, load_tokenizer
from ka2l.prompts import PromptConfig, Prompter
from ka2l.sampling.early_stop import FIRST
from ka2l.sampling.sampler import Generation, Request, SamplerConfig, TransformersSampler, rejected
from ka2l.schemas import SAMPLES

QUESTIONS = ["Who wrote the play Hamlet?", "What is the capital city of Peru?", "Why?"]
MAX_TOKENS = 12
NUM_SAMPLES = 4
SEED = 1234
REPOSITORY = Path(__file__).resolve().parents[2]

TinyModels = Callable[..., Path]


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> folder of a LoRA adapter with random weights; one of them is rank-stabilised."""
    folder = tmp_path_factory.mktemp("adapters")

    def build(name: str) -> Path:
        if not (folder / name).exists():
            generator = torch.Generator().manual_seed(1)
            base = load_causal_lm(str(tiny_models(name)), "float32")
            config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", use_rslora=name == "llama-3.1")
            model = get_peft_model(base, config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(folder / name)
        return folder / name

    return build


def prompts_of(model: Path) -> list[list[int]]:
    """A chat prompt with worked examples, a plain one, and a very short one."""
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    configs = [PromptConfig(template="chat", num_shots=2), PromptConfig(template="plain", num_shots=0)]
    configs.append(PromptConfig(template="plain", num_shots=0, instruction=""))
    return [
        Prompter(tokenizer, config).token_ids(question) for config, question in zip(configs, QUESTIONS, strict=True)
    ]


def greedy(prompts: Sequence[list[int]]) -> list[Request]:
    return [Request(ids, 1, 0.0, 0) for ids in prompts]


def sampler(model: Path, adapter: Path | None = None, **fields: Any) -> TransformersSampler:
    config = SamplerConfig(**({"kind": "transformers", "max_tokens": MAX_TOKENS, "stop": ()} | fields))
    return TransformersSampler(str(model), config, dtype="float32", adapter=str(adapter) if adapter else None)


def sum_of_logprobs(model: Any, prompt: list[int], tokens: Sequence[int]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double()
    chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(chosen[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


def stop_case(model: Path) -> tuple[list[int], str, str]:
    """A prompt, a letter that its greedy answer has after the first two, and the answer up to there."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = prompts_of(model)
    for prompt, tokens in zip(prompts, greedy_tokens(load_causal_lm(str(model)), prompts, MAX_TOKENS), strict=True):
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        for letter in text[2:]:
            if letter.isascii() and letter.isprintable() and letter not in text[:2]:
                return prompt, letter, text[: text.index(letter)].strip()
    raise AssertionError(f"no answer of {model} can be stopped half-way")


# -- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(
    request: pytest.FixtureRequest,
    tiny_models: TinyModels,
    adapters: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, Any]]:
    """Architecture -> what vLLM answered; all engines run one after another in one other process.

    Only those start that a selected test asks.
    """
    folder = tmp_path_factory.mktemp("vllm")
    draw = random.Random(0)
    jobs = {}
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and request.fixturename in item.fixturenames
    }
    for name in sorted(wanted):
        model = tiny_models(name)
        prompts = prompts_of(model)
        jobs[name] = {
            "model": str(model),
            "adapter": str(adapters(name)),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "seed": SEED,
            "num_samples": NUM_SAMPLES,
            # More tokens than an engine prefills in one step.
            "crowd": [[draw.randrange(10, 380) for _ in range(450)] for _ in range(10)],
            "too_long": [7] * 1020,
            "stop": stop_case(model)[:2],
        }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("vllm_answers.py")), "jobs.json", "out.json"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (folder / "log.txt").open("w") as log:
        status = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False).returncode
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    results = json.loads((folder / "out.json").read_text())

    def answers(name: str) -> dict[str, Any]:
        assert "error" not in results[name], results[name]["error"]
        found: dict[str, Any] = results[name]
        return found

    return answers


def tokens_of(rows: Any) -> list[list[int]]:
    return [list(made["token_ids"]) for row in rows for made in row]


@pytest.mark.slow
@three_or_all
def test_vllm_answers_greedily_as_transformers_does(name: str, asked: Any, tiny_models: TinyModels) -> None:
    model = tiny_models(name)
    expected = greedy_tokens(load_causal_lm(str(model), "float32"), prompts_of(model), MAX_TOKENS)
    assert tokens_of(asked(name)["base"]) == expected


@pytest.mark.slow
@three_or_all
def test_vllm_with_an_adapter_answers_as_peft_does_and_not_as_the_base(
    name: str, asked: Any, adapters: Callable[[str], Path], tiny_models: TinyModels
) -> None:
    model = tiny_models(name)
    adapted = load_adapter(load_causal_lm(str(model), "float32"), str(adapters(name))).eval()
    found = tokens_of(asked(name)["adapted"])
    assert found == greedy_tokens(adapted, prompts_of(model), MAX_TOKENS)
    assert found != tokens_of(asked(name)["base"])


@pytest.mark.slow
@three_or_all
def test_vllm_draws_the_same_samples_alone_and_in_a_crowd(name: str, asked: Any) -> None:
    found = asked(name)
    samples = tokens_of(found["sampled"])
    assert tokens_of(found["alone"]) == samples
    assert tokens_of(found["crowded"]) == samples
    for row in found["sampled"]:
        assert len({tuple(made["token_ids"]) for made in row}) == NUM_SAMPLES


@pytest.mark.slow
@three_or_all
def test_vllm_logprob_is_the_sum_over_the_chosen_tokens(name: str, asked: Any, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    model = load_causal_lm(str(path), "float32").eval()
    for prompt, row in zip(prompts_of(path), asked(name)["sampled"], strict=True):
        for made in row:
            expected = sum_of_logprobs(model, prompt, made["token_ids"])
            assert made["logprob"] == pytest.approx(expected, abs=1e-3)
            assert made["num_prompt_tokens"] == len(prompt)


@pytest.mark.slow
@three_or_all
def test_vllm_rejects_what_does_not_fit_and_answers_the_rest(name: str, asked: Any) -> None:
    found = asked(name)
    first, refused, second = found["too_long"]
    assert tokens_of([first, second]) == tokens_of(found["base"][:2])
    for row in (refused, *found["only_too_long"]):
        assert [(made["finish_reason"], made["answer"], made["token_ids"]) for made in row] == [
            ("rejected", "", [])
        ] * 2


@pytest.mark.slow
@three_or_all
def test_vllm_ends_an_answer_at_the_stop_string(name: str, asked: Any, tiny_models: TinyModels) -> None:
    model = tiny_models(name)
    (made,) = asked(name)["stopped"][0]
    prompt, stop, before = stop_case(model)
    assert (made["answer"], made["finish_reason"]) == (before, "stop")
    (ours,) = sampler(model, stop=(stop,)).generate(greedy([prompt]))[0]
    assert (list(ours.token_ids), ours.answer) == (made["token_ids"], made["answer"])


# -- the sampler that needs transformers alone ------------------------------------------------------------------------


@three_or_all
def test_batched_greedy_answers_are_those_of_generate(
    name: str, adapters: Callable[[str], Path], tiny_models: TinyModels
) -> None:
    path = tiny_models(name)
    prompts = prompts_of(path)
    base = load_causal_lm(str(path), "float32")
    found = sampler(path).generate(greedy(prompts))
    assert [list(made.token_ids) for (made,) in found] == greedy_tokens(base, prompts, MAX_TOKENS)
    adapted = sampler(path, adapters(name)).generate(greedy(prompts))
    assert [list(made.token_ids) for (made,) in adapted] == greedy_tokens(
        load_adapter(base, str(adapters(name))).eval(), prompts, MAX_TOKENS
    )
    assert adapted != found


@three_or_all
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(name: str, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    asked = sampler(path)
    requests = [Request(ids, NUM_SAMPLES, 1.0, SEED) for ids in prompts_of(path)]
    together = asked.generate(requests)
    assert asked.generate(requests) == together
    crowd = [Request([5] * 80, 3, 1.0, 9), Request([9, 8], 2, 0.0, 0)]
    asked.config = asked.config.model_copy(update={"max_num_seqs": 3})
    apart = asked.generate([*crowd, *requests])[len(crowd) :]
    assert [[made.token_ids for made in row] for row in apart] == [[made.token_ids for made in row] for row in together]
    for row in together:
        assert len({made.token_ids for made in row}) == NUM_SAMPLES
    # Sample i draws from seed + i.
    shifted = asked.generate([requests[0]._replace(seed=SEED + 1)])[0]
    assert [made.token_ids for made in shifted[:-1]] == [made.token_ids for made in together[0][1:]]


@every_architecture
def test_logprob_is_the_sum_over_the_chosen_tokens_before_tempering(name: str, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    prompts = prompts_of(path)
    model = load_causal_lm(str(path), "float32").eval()
    found = sampler(path).generate([Request(ids, 2, 0.7, SEED) for ids in prompts])
    for prompt, row in zip(prompts, found, strict=True):
        for made in row:
            assert made.logprob == pytest.approx(sum_of_logprobs(model, prompt, made.token_ids), abs=1e-3)
            assert made.num_prompt_tokens == len(prompt)


def test_prompts_that_do_not_fit_are_rejected_and_the_rest_is_answered(tiny_models: TinyModels) -> None:
    path = tiny_models("llama-2")
    short = greedy(prompts_of(path)[2:])[0]
    long = Request([7] * (1024 - MAX_TOKENS + 1), 2, 1.0, 0)
    found = sampler(path).generate([short, long, short])
    assert found[1] == rejected(long)
    assert [made.finish_reason for made in found[1]] == ["rejected", "rejected"]
    (alone,) = sampler(path).generate([short])[0]
    assert [found[0][0].token_ids, found[2][0].token_ids] == [alone.token_ids] * 2
    (longest,) = sampler(path).generate([Request(long.prompt_token_ids[1:], 1, 1.0, 0)])[0]
    assert longest.finish_reason != "rejected"


def test_longrope_models_take_no_prompt_on_which_engines_would_disagree(tiny_models: TinyModels) -> None:
    path = tiny_models("phi-3.5")
    fits, too_long = (Request([7] * length, 1, 0.0, 0) for length in (512 - MAX_TOKENS, 513 - MAX_TOKENS))
    reasons = [row[0].finish_reason for row in sampler(path).generate([fits, too_long])]
    assert reasons[0] != "rejected"
    assert reasons[1] == "rejected"


def test_an_answer_ends_at_the_end_tokens_of_model_and_tokenizer(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models("llama-2")
    prompt = prompts_of(path)[0]
    tokens = greedy_tokens(load_causal_lm(str(path)), [prompt], MAX_TOKENS)[0]
    assert len(set(tokens[:4])) == 4
    changed = Path(shutil.copytree(path, tmp_path / "model"))
    file = changed / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [tokens[2], 300]}))
    (made,) = sampler(changed).generate(greedy([prompt]))[0]
    assert (list(made.token_ids), made.finish_reason) == (tokens[:3], "stop")
    assert sampler(changed).eos == {tokens[2], 300, AutoTokenizer.from_pretrained(path).eos_token_id}


# -- prompts ----------------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_prompt_starts_with_the_special_tokens_of_its_tokenizer_exactly_once(
    name: str, template: Any, tiny_models: TinyModels
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models(name))))
    leading = tokenizer("")["input_ids"]
    ids = Prompter(tokenizer, PromptConfig(template=template)).token_ids("Who?")
    assert ids[: len(leading)] == leading
    assert all(ids.count(token) == 1 for token in leading)
    markers = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(markers) == (12 if template == "chat" else 0)  # five examples, the question, the answer to come


# -- the host ---------------------------------------------------------------------------------------------------------


class Recorder:
    """A sampler that answers with the number of the request and rejects prompts over five words."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        self.requests += requests
        return [
            rejected(request)
            if len(request.prompt_token_ids) > 5
            else [Generation(f"{number}", (1, 2), -1.5, len(request.prompt_token_ids), "stop")] * request.num_samples
            for number, request in enumerate(requests)
        ]


class Words:
    """A prompter with one token a word."""

    def token_ids(self, question: str) -> list[int]:
        return list(range(len(question.split())))


def observe(
    rows: Sequence[Mapping[str, str]], config: SamplerConfig | None = None, **plan: Any
) -> tuple[pa.Table, dict[str, float], list[Request]]:
    defaults: dict[str, Any] = {
        "run_seed": 0,
        "round_index": 1,
        "num_rehearsal": 0,
        "rehearsal_share": 1.0,
        "rehearsal_greedy": False,
        "probe_candidates": False,
    }
    recorder = Recorder()
    prompter: Any = Words()
    host = SamplerHost(recorder, prompter, config or SamplerConfig(num_samples=3), ObservePlan(**(defaults | plan)))
    table, stats = host.process({"questions": pa.Table.from_pylist([dict(row) for row in rows])})
    return table, stats, recorder.requests


POOL = [
    {"question_id": "s", "question": "a seed question", "split": "seed"},
    {"question_id": "c", "question": "a candidate", "split": "candidate"},
    {"question_id": "e", "question": "an eval question", "split": "eval"},
    {"question_id": "l", "question": "a question that is much too long", "split": "seed"},
]


def test_the_host_samples_seeds_answers_eval_greedily_and_counts_what_was_rejected() -> None:
    table, stats, requests = observe(POOL)
    assert table.schema == SAMPLES
    assert [(row["question_id"], row["purpose"], row["sample_index"]) for row in table.to_pylist()] == [
        *[("s", "probe", index) for index in range(3)],
        ("e", "eval", 0),
        *[("l", "probe", index) for index in range(3)],
    ]
    assert [request.temperature for request in requests] == [1.0, 0.0, 1.0]
    assert stats.pop("generate_seconds") >= 0
    assert stats == {"tokens_prompt": 13.0, "forward_passes": 2.0, "tokens_generated": 8.0, "num_rejected": 3.0}
    assert set(table.filter(pa.compute.equal(table["question_id"], "l"))["finish_reason"].to_pylist()) == {"rejected"}


def test_the_host_samples_candidates_for_rehearsal_or_as_if_they_were_seeds() -> None:
    table, _, _ = observe(POOL[1:2], num_rehearsal=2, probe_candidates=True)
    assert table["purpose"].to_pylist() == ["probe"] * 3 + ["rehearsal"] * 2
    table, _, requests = observe(POOL[1:2], num_rehearsal=1, rehearsal_greedy=True)
    assert [(request.num_samples, request.temperature) for request in requests] == [(1, 0.0)]
    many = [{"question_id": f"c{i}", "question": "a b", "split": "candidate"} for i in range(400)]
    table, _, _ = observe(many, num_rehearsal=1, rehearsal_share=0.25)
    assert 70 <= table.num_rows <= 130


def test_seed_questions_whose_answers_agree_are_asked_no_further_and_rehearsal_is() -> None:
    config = SamplerConfig(num_samples=10, stop_early=True)
    table, stats, _ = observe([*POOL[:2], POOL[3]], config, num_rehearsal=10)
    rows = table.to_pylist()
    counts = Counter((row["question_id"], row["purpose"]) for row in rows)
    assert counts == {("s", "probe"): FIRST, ("c", "rehearsal"): 10, ("l", "probe"): FIRST}
    assert [row["sample_index"] for row in rows if row["question_id"] == "s"] == list(range(FIRST))
    assert stats["tokens_generated"] == 2 * (FIRST + 10)


def test_a_shard_with_nothing_to_ask_gives_an_empty_table() -> None:
    table, stats, requests = observe(POOL[1:2])
    assert (table.num_rows, table.schema, requests) == (0, SAMPLES, [])
    assert stats["tokens_generated"] == 0


def test_a_request_keeps_its_seed_wherever_it_is_placed() -> None:
    _, _, before = observe(POOL)
    _, _, after = observe(POOL[::-1][2:])
    assert [request.seed for request in after] == [before[0].seed]
    _, _, later = observe(POOL, round_index=2)
    assert {request.seed for request in later}.isdisjoint(request.seed for request in before)


ADAPTER_PRODUCTS = """
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from actors.sampler import multiply_one_adapter

def products(module, a, b, rows):
    shrunk = torch.zeros(7, 4)
    module.bgmv_shrink(torch.arange(7 * 6.0).reshape(7, 6).sin(), a, shrunk, rows, 0.5)
    made = [shrunk]
    for add in (True, False):
        made.append(torch.ones(7, 12))  # padded: wider than the adapter's 10
        module.bgmv_expand(shrunk, b, made[-1], rows, add)
        made.append(torch.ones(7, 30))
        module.bgmv_expand_slice(shrunk, b, made[-1], rows, 15, 10, add)
    return made

torch.manual_seed(0)
for num_adapters in (1, 2):
    a, b = torch.randn(num_adapters, 1, 4, 6), torch.randn(num_adapters, 1, 10, 4)
    rows = torch.tensor([0, 1, 0, 1, 1, 0, 0]) % num_adapters
    expected = products(lora_ops, a, b, rows) if num_adapters == 1 else [
        torch.cat([products(punica_cpu, a[row : row + 1], b[row : row + 1], rows * 0)[k][i : i + 1]
                   for i, row in enumerate(rows.tolist())]) for k in range(5)]
    multiply_one_adapter()
    for want, got in zip(expected, products(punica_cpu, a, b, rows), strict=True):
        torch.testing.assert_close(got, want)
"""


def test_one_adapter_multiplied_gives_what_vllm_gives_by_copying_it_for_each_token() -> None:
    """And several adapters still go by vLLM's own way."""
    done = subprocess.run([sys.executable, "-c", ADAPTER_PRODUCTS], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
