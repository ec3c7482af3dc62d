"""Prompts as text, and as the tokens of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ka2l.model.loading import ModelConfig, load_tokenizer
from ka2l.prompts import EXAMPLES, PromptConfig, Prompter, chat_messages, plain_prompt


def test_a_plain_prompt_ends_where_the_answer_begins() -> None:
    assert plain_prompt("Who?", "Be brief.", [("What?", "That")]) == (
        "Be brief.\n\nQuestion: What?\nAnswer: That\n\nQuestion: Who?\nAnswer:"
    )


def test_without_instruction_and_examples_only_the_question_is_left() -> None:
    assert plain_prompt("Who?") == "Question: Who?\nAnswer:"


def test_a_chat_alternates_users_and_assistants_and_needs_no_system_role() -> None:
    messages = chat_messages("Who?", "Be brief.", EXAMPLES[:2])
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be brief.")
    assert "Be brief." not in messages[-1]["content"]


def test_models_with_a_chat_template_are_asked_in_it(tiny_models: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models("qwen2.5"))))
    assert tokenizer.chat_template, "the fixture must have a chat template for this test to mean anything"
    assert Prompter(tokenizer, PromptConfig()).is_chat
    assert not Prompter(tokenizer, PromptConfig(template="plain")).is_chat


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_prompt_holds_the_begin_token_at_most_once(template: str, tiny_models: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models("llama-3.1"))))
    ids = Prompter(tokenizer, PromptConfig(template=template)).token_ids("Who?")
    assert ids.count(tokenizer.bos_token_id) <= 1
