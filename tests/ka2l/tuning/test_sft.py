from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka2l.errors import AnnotationError, CanaryError, ConfigError, EngineError, ModelError
from ka2l.model.adapter import AdapterConfig, load_adapter, load_model, load_tokenizer, new_adapter, save_adapter
from ka2l.model.canary import canary, check_canary
from ka2l.model.tokens import prompt_token_ids
from ka2l.schemas import TrainingRow
from ka2l.tuning.sft import (
    IGNORED,
    TuneResult,
    TuningConfig,
    _tokenized,
    is_rehearsed,
    num_steps,
    rows_per_pass,
    training_rows,
    tune,
)

NAMES = ["Lima", "Oslo", "Rome", "Cairo", "Quito", "Seoul", "Bern", "Minsk", "Accra", "Dhaka"]
FACTS = [(f"q{i:02d}", f"Question: Where does person {i} live?\nAnswer:", NAMES[i * 7 % 10]) for i in range(20)]
LEARNING = TuningConfig(learning_rate=1e-2, num_epochs=60, batch_size=20, max_length=128)


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[..., Path]) -> str:
    return str(tiny_models("llama-2"))


@pytest.fixture(scope="module")
def learned(llama: str, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """Twenty facts trained to the end."""
    rows = training_rows(FACTS, [], LEARNING, seed=0, chat=False)
    return tune(llama, rows, LEARNING, str(tmp_path_factory.mktemp("learned")), seed=0, chat=False)


@pytest.fixture(scope="module")
def learned_canary(llama: str, learned: TuneResult) -> dict[str, Any]:
    return canary(llama, learned.adapter_dir, [prompt for _, prompt, _ in FACTS], max_tokens=8, chat=False)


def tune_briefly(model: str, tmp_path: Path, **fields: Any) -> TuneResult:
    config = TuningConfig(**{"max_steps": 2, "batch_size": 20, "dtype": "float32"} | fields)
    return tune(model, training_rows(FACTS, [], config, 0, chat=False), config, str(tmp_path), seed=0, chat=False)


# --- Rows -------------------------------------------------------------------------------------------------------------


@given(
    num_annotated=st.integers(0, 5),
    num_answers=st.lists(st.integers(1, 7), max_size=6),
    num_epochs=st.integers(1, 12),
    ratio=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 3),
)
def test_a_pass_holds_every_annotated_question_once_and_rehearsed_ones_in_turn(
    num_annotated: int, num_answers: list[int], num_epochs: int, ratio: float, seed: int
) -> None:
    annotations = [(f"a{i}", f"A{i}:", "yes") for i in range(num_annotated)]
    rehearsal = [(f"r{i}", f"R{i}:", [f"own {k}" for k in range(n)]) for i, n in enumerate(num_answers)]
    config = TuningConfig(num_epochs=num_epochs, rehearsal_ratio=ratio)
    if not annotations and not rehearsal:
        with pytest.raises(AnnotationError, match="nothing to train on"):
            training_rows(annotations, rehearsal, config, seed, chat=False)
        return
    rows = training_rows(annotations, rehearsal, config, seed, chat=False)
    per_pass = rows_per_pass(config, len(annotations), len(rehearsal))
    assert len(rows) == num_epochs * per_pass
    for start in range(0, len(rows), per_pass):
        ids = [row.question_id for row in rows[start : start + per_pass]]
        assert {f"a{i}" for i in range(num_annotated)} <= set(ids)
        assert sum(name.startswith("r") for name in ids) == per_pass - num_annotated
    turns = Counter(row.question_id for row in rows)
    rehearsed_turns = [turns[f"r{i}"] for i in range(len(num_answers))]
    assert not rehearsed_turns or max(rehearsed_turns) - min(rehearsed_turns) <= 1
    for i, n in enumerate(num_answers):
        shown = Counter(row.completion for row in rows if row.question_id == f"r{i}")
        assert len(shown) == min(n, turns[f"r{i}"])
        assert not shown or max(shown.values()) - min(shown.values()) <= 1


