"""P(True): what the model is shown, and the probability it gives to one option of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ka2l.knowledge.p_true import OPTIONS, SolvedExample, option_log_likelihoods, p_true, p_true_prompt, split_examples
from ka2l.knowledge.perplexity import PerplexityScorer
from ka2l.model.adapter import load_model, load_tokenizer

EXAMPLES = [
    SolvedExample("What is the capital of Peru?", "Lima", ["Lima", "Quito"], True),
    SolvedExample("Who wrote Hamlet?", "Ben Jonson", ["Ben Jonson", "Marlowe"], False),
]
SAMPLED = ["Mars", "Venus", "Mars"]
PROMPTS = [
    p_true_prompt("Which planet is red?", "Mars", SAMPLED, EXAMPLES),
    p_true_prompt("Which planet is red?", "Venus", SAMPLED),
    p_true_prompt("Which?", "x", []),
    p_true_prompt("Which planet is red?", "Mars", SAMPLED, EXAMPLES[:1]),
]


def scorer_of(path: Path, **options: Any) -> tuple[PerplexityScorer, Any]:
    return PerplexityScorer(str(path), "float32", device="cpu", **options), load_tokenizer(str(path))


def by_hand(path: Path, prompt: str, option: str) -> float:
    """Log-likelihood of an option: one forward pass without padding, one logit after the other."""
    import torch

    tokenizer, model = load_tokenizer(str(path)), load_model(str(path)).eval()
    prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + option)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids)))


# --- the prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_shows_question_samples_and_answer_and_ends_where_the_option_follows() -> None:
    last = PROMPTS[0].split("\n\n")[-1]
    assert last == (
        "Question: Which planet is red?\nBrainstormed answers:\nMars\nVenus\nMars\nPossible answer: Mars\n"
        "Is the possible answer:\n(A) True\n(B) False\nThe possible answer is:"
    )


def test_examples_stand_before_it_with_their_labels() -> None:
    _, first, second, _ = PROMPTS[0].split("\n\n")
    assert "Possible answer: Lima\n" in first
    assert first.endswith("The possible answer is: True")
    assert second.endswith("The possible answer is: False")


def test_without_samples_nothing_is_said_to_be_brainstormed() -> None:
    assert "Brainstormed" not in PROMPTS[2]


def test_a_chat_model_is_asked_in_turns_that_alternate_and_replies_with_the_bare_option(
    tiny_models: Callable[..., Path],
) -> None:
    tokenizer = load_tokenizer(str(tiny_models("qwen2.5")))
    prompt = p_true_prompt("Which planet is red?", "Mars", SAMPLED, EXAMPLES, tokenizer)
    roles = [turn.split("\n")[0] for turn in prompt.split("<|im_start|>")[1:]]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert "<|im_start|>assistant\nFalse<|im_end|>" in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


# --- examples and what is evaluated ----------------------------------------------------------------------------------


def test_an_example_is_not_evaluated_and_everything_else_is() -> None:
    examples, evaluated = split_examples([True, False] * 20, 8, seed=0)
    assert len(examples) == 8
    assert sorted(examples + evaluated) == list(range(40))


def test_examples_are_half_true_half_false_however_rare_one_is() -> None:
    labels = [True] * 90 + [False] * 10
    assert sorted(labels[index] for index in split_examples(labels, 6, seed=0)[0]) == [False] * 3 + [True] * 3
    assert sum(not labels[index] for index in split_examples(labels, 40, seed=0)[0]) == 10
    assert len(split_examples([True] * 5, 3, seed=0)[0]) == 3


def test_the_seed_decides_the_examples_and_their_order() -> None:
    labels = [True, False] * 20
    assert split_examples(labels, 8, seed=0) == split_examples(labels, 8, seed=0)
    assert split_examples(labels, 8, seed=0) != split_examples(labels, 8, seed=1)


def test_examples_that_leave_nothing_to_evaluate_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        split_examples([True, False], 2, seed=0)


# --- the value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "qwen2.5", "gemma-2", "phi-3.5"])
def test_it_is_what_the_logits_of_one_plain_forward_pass_give(name: str, tiny_models: Callable[..., Path]) -> None:
    path = tiny_models(name)
    logs = [[by_hand(path, prompt, f" {option}") for option in OPTIONS] for prompt in PROMPTS]
    expected = [math.exp(true) / (math.exp(true) + math.exp(false)) for true, false in logs]
    scorer, tokenizer = scorer_of(path, batch_size=3)
    np.testing.assert_allclose(option_log_likelihoods(scorer, tokenizer, PROMPTS, chat=False), logs, rtol=1e-4)
    np.testing.assert_allclose(p_true(scorer, tokenizer, PROMPTS, chat=False), expected, atol=1e-4)


def test_options_of_one_token_each_are_read_from_one_pass_over_the_prompt(
    tiny_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in most real vocabularies; in the tiny ones True and False are several tokens."""
    path = tiny_models("llama-2")
    scorer, tokenizer = scorer_of(path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    of_one_token = [one for one in letters if len(tokenizer(f" {one}", add_special_tokens=False)["input_ids"]) == 1]
    monkeypatch.setattr("ka2l.knowledge.p_true.OPTIONS", tuple(of_one_token[:2]))
    found = option_log_likelihoods(scorer, tokenizer, PROMPTS, chat=False)
    expected = [[by_hand(path, prompt, f" {option}") for option in of_one_token[:2]] for prompt in PROMPTS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert scorer.num_tokens == sum(len(tokenizer(prompt)["input_ids"]) + 1 for prompt in PROMPTS)


def test_the_probabilities_of_both_options_sum_to_one(
    tiny_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, tokenizer = scorer_of(tiny_models("llama-2"))
    of_true = p_true(scorer, tokenizer, PROMPTS, chat=False)
    monkeypatch.setattr("ka2l.knowledge.p_true.OPTIONS", OPTIONS[::-1])
    of_false = p_true(scorer, tokenizer, PROMPTS, chat=False)
    np.testing.assert_allclose(of_true + of_false, 1.0, atol=1e-6)
    assert ((of_true > 0) & (of_true < 1)).all()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_padding_changes_nothing(batch_size: int, tiny_models: Callable[..., Path]) -> None:
    path = tiny_models("mistral-v0.3")
    alone, tokenizer = scorer_of(path)
    expected = [p_true(alone, tokenizer, [prompt], chat=False)[0] for prompt in PROMPTS]
    scorer, _ = scorer_of(path, batch_size=batch_size)
    np.testing.assert_allclose(p_true(scorer, tokenizer, PROMPTS, chat=False), expected, atol=1e-5)


def test_the_order_of_rows_changes_nothing(tiny_models: Callable[..., Path]) -> None:
    scorer, tokenizer = scorer_of(tiny_models("llama-2"), batch_size=2)
    forward = p_true(scorer, tokenizer, PROMPTS, chat=False)
    backward = p_true(scorer, tokenizer, PROMPTS[::-1], chat=False)
    np.testing.assert_allclose(backward[::-1], forward, atol=1e-5)


def test_the_samples_that_are_shown_change_it(tiny_models: Callable[..., Path]) -> None:
    scorer, tokenizer = scorer_of(tiny_models("llama-2"))
    prompts = [p_true_prompt("Which planet is red?", "Mars", [other] * 5) for other in ("Mars", "Venus")]
    first, second = p_true(scorer, tokenizer, prompts, chat=False)
    assert first != second


def test_a_prompt_longer_than_the_model_takes_has_no_value_and_the_others_keep_theirs(
    tiny_models: Callable[..., Path],
) -> None:
    scorer, tokenizer = scorer_of(tiny_models("llama-2"))
    too_long = p_true_prompt("Which?", "x", ["y"] * 1000)
    found = p_true(scorer, tokenizer, [PROMPTS[1], too_long], chat=False)
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[0], p_true(scorer, tokenizer, PROMPTS[1:2], chat=False)[0], atol=1e-6)


def test_of_no_prompts_there_are_no_values(tiny_models: Callable[..., Path]) -> None:
    scorer, tokenizer = scorer_of(tiny_models("llama-2"))
    assert p_true(scorer, tokenizer, [], chat=False).shape == (0,)
