"""Extracted states against transformers' own ``output_hidden_states``, one row at a time and without padding."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import every_architecture, three_or_all
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ka2l.errors import ConfigError, ModelError
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.hidden_states import HiddenStateExtractor, UnusableRowsError, next_token_features

#: Lengths from a few tokens to more than twice the sliding windows of the tiny Mistral and Gemma models.
PROMPTS = [
    "Question: Who wrote Hamlet? Answer:",
    "Hi",
    "Question: What is the capital city of Peru, and in which year did the first person walk on the moon? "
    "Which drug is given first for an anaphylactic shock? Answer:",
    "The quick brown fox jumps over the lazy dog, 0123456789 times",
    "Question: Who? Answer:",
]
SHARED = "Answer the question as briefly as possible. Question: Who wrote Othello? Answer: William Shakespeare. "
SHARED_PROMPTS = [SHARED + prompt for prompt in PROMPTS]

TinyModels = Callable[..., Path]


def reference_model(path: Path) -> Any:
    # Eager attention everywhere: it is the one implementation that applies Gemma 2's soft cap.
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def reference_states(model: Any, path: Path, prompts: Sequence[str], position: str = "last_token") -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            states = torch.cat(model(input_ids=ids, output_hidden_states=True).hidden_states)
        pooled = {"last_token": states[:, -1], "mean": states.mean(dim=1)}
        rows.append(torch.cat(list(pooled.values()), dim=1) if position == "last_and_mean" else pooled[position])
    return torch.stack(rows).numpy()


def extractor(path: Path, adapter: Path | None = None, **config: Any) -> HiddenStateExtractor:
    config = {"device": "cpu", "batch_size": 3} | config
    return HiddenStateExtractor(str(path), ExtractionConfig(**config), adapter=str(adapter) if adapter else None)


def random_adapter(model_path: Path, directory: Path) -> Path:
    model = get_peft_model(reference_model(model_path), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("position", ["last_token", "mean", "last_and_mean"])
@every_architecture
def test_every_layer_equals_a_plain_forward_of_one_row(name: str, position: str, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    states = extractor(path, position=position).extract(PROMPTS).states
    expected = reference_states(reference_model(path), path, PROMPTS, position)
    assert states.shape == expected.shape == (5, 4, 128 if position == "last_and_mean" else 64)
    np.testing.assert_allclose(states, expected, atol=1e-4)


@pytest.mark.parametrize("position", ["last_token", "mean", "last_and_mean"])
@every_architecture
def test_a_shared_prefix_computed_once_changes_no_state(name: str, position: str, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    model = extractor(path, position=position, batch_size=2)
    states = model.extract(SHARED_PROMPTS).states
    expected = reference_states(reference_model(path), path, SHARED_PROMPTS, position)
    np.testing.assert_allclose(states, expected, atol=1e-4)
    lengths = [len(model.tokenizer(prompt)["input_ids"]) for prompt in SHARED_PROMPTS]
    assert model.num_forward_passes == 1 + 3
    assert model.num_tokens < sum(lengths) / 1.5


@pytest.mark.parametrize("name", ["llama-2", "gemma-2", "mistral-v0.1"])
def test_the_prefix_is_kept_from_call_to_call(name: str, tiny_models: TinyModels) -> None:
    path = tiny_models(name)
    model = extractor(path)
    model.extract(SHARED_PROMPTS[:3])
    passes, tokens = model.num_forward_passes, model.num_tokens
    states = model.extract(SHARED_PROMPTS[3:]).states
    assert model.num_forward_passes == passes + 1
    assert model.num_tokens - tokens < 80
    np.testing.assert_allclose(states, reference_states(reference_model(path), path, SHARED_PROMPTS[3:]), atol=1e-4)


def test_another_prefix_replaces_the_one_kept(tiny_models: TinyModels) -> None:
    path = tiny_models("llama-2")
    model = extractor(path)
    model.extract(SHARED_PROMPTS)
    other = ["Now for something completely different, says a person: " + prompt for prompt in PROMPTS]
    np.testing.assert_allclose(
        model.extract(other).states, reference_states(reference_model(path), path, other), atol=1e-4
    )


@three_or_all
def test_an_adapter_gives_the_states_of_pefts_own_forward(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models(name)
    adapter = random_adapter(path, tmp_path / "adapter")
    states = extractor(path, adapter).extract(SHARED_PROMPTS).states
    adapted = PeftModel.from_pretrained(reference_model(path), adapter).eval()
    np.testing.assert_allclose(states, reference_states(adapted, path, SHARED_PROMPTS), atol=1e-4)
    without = extractor(path).extract(SHARED_PROMPTS).states
    assert np.abs(states[:, 1:] - without[:, 1:]).max() > 0.1


@every_architecture
@pytest.mark.parametrize("layers", [[1], [0, 2], [0], [-1], [3, 1]])
def test_chosen_layers_equal_those_of_the_whole_model(name: str, layers: list[int], tiny_models: TinyModels) -> None:
    whole = extractor(tiny_models(name)).extract(SHARED_PROMPTS).states
    model = extractor(tiny_models(name), layers=layers, next_token=False)
    states = model.extract(SHARED_PROMPTS).states
    assert model.layers == sorted(layer % 4 for layer in layers)
    assert states.shape == (5, model.num_layers, model.width)
    np.testing.assert_allclose(states, whole[:, model.layers], atol=1e-5)


def test_no_layer_above_the_deepest_wanted_one_is_kept(tiny_models: TinyModels) -> None:
    assert len(extractor(tiny_models("llama-2"), layers=[0, 2], next_token=False).decoder.layers) == 2
    assert len(extractor(tiny_models("llama-2"), layers=[0, 2]).decoder.layers) == 3  # the head needs them
    assert len(extractor(tiny_models("llama-2")).decoder.layers) == 3


def test_no_logits_are_computed(tiny_models: TinyModels) -> None:
    names = [name for name, _ in extractor(tiny_models("llama-2")).decoder.named_modules()]
    assert "embed_tokens" in names
    assert not [name for name in names if "lm_head" in name]


def test_token_ids_and_text_give_the_same_states(tiny_models: TinyModels) -> None:
    model = extractor(tiny_models("llama-2"))
    ids = [list(model.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert ids[0][0] == model.tokenizer.bos_token_id
    np.testing.assert_array_equal(model.extract(ids).states, model.extract(PROMPTS).states)


@pytest.mark.parametrize("name", ["llama-2", "glm-4", "qwen2.5"])
def test_a_rendered_chat_prompt_gets_no_second_start_token(name: str, tiny_models: TinyModels) -> None:
    model = extractor(tiny_models(name))
    messages = [{"role": "user", "content": "Who wrote Hamlet?"}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(model.extract([text]).states, model.extract([ids]).states)


def test_the_soft_cap_on_attention_scores_is_applied(tiny_models: TinyModels) -> None:
    path = tiny_models("gemma-2", attn_logit_softcapping=0.05)
    states = extractor(path).extract(PROMPTS).states
    np.testing.assert_allclose(states, reference_states(reference_model(path), path, PROMPTS), atol=1e-4)
    assert np.abs(states - extractor(tiny_models("gemma-2")).extract(PROMPTS).states).max() > 0.01


def reference_certainty(model: Any, path: Path, prompts: Sequence[str]) -> np.ndarray:
    """Entropy, log-probability of the likeliest token and margin to the second, by plain forwards and numpy."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double().numpy()
        logprobs = logits - np.logaddexp.reduce(logits)
        second, first = np.sort(logprobs)[-2:]
        rows.append([-(np.exp(logprobs) * logprobs).sum(), first, first - second])
    return np.array(rows)


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED_PROMPTS], ids=["apart", "shared"])
@three_or_all
def test_certainty_of_the_next_token_is_that_of_a_plain_forward(
    name: str, prompts: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = tiny_models(name)
    certainty = extractor(path, layers=[1]).extract(prompts).next_token
    np.testing.assert_allclose(certainty, reference_certainty(reference_model(path), path, prompts), atol=1e-3)
    adapter = random_adapter(path, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(reference_model(path), adapter).eval()
    tuned = extractor(path, adapter).extract(prompts).next_token
    np.testing.assert_allclose(tuned, reference_certainty(adapted, path, prompts), atol=1e-3)
    assert np.abs(tuned - certainty).max() > 0.01


def test_a_token_that_is_ruled_out_adds_nothing_to_the_entropy() -> None:
    found = next_token_features(torch.tensor([[0.0, 0.0, -torch.inf], [50.0, -torch.inf, -torch.inf]]))
    np.testing.assert_allclose(found[0], [np.log(2), -np.log(2), 0.0], atol=1e-6)
    np.testing.assert_allclose(found[1, :2], [0.0, 0.0], atol=1e-6)


def test_certainty_is_left_out_where_it_is_not_asked_for(tiny_models: TinyModels) -> None:
    assert extractor(tiny_models("llama-2"), next_token=False).extract(PROMPTS).next_token is None


def test_rows_on_both_sides_of_the_longrope_switch_do_not_mix(tiny_models: TinyModels) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + 0.05 * i for i in range(16)],
        "long_factor": [1.0 + 0.5 * i for i in range(16)],
        "original_max_position_embeddings": 60,
    }
    path = tiny_models("phi-3.5", original_max_position_embeddings=60, rope_parameters=rope)
    model = extractor(path, batch_size=8)
    lengths = [len(model.tokenizer(prompt)["input_ids"]) for prompt in SHARED_PROMPTS]
    assert min(lengths) < 60 < max(lengths)
    expected = reference_states(reference_model(path), path, SHARED_PROMPTS)
    np.testing.assert_allclose(model.extract(SHARED_PROMPTS).states, expected, atol=1e-4)