def test_rehearsed_rows_do_not_outnumber_the_annotated_ones_beyond_the_ratio() -> None:
    assert rows_per_pass(TuningConfig(), num_annotated=250, num_rehearsed=1650) == 500
    assert rows_per_pass(TuningConfig(rehearsal_ratio=2.0), num_annotated=250, num_rehearsed=1650) == 750
    assert rows_per_pass(TuningConfig(), num_annotated=1500, num_rehearsed=400) == 1900
    assert rows_per_pass(TuningConfig(), num_annotated=0, num_rehearsed=40) == 40


def test_rows_do_not_depend_on_the_order_in_which_questions_arrive() -> None:
    rehearsal = [(f"r{i}", "R:", [f" {i}", "", str(-i)]) for i in range(9)]
    config = TuningConfig(num_epochs=2)
    forward = training_rows(FACTS, rehearsal, config, 0, chat=False)
    backward = training_rows(FACTS[::-1], rehearsal[::-1], config, 0, chat=False)
    assert forward == backward
    assert forward != training_rows(FACTS, rehearsal, config, 1, chat=False)


def test_annotated_questions_are_not_rehearsed_and_empty_own_answers_are_dropped() -> None:
    rehearsal = [("q00", FACTS[0][1], ["wrong"]), ("r1", "R:", ["", "  "]), ("r2", "R:", ["", " kept "])]
    rows = training_rows(FACTS[:1], rehearsal, TuningConfig(num_epochs=4), 0, chat=False)
    assert {(row.question_id, row.completion, row.source) for row in rows} == {
        ("q00", " Lima", "annotation"),
        ("r2", " kept", "rehearsal"),
    }


def test_rehearsed_share_is_kept_and_grows_with_the_setting() -> None:
    ids = [f"r{i}" for i in range(2000)]
    shares = [
        {i for i in ids if is_rehearsed(i, TuningConfig(rehearsal=share), seed=3)} for share in (0.0, 0.3, 0.6, 1.0)
    ]
    assert [len(s) for s in shares] == pytest.approx([0, 600, 1200, 2000], abs=80)
    assert shares[0] < shares[1] < shares[2] < shares[3]
    rows = training_rows(
        [], [(i, "R:", ["own"]) for i in ids], TuningConfig(rehearsal=0.3, num_epochs=1), 3, chat=False
    )
    assert {row.question_id for row in rows} == shares[1]


def test_an_empty_annotated_answer_is_an_error_that_names_the_question() -> None:
    with pytest.raises(AnnotationError, match="q7"):
        training_rows([("q7", "A:", " ")], [], TuningConfig(), 0, chat=False)


def test_steps_follow_from_passes_or_are_given() -> None:
    assert num_steps(TuningConfig(num_epochs=3), 50, 50) == 5
    assert num_steps(TuningConfig(num_epochs=3), 20, 0) == 3
    assert num_steps(TuningConfig(num_epochs=3), 64, 1000) == 6
    config = TuningConfig(max_steps=7, batch_size=8)
    assert num_steps(config, 100, 0) == 7
    assert len(training_rows(FACTS, [], config, 0, chat=False)) == 56


def test_config_reads_and_writes_from_and_refuses_unknown_keys() -> None:
    config = TuningConfig(**{"from": "previous"})
    assert config.start == "previous"
    assert config.model_dump()["from"] == "previous"
    assert TuningConfig(**config.model_dump()) == config
    with pytest.raises(ValueError, match="learning_rat"):
        TuningConfig(learning_rat=1)
    assert "workers" not in config.result_fields()


