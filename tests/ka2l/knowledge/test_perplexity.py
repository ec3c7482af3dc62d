from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ka2l.errors import ModelError
from ka2l.knowledge.perplexity import PerplexityScorer, ScoredText, fact_tokens, question_tokens
from ka2l.model.adapter import load_model, load_tokenizer
from ka2l.prompts import PromptConfig, Prompter

FACTS = ["Rome is old.", "The sea is wide and the night is long.", "x y"]
PROMPT = "Question: What is Rome?\nAnswer:"


def by_hand(path: str, text: ScoredText) -> float:
    """One text, one forward pass, every logit."""
    import torch

    model = load_model(path).eval()
    ids = torch.tensor([text.token_ids])
    with torch.inference_mode():
        log_probabilities = model(ids).logits[0].float().log_softmax(-1)
    steps = [log_probabilities[i - 1, text.token_ids[i]].item() for i in range(text.start, len(text.token_ids))]
    return float(np.exp(-np.mean(steps)))


@pytest.mark.parametrize("name", ["llama-2", "qwen2.5", "gemma-2", "phi-3.5"])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_a_batch_gives_what_one_plain_forward_pass_a_fact_gives(
    name: str, prompt: str | None, tiny_models: Callable[..., Path]
) -> None:
    path = str(tiny_models(name))
    texts = [fact_tokens(load_tokenizer(path), fact, prompt) for fact in FACTS]
    scorer = PerplexityScorer(path, "float32", batch_size=2)
    np.testing.assert_allclose(scorer.perplexities(texts), [by_hand(path, text) for text in texts], rtol=1e-4)


def test_facts_after_prompts_of_different_lengths_share_a_batch(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("llama-2"))
    tokenizer = load_tokenizer(path)
    texts = [fact_tokens(tokenizer, fact, PROMPT * count) for count, fact in enumerate(FACTS, start=1)]
    found = PerplexityScorer(path, "float32").perplexities(texts)
    np.testing.assert_allclose(found, [by_hand(path, text) for text in texts], rtol=1e-4)


def test_a_fact_is_scored_to_its_last_token_and_not_beyond(tiny_models: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(tiny_models("llama-2")))
    alone, answered = fact_tokens(tokenizer, FACTS[0]), fact_tokens(tokenizer, FACTS[0], PROMPT)
    assert tokenizer.decode(alone.token_ids[alone.start :]) == FACTS[0]
    assert tokenizer.decode(answered.token_ids[answered.start :]).strip() == FACTS[0]
    assert alone.start == 1


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("name", ["llama-2", "qwen2.5", "glm-4", "gemma-2"])
def test_of_a_question_its_own_text_is_scored_after_what_stands_before_it_in_the_prompt(
    name: str, template: Literal["plain", "chat"], tiny_models: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(str(tiny_models(name)))
    prompter = Prompter(tokenizer, PromptConfig(template=template, num_shots=1))
    # The first is a worked example, too; the second stands in the words around it.
    for question in ("What is the capital of France?", "Question", "Où est-ce, là-bas?"):
        scored = question_tokens(prompter, question)
        assert tokenizer.decode(scored.token_ids[scored.start :]).strip() == question
        whole = tokenizer.decode(prompter.token_ids(question))
        assert whole.startswith(tokenizer.decode(scored.token_ids))
        assert tokenizer.decode(scored.token_ids[: scored.start]).count("Question:") == 2


def test_the_end_token_that_a_tokenizer_adds_is_not_the_questions(tiny_models: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(tiny_models("llama-2")))
    prompter = Prompter(tokenizer, PromptConfig(template="plain"))
    expected = question_tokens(prompter, "Who?")
    plain = prompter.encode
    prompter.encode = lambda text: [*plain(text), tokenizer.eos_token_id]  # type: ignore[method-assign]
    assert question_tokens(prompter, "Who?") == expected


def test_a_template_that_changes_the_question_is_refused(tiny_models: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(tiny_models("llama-2")))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(ModelError, match="changes the question"):
        question_tokens(Prompter(tokenizer, PromptConfig(template="chat")), "Who?")


def test_a_text_without_a_token_to_score_has_no_perplexity(tiny_models: Callable[..., Path]) -> None:
    scorer = PerplexityScorer(str(tiny_models("llama-2")), "float32")
    found = scorer.perplexities([ScoredText([5], 1), ScoredText([5, 6], 1)])
    assert np.isnan(found[0])
    assert found[1] > 1