def test_float16_storage_rounds_and_nothing_else(tiny_models: TinyModels) -> None:
    full = extractor(tiny_models("llama-2")).extract(PROMPTS).states
    half = extractor(tiny_models("llama-2"), storage_dtype="float16").extract(PROMPTS).states
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_no_prompts_give_an_empty_array(tiny_models: TinyModels) -> None:
    assert extractor(tiny_models("llama-2"), layers=[1, 2]).extract([]).states.shape == (0, 2, 64)


def test_unusable_prompts_are_named_and_the_others_are_kept(tiny_models: TinyModels) -> None:
    model = extractor(tiny_models("qwen2.5"), max_prompt_tokens=30)
    with pytest.raises(UnusableRowsError, match="prompt 2: over_long") as caught:
        model.extract([PROMPTS[0], "", PROMPTS[2], PROMPTS[1]])
    assert set(caught.value.reasons) == {1, 2}
    assert caught.value.reasons[1] == "empty"
    assert np.isnan(caught.value.extracted.states[[1, 2]]).all()
    np.testing.assert_allclose(
        caught.value.extracted.states[[0, 3]], model.extract([PROMPTS[0], PROMPTS[1]]).states, atol=1e-5
    )


def test_certainty_that_is_not_finite_is_reported(tiny_models: TinyModels) -> None:
    model = extractor(tiny_models("llama-2"))
    model.reader.get_output_embeddings().weight.data[0] = float("nan")
    with pytest.raises(UnusableRowsError, match=r"prompt 0: non_finite: .* next token's distribution") as caught:
        model.extract(PROMPTS[:1])
    assert np.isnan(caught.value.extracted.next_token).all()


