"""Rows for models that are asked through a chat template, and with an instruction and worked examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from engine.export.data import FILES, Asked, Example, Format, write_format
from ka2l.model.loading import ModelConfig, load_causal_lm, load_tokenizer
from ka2l.prompts import PromptConfig, Prompter

QUESTION = "Who wrote the play Hamlet?"
CONFIG = PromptConfig(template="chat", instruction="Answer.", num_shots=1)
EXAMPLES = [
    Example(QUESTION, "William | Shakespeare", "Lima", "q1", "own_answer", "Ada", 0),
    Example("Straße?", "Ja\nnein", "1969", "q2", "own_answer", "Bob", 1),
]
TinyModels = Callable[..., Path]


def written(name: Format, folder: Path, asked: Asked) -> Any:
    path = folder / FILES[name]
    assert write_format(path, name, EXAMPLES, asked) == len(EXAMPLES)
    return load_dataset("json", data_files=str(path), cache_dir=str(folder / "cache"), split="train")


@pytest.mark.parametrize("chat", [True, False])
def test_trl_s_prompts_are_those_of_the_run(chat: bool, tiny_models: TinyModels, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_models("llama-2"))))
    config = CONFIG.model_copy(update={"template": "chat" if chat else "plain"})
    row = written("prompt_completion", tmp_path, Asked(config, chat))[0]
    prompt = row["prompt"]
    if chat:
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert prompt == Prompter(tokenizer, config).text(QUESTION)


def test_the_instruction_stands_where_the_formats_have_a_place_for_it(tmp_path: Path) -> None:
    asked = Asked(CONFIG, True)
    alpaca = written("alpaca", tmp_path, asked)
    assert [alpaca[0][key] for key in ("instruction", "input", "output")] == ["Answer.", QUESTION, EXAMPLES[0].answer]
    sharegpt = written("sharegpt", tmp_path, asked)
    assert [turn["value"] for turn in sharegpt[1]["conversations"]] == ["Answer.\n\nStraße?", "Ja\nnein"]


@pytest.mark.parametrize("name", ["prompt_completion", "preference"])
def test_trl_trains_a_step_on_conversations(name: Format, tiny_models: TinyModels, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model = tiny_models("llama-2")
    trainer_class, config_class = (SFTTrainer, SFTConfig) if name == "prompt_completion" else (DPOTrainer, DPOConfig)
    trainer = trainer_class(
        model=load_causal_lm(str(model), "float32"),
        args=config_class(
            output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, save_strategy="no",
            report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        ),
        train_dataset=written(name, tmp_path, Asked(CONFIG, True)),
        processing_class=load_tokenizer(ModelConfig(path=str(model))),
    )  # fmt: skip
    assert trainer.train().global_step == 1
