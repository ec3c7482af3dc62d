from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from actors.teacher import TeacherHost
from ka2l.model.loading import ModelConfig, load_tokenizer
from ka2l.prompts import teacher_messages
from ka2l.sampling.sampler import Generation, Request, rejected
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.local import ChatRequest
from ka2l.teacher.reply import answer_record, parse_record
from ka2l.teacher.request import ShortAnswer, TeacherPrompt, request_body


class Parrot:
    """Keeps what it was asked; rejects what has an odd seed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        self.requests += requests
        reply = '{"answers": ["Lima"], "abstain": false}'
        return [
            rejected(request)
            if request.seed % 2
            else [Generation(reply, (5, 6, 7), -1.0, len(request.prompt_token_ids), "stop")]
            for request in requests
        ]


def test_a_request_is_answered_as_an_endpoint_would(tiny_models: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models("llama-2"))))
    sampler = Parrot()
    config = TeacherConfig(model="tiny", temperature=0.5)
    prompt = TeacherPrompt(teacher_messages("What is the capital of Peru?"), ShortAnswer)
    body = request_body(config, prompt, False)
    answered, refused = TeacherHost(sampler, tokenizer, "tiny").complete([ChatRequest(body, 4), ChatRequest(body, 5)])
    record = answer_record(config, prompt, body, answered, "q")
    assert parse_record(prompt, record) == ShortAnswer(answers=["Lima"], abstain=False)
    asked = sampler.requests[0]
    assert (asked.temperature, asked.seed, asked.num_samples) == (0.5, 4, 1)
    assert asked.json_schema == ShortAnswer.model_json_schema()
    rendered = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(asked.prompt_token_ids) == rendered
    assert (record["num_prompt_tokens"], record["num_completion_tokens"]) == (len(asked.prompt_token_ids), 3)
    assert "do not fit" in refused["error"]["message"]


def test_a_model_without_a_chat_template_gets_the_text(tiny_models: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models("llama-2"))))
    tokenizer.chat_template = None
    sampler = Parrot()
    body = request_body(TeacherConfig(model="tiny"), TeacherPrompt(teacher_messages("Why?")), False)
    TeacherHost(sampler, tokenizer, "tiny").complete([ChatRequest(body, 0)])
    text = tokenizer.decode(sampler.requests[0].prompt_token_ids, skip_special_tokens=True)
    assert text == teacher_messages("Why?")[0]["content"]
    assert sampler.requests[0].json_schema is None