# --- Tokens and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "glm-4", "qwen2.5"])
@pytest.mark.parametrize("chat", [False, True])
def test_loss_falls_on_answer_and_end_token_after_the_prompt_as_the_model_sees_it(
    tiny_models: Callable[..., Path], name: str, chat: bool
) -> None:
    tokenizer = load_tokenizer(str(tiny_models(name)))
    prompt = FACTS[0][1]
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        seen = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    else:
        seen = list(tokenizer(prompt)["input_ids"])
    assert prompt_token_ids(tokenizer, prompt, chat) == seen
    rows = training_rows([("q", prompt, "Lima")], [], TuningConfig(), 0, chat=chat)
    dataset, _ = _tokenized(tokenizer, rows, TuningConfig(), chat)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert ids[: len(seen)] == seen
    assert labels[: len(seen)] == [IGNORED] * len(seen)
    assert labels[len(seen) :] == ids[len(seen) :]
    assert tokenizer.decode(ids[len(seen) :]) == ("Lima</s>" if chat else " Lima</s>")


def test_a_completion_that_would_merge_into_the_prompt_leaves_the_prompt_tokens_alone(llama: str) -> None:
    tokenizer = load_tokenizer(llama)
    row = TrainingRow("Quest", "ion", "annotation", "q")
    prompt_ids = list(tokenizer(row.prompt)["input_ids"])
    assert list(tokenizer(row.prompt + row.completion)["input_ids"])[: len(prompt_ids)] != prompt_ids
    dataset, _ = _tokenized(tokenizer, [row], TuningConfig(), chat=False)
    assert dataset[0]["input_ids"][: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(dataset[0]["input_ids"][len(prompt_ids) :]) == "ion</s>"


def test_rows_that_are_too_long_are_left_out_and_counted(llama: str, tmp_path: Path) -> None:
    rows = [TrainingRow(prompt, " Lima", "annotation", q) for q, prompt, _ in FACTS]
    rows.append(TrainingRow("word " * 300, " Lima", "annotation", "long"))
    config = TuningConfig(max_steps=1, batch_size=4)
    metrics = tune(llama, rows, config, str(tmp_path), 0, chat=False).metrics
    assert (metrics["num_rows"], metrics["num_over_long"]) == (20, 1)
    with pytest.raises(ConfigError, match="max_length"):
        tune(llama, rows, config.model_copy(update={"max_length": 8}), str(tmp_path), 0, chat=False)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_twenty_facts_are_learned_and_the_model_stops_after_each(
    learned: TuneResult, learned_canary: dict[str, Any], llama: str
) -> None:
    tokenizer = load_tokenizer(llama)
    answers = [tokenizer.decode(tokens) for tokens in learned_canary["peft_tokens"]]
    assert answers == [f" {answer}</s>" for _, _, answer in FACTS]
    metrics = learned.metrics
    assert metrics["last_loss"] < 0.3 < 3.0 < metrics["first_loss"]
    assert (metrics["num_steps"], metrics["num_rows"], metrics["batch_size"]) == (60, 1200, 20)
    lengths = [len(tokenizer(f"{prompt} {answer}")["input_ids"]) + 1 for _, prompt, answer in FACTS]
    assert metrics["num_tokens"] == 60 * sum(lengths)


def test_the_example_shows_what_the_loss_falls_on(learned: TuneResult) -> None:
    prompt, bracket, rest = learned.metrics["example"].partition("⟦")
    assert bracket == "⟦"
    answers = {f"<s>{prompt}": f" {answer}</s>⟧" for _, prompt, answer in FACTS}
    assert answers[prompt] == rest


@pytest.mark.parametrize("name", ["llama-3.1", "mistral-v0.1", "qwen2.5", "glm-4", "gemma-2", "phi-3.5"])
def test_first_loss_is_the_cross_entropy_of_the_base_model(
    tiny_models: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    import torch

    path = str(tiny_models(name))
    config = TuningConfig(max_steps=1, batch_size=6, dtype="float32")  # of different lengths: padded
    rows = training_rows(FACTS[5:11], [], config, 0, chat=False)
    first_loss = tune(path, rows, config, str(tmp_path), 0, chat=False).metrics["first_loss"]
    model, total, num_tokens = load_model(path), 0.0, 0
    for example in _tokenized(load_tokenizer(path), rows, config, chat=False)[0]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"])[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).item()
        num_tokens += int((labels != IGNORED).sum())
    assert first_loss == pytest.approx(total / num_tokens, rel=1e-4)


def test_same_seed_gives_the_same_bytes_and_no_path_is_written(llama: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tune_briefly(llama, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        Path(llama).name
    )


def test_accumulated_micro_batches_train_as_one_batch(llama: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = tune_briefly(llama, tmp_path / "whole", learning_rate=1e-3)
    parts = tune_briefly(llama, tmp_path / "parts", learning_rate=1e-3, micro_batch_size=5)
    assert whole.metrics["num_steps"] == parts.metrics["num_steps"] == 2
    assert whole.metrics["batch_size"] == parts.metrics["batch_size"] == 20
    a, b = (load_file(f"{result.adapter_dir}/adapter_model.safetensors") for result in (whole, parts))
    assert all(abs(a[name] - b[name]).max() < 1e-4 for name in a)


def test_previous_adapter_is_continued_only_where_asked(llama: str, learned: TuneResult, tmp_path: Path) -> None:
    losses = {}
    for start in ("base", "previous"):
        config = TuningConfig(max_steps=1, batch_size=20, start=start)
        rows = training_rows(FACTS, [], config, 0, chat=False)
        result = tune(llama, rows, config, str(tmp_path / start), 0, learned.adapter_dir, chat=False)
        losses[start] = result.metrics["first_loss"]
        assert result.metrics["num_trainable_parameters"] == learned.metrics["num_trainable_parameters"]
    assert losses["previous"] < 0.3 < 3.0 < losses["base"]


def test_progress_is_reported_to_the_last_step(llama: str, tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    config = TuningConfig(max_steps=20, batch_size=4)
    rows = training_rows(FACTS, [], config, 0, chat=False)
    result = tune(llama, rows, config, str(tmp_path), 0, progress=reports.append, chat=False)
    assert [report["step"] for report in reports] == [1, *range(2, 21, 2)]
    assert {report["num_steps"] for report in reports} == {20}
    assert reports[-1]["loss"] == result.metrics["last_loss"]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["no_such_layer"], ["q_proj", "no_such_layer"], "no_such_.*"])
def test_target_modules_that_match_nothing_are_an_error_that_names_the_linear_modules(
    llama: str, tmp_path: Path, targets: str | list[str]
) -> None:
    with pytest.raises(ModelError, match="no_such_") as caught:
        tune_briefly(llama, tmp_path, adapter=AdapterConfig(target_modules=targets))
    assert "down_proj" in str(caught.value.hint)
    assert "q_proj" in str(caught.value.hint)


def test_an_adapter_on_the_lm_head_is_refused(llama: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="LM head"):
        tune_briefly(llama, tmp_path, adapter=AdapterConfig(target_modules=["q_proj", "lm_head"]))


def test_a_model_directory_without_weights_is_a_model_error(llama: str, tmp_path: Path) -> None:
    for file in Path(llama).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="weights"):
        tune_briefly(str(tmp_path), tmp_path / "out")


def test_a_folder_without_adapter_is_a_model_error(llama: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_adapter(load_model(llama), str(tmp_path))


def test_no_rows_are_an_annotation_error(llama: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no rows"):
        tune(llama, [], TuningConfig(), str(tmp_path), 0, chat=False)


def test_a_loss_that_is_not_finite_stops_the_training(llama: str, tmp_path: Path) -> None:
    model = load_model(llama)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(llama).save_pretrained(tmp_path / "broken")
    with pytest.raises(EngineError, match="diverged at step 1"):
        tune_briefly(str(tmp_path / "broken"), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# --- Canary -----------------------------------------------------------------------------------------------------------


def test_canary_passes_a_trained_adapter(learned_canary: dict[str, Any]) -> None:
    assert learned_canary["num_changed_tokens"] > 0
    json.dumps(learned_canary)
    tokens = learned_canary["peft_tokens"]
    check_canary(learned_canary)
    check_canary(learned_canary, tokens)
    check_canary(learned_canary, [answer[:-1] for answer in tokens])  # an engine that leaves the end token out


def test_canary_answers_as_generate_does(llama: str, learned: TuneResult, learned_canary: dict[str, Any]) -> None:
    import torch

    model = load_adapter(load_model(llama), learned.adapter_dir).eval()
    for ids, tokens in zip(learned_canary["prompt_token_ids"], learned_canary["peft_tokens"], strict=True):
        inputs = torch.tensor([ids])
        generated = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=8
        )
        assert generated[0, len(ids) :].tolist() == tokens


def test_canary_detects_an_adapter_that_changes_nothing(llama: str, tmp_path: Path) -> None:
    save_adapter(new_adapter(load_model(llama), AdapterConfig()), llama, str(tmp_path))
    result = canary(llama, str(tmp_path), [FACTS[0][1]], chat=False)
    assert result["max_logit_difference"] == 0.0
    with pytest.raises(CanaryError, match="changes nothing"):
        check_canary(result, result["peft_tokens"])
    with pytest.raises(CanaryError, match="changes nothing"):
        check_canary(result | {"max_logit_difference": float("nan")})


def test_canary_detects_an_engine_that_serves_the_base_model(llama: str, learned_canary: dict[str, Any]) -> None:
    import torch

    model = load_model(llama).eval()
    answers = []
    for ids in learned_canary["prompt_token_ids"]:
        inputs = torch.tensor([ids])
        generated = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=8
        )
        answers.append(generated[0, len(ids) :].tolist())
    with pytest.raises(CanaryError, match="PEFT says") as caught:
        check_canary(learned_canary, answers)
    assert "person 0" in caught.value.message
    assert str(learned_canary["peft_tokens"][0]) in caught.value.message
    assert str(answers[0]) in caught.value.message


def test_canary_tolerates_another_token_at_a_genuine_tie_only() -> None:
    result = {
        "max_logit_difference": 1.0,
        "dtype": "float32",
        "eos_token_ids": [1],
        "prompts": ["A:"],
        "peft_tokens": [[5, 6, 7, 1]],
        "margins": [[2.0, 1e-5, 2.0, 2.0]],
        "runner_up_tokens": [[8, 9, 8, 8]],
    }
    check_canary(result, [[5, 9, 4, 4, 4]])
    with pytest.raises(CanaryError, match="from token 1 on"):
        check_canary(result, [[5, 4, 7, 1]])  # neither of the tied tokens
    with pytest.raises(CanaryError, match="from token 2 on"):
        check_canary(result, [[5, 6, 8, 1]])  # no tie there
    with pytest.raises(CanaryError, match="from token 2 on"):
        check_canary(result, [[5, 6]])  # stopped early
    with pytest.raises(CanaryError, match="from token 1 on"):
        check_canary(result, [[5, 9, 7, 1]], tie_margin=1e-6)
    with pytest.raises(CanaryError, match="1 prompts but got 2"):
        check_canary(result, [[5], [6]])


def test_a_tie_with_the_end_token_may_end_the_other_answer() -> None:
    result = {
        "max_logit_difference": 1.0,
        "dtype": "float32",
        "eos_token_ids": [1],
        "prompts": ["A:"],
        "peft_tokens": [[5, 6]],
        "margins": [[2.0, 1e-5]],
        "runner_up_tokens": [[8, 1]],
    }
    check_canary(result, [[5]])
    with pytest.raises(CanaryError):
        check_canary(result | {"runner_up_tokens": [[8, 9]]}, [[5]])
