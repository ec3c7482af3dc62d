"""Merged weights are the adapter's answers without the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ka2l.errors import CanaryError, ModelError
from ka2l.model.canary import canary
from ka2l.model.loading import load_causal_lm
from ka2l.model.merging import check_merged, merge_adapter

PROMPTS = ["Question: Who wrote the play Hamlet?\nAnswer:", "Question: Why?\nAnswer:"]
TinyModels = Callable[..., Path]


def random_adapter(model: Path, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    adapted = get_peft_model(
        load_causal_lm(str(model), "float32"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama-2", "qwen2.5", "gemma-2", "phi-3.5"])
def test_merged_weights_give_the_adapter_s_logits(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models(name)
    adapter = random_adapter(model, tmp_path / "adapter")
    assert merge_adapter(str(model), str(adapter), str(tmp_path / "merged")) == "float32"
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(PROMPTS[0], return_tensors="pt")["input_ids"]
    base = load_causal_lm(str(model), "float32")
    with torch.inference_mode():
        merged = load_causal_lm(str(tmp_path / "merged"), "auto")(input_ids=ids).logits
        unadapted = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)
    assert (merged - unadapted).abs().max() > 0.1
    check_merged(str(tmp_path / "merged"), "float32", canary(str(model), str(adapter), PROMPTS, chat=False))


def test_merged_weights_are_saved_in_what_the_base_model_is_saved_in_and_rounded_once(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_models("llama-2"), dtype=torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_models("llama-2")).save_pretrained(model)
    adapter = random_adapter(model, tmp_path / "adapter")
    assert merge_adapter(str(model), str(adapter), str(tmp_path / "merged")) == "bfloat16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.layers.0.self_attn.q_proj"
    weights = {}
    for folder in (model, tmp_path / "merged"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            weights[folder.name] = file.get_tensor(f"{name}.weight")
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        a, b = (file.get_tensor(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 4
    expected = (weights["model"].float() + scale * b @ a).bfloat16()
    assert weights["merged"].dtype == torch.bfloat16
    # Sums in another order may round to the neighbouring number, of which there are 256 between two powers of two.
    torch.testing.assert_close(weights["merged"], expected, rtol=2**-7, atol=0)


def test_weights_that_answer_otherwise_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models("llama-2")
    found = canary(str(model), str(random_adapter(model, tmp_path / "adapter")), PROMPTS, chat=False)
    with pytest.raises(CanaryError, match=r"merged weights do not answer as the adapter does.*\n.*leave --merged out"):
        check_merged(str(model), "float32", found)


def test_an_adapter_of_virtual_tokens_cannot_be_merged(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models("llama-2")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    get_peft_model(load_causal_lm(str(model), "float32"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"P_TUNING.*\n.*leave --merged out"):
        merge_adapter(str(model), str(tmp_path / "adapter"), str(tmp_path / "merged"))
