from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ka2l.adapter import load_model, load_tokenizer
from ka2l.perplexity import PerplexityScorer, ScoredText, fact_tokens

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


def test_a_text_without_a_token_to_score_has_no_perplexity(tiny_models: Callable[..., Path]) -> None:
    scorer = PerplexityScorer(str(tiny_models("llama-2")), "float32")
    found = scorer.perplexities([ScoredText([5], 1), ScoredText([5, 6], 1)])
    assert np.isnan(found[0])
    assert found[1] > 1