def test_states_that_are_not_finite_name_prompt_and_layers(tiny_models: TinyModels) -> None:
    model = extractor(tiny_models("qwen2.5"), next_token=False)  # its head shares the weights that are poisoned here
    ids = [list(model.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    poisoned = next(token for token in ids[3] if all(token not in row for row in [*ids[:3], ids[4]]))
    model.decoder.embed_tokens.weight.data[poisoned] = float("nan")
    with pytest.raises(UnusableRowsError) as caught:
        model.extract(PROMPTS)
    assert list(caught.value.reasons) == [3]
    assert "layers [1, 2, 3]" in caught.value.reasons[3]
    assert np.isfinite(np.delete(caught.value.extracted.states, 3, axis=0)).all()


def test_a_state_too_large_for_float16_is_reported(tiny_models: TinyModels) -> None:
    model = extractor(tiny_models("qwen2.5"), storage_dtype="float16", layers=[0])
    model.decoder.embed_tokens.weight.data[:] = 1e6
    with pytest.raises(UnusableRowsError, match="as float16 in layers"):
        model.extract(PROMPTS[:1])


def test_a_layer_the_model_does_not_have_is_a_config_error(tiny_models: TinyModels) -> None:
    with pytest.raises(ConfigError, match="7"):
        extractor(tiny_models("llama-2"), layers=[1, 7])


def test_a_missing_or_empty_directory_is_a_model_error(tmp_path: Path, tiny_models: TinyModels) -> None:
    with pytest.raises(ModelError) as caught:
        extractor(tmp_path / "nowhere")
    assert caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        extractor(tmp_path / "empty")
    shutil.copytree(tiny_models("llama-2"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="weights"):
        extractor(tmp_path / "bare")


def test_an_adapter_that_does_not_fit_is_a_model_error(tmp_path: Path, tiny_models: TinyModels) -> None:
    adapter = random_adapter(tiny_models("phi-3.5"), tmp_path / "phi")  # has qkv_proj where Llama has q_proj
    with pytest.raises(ModelError, match="adapter"):
        extractor(tiny_models("llama-2"), adapter)
    narrow = random_adapter(tiny_models("llama-2"), tmp_path / "narrow")
    with pytest.raises(ModelError, match="adapter"):
        extractor(tiny_models("llama-3.1"), narrow)  # one key-value head instead of two
    with pytest.raises(ModelError):
        extractor(tiny_models("llama-2"), tmp_path / "no-adapter")


def test_states_with_an_adapter_that_adds_tokens_are_those_after_the_tokens(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    path = tiny_models("llama-2")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompt_tuned = get_peft_model(reference_model(path), config).eval()
    prompt_tuned.save_pretrained(tmp_path)
    ids = [7, 8, 9, 10]
    with torch.no_grad():
        states = prompt_tuned(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = extractor(path, tmp_path).extract([ids]).states[0]
    for layer in (1, 2, 3):
        assert np.allclose(found[layer], states[layer][0, -1], atol=1e-4)
    assert not np.allclose(found[3], extractor(path).extract([ids]).states[0][3], atol=1e-3)


def test_an_adapter_of_a_deeper_model_is_a_model_error(tmp_path: Path, tiny_models: TinyModels) -> None:
    adapter = random_adapter(tiny_models("llama-2"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds weights of 21 modules, 14 of which"):
        extractor(tiny_models("llama-2", num_hidden_layers=2), adapter)
