from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ka2l.errors import AnnotationError, ConfigError
from ka2l.model.adapter import load_adapter, load_model, load_tokenizer
from ka2l.schemas import TrainingRow
from ka2l.tuning.dpo import ComparisonRow, _tokenized, _trainer_class, compare, comparison_rows
from ka2l.tuning.knowtuning import KnowTuningConfig
from ka2l.tuning.sft import TuningConfig, tune
from ka2l.tuning.trainer import Schedule, trainer_arguments

NAMES = ["Lima", "Oslo", "Rome", "Cairo"]
ROWS = [
    ComparisonRow(f"Question: Where is {i}?\nAnswer:", f" {name} by the sea", f" {name[::-1]}", "factuality", f"q{i}")
    for i, name in enumerate(NAMES)
]


def config(**fields: Any) -> TuningConfig:
    own = KnowTuningConfig(**{"dpo_beta": 0.4, "sft_weight": 0.7, "learning_rate": 0.01, "batch_size": 4} | fields)
    return TuningConfig(kind="knowtuning", knowtuning=own, dtype="float32", max_steps=6, learning_rate=0.02)


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[..., Path]) -> str:
    return str(tiny_models("llama-2"))


@pytest.fixture(scope="module")
def stage_one(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that differs from the base model."""
    folder = str(tmp_path_factory.mktemp("stage_one"))
    rows = [TrainingRow(row.prompt, row.better, "annotation", row.question_id) for row in ROWS]
    tune(llama, rows, config(), folder, seed=0, chat=False)
    return folder


def trainer_on(model: Any, llama: str, folder: Path, ref_model: Any = None, **fields: Any) -> Any:
    from trl import DPOConfig

    tokenizer = load_tokenizer(llama)
    used = config(**fields)
    own = used.knowtuning
    args = DPOConfig(
        **trainer_arguments(used, Schedule(len(ROWS), 4, None, own.learning_rate), str(folder), 0),
        beta=own.dpo_beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, own.sft_weight],
    )
    dataset = _tokenized(tokenizer, ROWS, used, False)
    return _trainer_class()(
        model=model, ref_model=ref_model, args=args, train_dataset=dataset, processing_class=tokenizer
    )


def log_probabilities(model: Any, batch: dict[str, Any]) -> Any:
    """Log-probability of each answer's tokens by a plain forward pass, shape (2 * num_rows, length - 1)."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return chosen * batch["completion_mask"][:, 1:]


def move(policy: Any) -> None:
    """Take a policy away from its reference."""
    import torch

    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".default." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_the_loss_is_dpo_plus_gamma_times_the_better_answers_cross_entropy(
    llama: str, stage_one: str, tmp_path: Path
) -> None:
    import torch

    policy = load_adapter(load_model(llama), stage_one, trainable=True)
    trainer = trainer_on(policy, llama, tmp_path)
    move(policy)
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy.eval()
    found = trainer.compute_loss(policy, dict(batch)).item()

    reference = load_adapter(load_model(llama), stage_one)
    reference.eval()
    ours, theirs = log_probabilities(policy, batch), log_probabilities(reference, batch)
    better, worse = (ours - theirs).sum(-1).chunk(2)
    dpo = -torch.nn.functional.logsigmoid(0.4 * (better - worse)).mean()
    sft = -ours.chunk(2)[0].sum() / batch["completion_mask"].chunk(2)[0][:, 1:].sum()
    assert (better - worse).abs().max() > 0.05
    assert found == pytest.approx((dpo + 0.7 * sft).item(), rel=1e-4)


def test_switching_adapters_gives_a_separate_reference_models_log_probabilities(
    llama: str, stage_one: str, tmp_path: Path
) -> None:
    import torch

    one = trainer_on(load_adapter(load_model(llama), stage_one, trainable=True), llama, tmp_path / "one")
    separate = load_adapter(load_model(llama), stage_one).merge_and_unload()
    two = trainer_on(
        load_adapter(load_model(llama), stage_one, trainable=True), llama, tmp_path / "two", ref_model=separate
    )
    move(one.model)
    batch = one.data_collator(list(one.train_dataset))
    switched = one.compute_ref_log_probs(one.model, dict(batch))
    apart = two.compute_ref_log_probs(two.ref_model, dict(batch))
    moved = log_probabilities(one.model.eval(), batch).sum(-1).chunk(2)
    for found, wanted, policy in zip(switched, apart, moved, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert (policy - wanted).abs().max() > 0.1


def test_training_prefers_the_better_answers_and_starts_at_the_stage_one_model(
    llama: str, stage_one: str, tmp_path: Path
) -> None:
    rows = ROWS * 8
    result = compare(llama, rows, config(), str(tmp_path / "out"), 0, stage_one, chat=False)
    assert result.metrics["num_steps"] == 8
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    trainer = trainer_on(load_adapter(load_model(llama), stage_one, trainable=True), llama, tmp_path / "t")
    batch = trainer.data_collator(list(trainer.train_dataset))
    margins = []
    for folder in (stage_one, result.adapter_dir):
        model = load_adapter(load_model(llama), folder)
        better, worse = log_probabilities(model.eval(), batch).sum(-1).chunk(2)
        margins.append((better - worse).min().item())
    assert margins[1] > margins[0] + 1


def test_the_same_training_gives_the_same_adapter_and_no_trace_of_its_reference(
    llama: str, stage_one: str, tmp_path: Path
) -> None:
    folders = [Path(compare(llama, ROWS, config(), str(tmp_path / name), 3, stage_one, chat=False)[0]) for name in "ab"]
    files = [{path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in folders]
    assert files[0] == files[1]
    assert "adapter_model.safetensors" in files[0]
    assert not [path for path in folders[0].rglob("*") if "ref" in path.name]


def test_comparisons_that_are_too_long_are_left_out_and_counted(llama: str, stage_one: str, tmp_path: Path) -> None:
    long = ROWS[0]._replace(worse=" far" * 300, question_id="long")
    metrics = compare(llama, [*ROWS, long], config(), str(tmp_path), 0, stage_one, chat=False).metrics
    assert (metrics["num_rows"], metrics["num_over_long"]) == (4, 1)


def test_only_comparisons_that_are_too_long_are_an_error_that_says_how_long(llama: str) -> None:
    short = copy.deepcopy(config()).model_copy(update={"max_length": 3})
    with pytest.raises(ConfigError, match="max_length = 3"):
        _tokenized(load_tokenizer(llama), ROWS, short, False)


def test_nothing_to_compare_is_an_error(llama: str, stage_one: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="nothing to compare"):
        compare(llama, [], config(), str(tmp_path), 0, stage_one, chat=False)


def test_rows_are_passes_over_all_pairs_in_an_order_of_their_own() -> None:
    pairs = [(f"q{i}", "factuality", f"p{i}", "good", "bad") for i in range(8)]
    rows = comparison_rows(pairs, KnowTuningConfig(num_epochs=2.5), 0, chat=False)
    first, second = ([row.question_id for row in rows[start : start + 8]] for start in (0, 8))
    assert len(rows) == 20
    assert sorted(first) == sorted(second) == [f"q{i}" for i in range(8)]
    assert first != second
    assert rows == comparison_rows(pairs[::-1], KnowTuningConfig(num_epochs=2.5), 0, chat=False)
    assert (rows[0].better, rows[0].worse) == (" good", " bad")
