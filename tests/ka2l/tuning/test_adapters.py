"""Every kind of tuner: what it trains is what all readers read; checkpoints; held-out loss; packing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ka2l.errors import ConfigError
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.hidden_states import HiddenStateExtractor
from ka2l.knowledge.perplexity import PerplexityScorer, fact_tokens
from ka2l.model.adapter import (
    MERGED,
    PROMPT_ENCODER,
    AdapterConfig,
    check_quantisation,
    is_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
)
from ka2l.model.canary import canary, check_canary
from ka2l.model.virtual_tokens import expand_cache, split_state
from ka2l.sampling.sampler import Request, SamplerConfig, TransformersSampler
from ka2l.schemas import HELD_OUT, TrainingRow
from ka2l.tuning.checkpoints import Checkpoints
from ka2l.tuning.dpo import ComparisonRow, compare
from ka2l.tuning.knowtuning import KnowTuningConfig
from ka2l.tuning.sft import IGNORED, TuneResult, TuningConfig, _tokenized, is_held_out, training_rows, tune
from ka2l.tuning.trainer import Schedule, check_packing, trainer_arguments

NAMES = ["Lima", "Oslo", "Rome", "Cairo", "Quito", "Seoul", "Bern", "Minsk"]
FACTS = [(f"q{i}", f"Question: Where is {i}?\nAnswer:", NAMES[i]) for i in range(8)]
PROMPTS = [prompt for _, prompt, _ in FACTS]
KINDS = ("lora", "dora", "p_tuning", "prefix", "full")
RATES = {"p_tuning": 0.02, "prefix": 0.1, "full": 2e-3}


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[..., Path]) -> str:
    return str(tiny_models("llama-2"))


def config_of(kind: str, adapter: dict[str, Any] | None = None, **fields: Any) -> TuningConfig:
    shape = AdapterConfig(kind=kind, num_virtual_tokens=6, **adapter or {})
    values = {"learning_rate": RATES.get(kind, 0.01), "max_steps": 12, "batch_size": 8, "dtype": "float32"} | fields
    return TuningConfig(adapter=shape, **values)


def train(model: str, config: TuningConfig, folder: Path, **options: Any) -> TuneResult:
    rows = training_rows(FACTS, [], config, 0, chat=False)
    return tune(model, rows, config, str(folder), 0, chat=False, **options)


def weights(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


# --- Every kind, by every reader --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TuneResult]:
    made: dict[str, TuneResult] = {}

    def get(kind: str) -> TuneResult:
        if kind not in made:
            made[kind] = train(llama, config_of(kind), tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def state_of(llama: str, folder: str) -> tuple[str, str | None]:
    """Model and adapter that a sampler loads, as `engine.execution.campaign` finds them."""
    if (Path(folder) / MERGED).is_dir():
        return f"{folder}/{MERGED}", None
    return (llama, folder) if is_adapter(folder) else (folder, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_sampler_extractor_and_perplexity_read(
    kind: str, llama: str, trained: Callable[[str], TuneResult]
) -> None:
    import numpy as np

    result = trained(kind)
    assert result.metrics["last_loss"] < result.metrics["first_loss"] - 0.3
    found = canary(llama, result.adapter_dir, PROMPTS, max_tokens=6, chat=False)
    check_canary(found)
    model, adapter = state_of(llama, result.adapter_dir)
    sampler = TransformersSampler(model, SamplerConfig(max_tokens=6, stop=(), max_num_seqs=5), adapter=adapter)
    prompts = found["prompt_token_ids"]
    unequal = [*prompts, prompts[0] * 2]  # another length in the batch must change nothing
    greedy = [list(row[0].token_ids) for row in sampler.generate([Request(ids, 1, 0.0, 0) for ids in unequal])]
    check_canary(found, greedy[:-1])

    states = []
    for path, adapted in ((llama, None), (model, adapter)):
        extractor = HiddenStateExtractor(path, ExtractionConfig(layers=[1, 3]), "float32", adapted)
        together = extractor.extract(prompts).states
        assert np.allclose(together[3], extractor.extract([prompts[3]]).states[0], atol=1e-4)
        states.append(together)
    assert not np.allclose(states[0], states[1], atol=1e-3)

    tokenizer = load_tokenizer(llama)
    texts = [fact_tokens(tokenizer, answer, prompt) for _, prompt, answer in FACTS]
    base, tuned = (
        PerplexityScorer(path, "float32", adapted).perplexities(texts)
        for path, adapted in ((llama, None), (model, adapter))
    )
    assert np.log(tuned).mean() < np.log(base).mean() - 0.3


@pytest.mark.parametrize("kind", ["p_tuning", "prefix"])
@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2"])
def test_virtual_tokens_as_a_cache_give_pefts_own_logits(
    kind: str, name: str, tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    path = str(tiny_models(name))
    folder = train(path, config_of(kind, max_steps=2), tmp_path).adapter_dir
    ids = torch.tensor([load_tokenizer(path)(PROMPTS[0])["input_ids"]] * 2)
    with torch.no_grad():
        theirs = load_adapter(load_model(path), folder).eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        base, cache = split_state(load_adapter(load_model(path), folder).eval())
        assert cache is not None
        ours = base(input_ids=ids, past_key_values=expand_cache(cache, 2)).logits
        plain = base(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs.logits[:, -ids.shape[1] :], atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


def test_a_merged_model_says_what_its_adapter_says_and_names_no_folder(
    llama: str, trained: Callable[[str], TuneResult]
) -> None:
    import torch

    folder = trained("dora").adapter_dir
    ids = torch.tensor([load_tokenizer(llama)(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        adapted = load_adapter(load_model(llama), folder).eval()(input_ids=ids).logits
        merged = load_model(f"{folder}/{MERGED}").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)
    for kind in ("dora", "full"):
        place = Path(trained(kind).adapter_dir)
        for file in (place / MERGED if kind == "dora" else place).glob("*.json"):
            assert str(Path(llama).parent) not in file.read_text()


@pytest.mark.parametrize("kind", ["p_tuning", "full", "dora"])
def test_the_next_round_goes_on_from_what_the_last_one_trained(
    kind: str, llama: str, trained: Callable[[str], TuneResult], tmp_path: Path
) -> None:
    before = trained(kind)
    config = config_of(kind, max_steps=1, start="previous")
    later = train(llama, config, tmp_path, previous_adapter=before.adapter_dir).metrics
    assert later["num_trainable_parameters"] == before.metrics["num_trainable_parameters"]
    assert later["first_loss"] < before.metrics["last_loss"] + 0.05


@pytest.mark.parametrize("kind", ["dora", "p_tuning", "prefix", "full"])
def test_every_kind_can_be_compared_from_what_was_tuned(
    kind: str, llama: str, trained: Callable[[str], TuneResult], tmp_path: Path
) -> None:
    rows = [ComparisonRow(prompt, f" {name}", f" {name[::-1]}", "factuality", q) for q, prompt, name in FACTS] * 4
    own = KnowTuningConfig(dpo_beta=0.4, learning_rate=RATES.get(kind, 0.01) / 2, batch_size=8)
    config = config_of(kind).model_copy(update={"knowtuning": own})
    start = trained(kind).adapter_dir
    result = compare(llama, rows, config, str(tmp_path), 0, start, chat=False)
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    assert weights(tmp_path) != weights(start)
    check_canary(canary(llama, str(tmp_path), PROMPTS[:2], chat=False))


# --- What serves it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_what_is_said_to_be_served_is_what_vllm_takes(
    kind: str, llama: str, trained: Callable[[str], TuneResult]
) -> None:
    helper = pytest.importorskip("vllm.lora.peft_helper")
    from vllm.config.lora import LoRAConfig

    taken = helper.PEFTHelper.from_local_dir(trained(kind).adapter_dir, None)
    limits = LoRAConfig(max_lora_rank=16, max_loras=1)
    if not AdapterConfig(kind=kind).is_merged:
        taken.validate_legal(limits)
        return
    with pytest.raises(ValueError, match="DoRA"):
        taken.validate_legal(limits)


def test_each_kind_says_how_it_is_served_or_why_not() -> None:
    assert "as it is" in AdapterConfig(kind="qlora").served("vllm")
    assert "merged" in AdapterConfig(kind="dora").served("vllm")
    assert "ranks up to 512" in AdapterConfig(r=513).served("vllm")
    assert "whole model" in AdapterConfig(kind="full").served("vllm")
    for kind in ("p_tuning", "prefix"):
        assert "transformers" in AdapterConfig(kind=kind).served("transformers")
        with pytest.raises(ConfigError, match="virtual tokens") as caught:
            AdapterConfig(kind=kind).served("vllm")
        assert "sampler.kind=transformers" in str(caught.value.hint)


def test_a_fingerprint_holds_only_what_has_a_meaning_for_the_kind() -> None:
    assert set(AdapterConfig().result_fields()) == {"kind", "r", "alpha", "dropout", "target_modules"}
    assert set(AdapterConfig(kind="prefix").result_fields()) == {"kind", "num_virtual_tokens"}
    assert set(AdapterConfig(kind="full").result_fields()) == {"kind"}
    plain = TuningConfig().result_fields()
    assert not {"holdout", "patience", "packing", "checkpoint_steps", "parallel"} & set(plain)
    assert {"holdout", "patience"} < set(TuningConfig(holdout=0.1).result_fields())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter": {"kind": "qlora"}}, "needs gpus_per_worker"),
        ({"parallel": "fsdp"}, "shards a model over GPUs"),
        ({"parallel": "fsdp", "gpus_per_worker": 1, "adapter": {"kind": "qlora"}}, "cannot shard"),
        ({"packing": True, "adapter": {"kind": "p_tuning"}}, "no place for the virtual tokens"),
        ({"gradient_checkpointing": True, "adapter": {"kind": "prefix"}}, "does not go with"),
    ],
)
def test_what_cannot_go_together_is_refused_when_the_config_is_read(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TuningConfig(**fields)


def test_four_bits_without_gpu_or_package_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        check_quantisation(has_gpu=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        check_quantisation(has_gpu=True)
    assert "ka2l[qlora]" in str(caught.value.hint)


def test_fsdp_asks_transformers_for_its_second_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr("ka2l.tuning.trainer.world_size", lambda: 2)
    config = TuningConfig(parallel="fsdp", gpus_per_worker=1, workers=2, gradient_checkpointing=True)
    made = trainer_arguments(config, Schedule(8, 8, None, 1e-3), str(tmp_path), 0)
    assert made["gradient_checkpointing"] is False  # FSDP does it itself
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "")  # set by transformers below; put back afterwards
    plugin = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, fsdp=made["fsdp"], fsdp_config=made["fsdp_config"]
    ).fsdp_plugin_args
    assert (plugin["fsdp_version"], plugin["state_dict_type"]) == (2, "FULL_STATE_DICT")
    assert plugin["activation_checkpointing"] is True


@pytest.mark.gpu
def test_an_adapter_trained_on_four_bits_is_served_on_the_base_as_it_is(llama: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(llama, config_of("qlora", gpus_per_worker=1), tmp_path)
    assert result.metrics["last_loss"] < result.metrics["first_loss"] - 0.3
    check_canary(canary(llama, result.adapter_dir, PROMPTS, max_tokens=6, chat=False))


# --- Checkpoints ------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def kept_until(step: int, folder: Path) -> tuple[Checkpoints, Callable[[dict[str, Any]], None]]:
    """Keeps checkpoints in a folder, and ends the training after ``step``."""

    def keep(made: str | None) -> None:
        assert made is not None
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)

    def progress(report: dict[str, Any]) -> None:
        if report["step"] > step:
            raise KilledError

    return Checkpoints(keep), progress


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("lora", {"adapter": {"dropout": 0.2}}),
        ("p_tuning", {}),
        ("full", {}),
        ("lora", {"holdout": 0.3, "evaluate_steps": 2, "patience": 3, "learning_rate": 0.05}),
    ],
)
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bytes(
    kind: str, fields: dict[str, Any], llama: str, tmp_path: Path
) -> None:
    config = config_of(kind, **{"checkpoint_steps": 5} | fields)
    whole = train(llama, config, tmp_path / "whole")
    checkpoints, progress = kept_until(7, tmp_path / "kept")
    with pytest.raises(KilledError):
        train(llama, config, tmp_path / "cut", checkpoints=checkpoints, progress=progress)
    state = json.loads((tmp_path / "kept" / "trainer_state.json").read_text())
    assert state["global_step"] == (6 if config.holdout else 5)
    steps: list[int] = []
    resumed = Checkpoints(lambda made: None, str(tmp_path / "kept"))
    result = train(
        llama, config, tmp_path / "cut", checkpoints=resumed, progress=lambda report: steps.append(report["step"])
    )
    assert steps[0] == state["global_step"] + 1
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    same = set(whole.metrics) - {"seconds", "training_seconds"}
    assert {key: result.metrics[key] for key in same} == {key: whole.metrics[key] for key in same}
    assert not list((tmp_path / "cut").glob("checkpoint-*"))
    if kind == "p_tuning":
        assert PROMPT_ENCODER in weights(tmp_path / "cut")


def test_a_killed_comparison_goes_on_from_its_checkpoint_to_the_same_bytes(
    llama: str, trained: Callable[[str], TuneResult], tmp_path: Path
) -> None:
    rows = [ComparisonRow(prompt, f" {name}", f" {name[::-1]}", "factuality", q) for q, prompt, name in FACTS] * 2
    own = KnowTuningConfig(dpo_beta=0.4, learning_rate=0.01, batch_size=4)
    config = config_of("lora", checkpoint_steps=2).model_copy(update={"knowtuning": own})
    start = trained("lora").adapter_dir

    def run(name: str, **options: Any) -> None:
        compare(llama, rows, config, str(tmp_path / name), 0, start, chat=False, **options)

    run("whole")
    checkpoints, progress = kept_until(2, tmp_path / "kept")
    with pytest.raises(KilledError):
        run("cut", checkpoints=checkpoints, progress=progress)
    assert not (tmp_path / "kept" / "ref").exists()
    run("cut", checkpoints=Checkpoints(lambda made: None, str(tmp_path / "kept")))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


# --- What is held out -------------------------------------------------------------------------------------------------


def test_what_is_held_out_is_fixed_by_its_id_and_never_trained_on() -> None:
    config = TuningConfig(holdout=0.3, num_epochs=2)
    facts = [(f"q{i}", f"Q{i}:", "yes") for i in range(200)]
    few, many = (training_rows(facts[:count], [], config, 0, chat=False) for count in (100, 200))
    out = [{row.question_id for row in rows if row.source == HELD_OUT} for rows in (few, many)]
    assert out[0] < out[1]
    assert len(out[1]) == pytest.approx(60, abs=20)
    for rows, held_out in zip((few, many), out, strict=True):
        assert not held_out & {row.question_id for row in rows if row.source != HELD_OUT}
        assert sum(row.source == HELD_OUT for row in rows) == len(held_out)
    name = next(iter(out[1]))
    assert is_held_out(f"{name}#fine_grained", config, 0)  # what is made of an answer stays with it


def test_something_is_held_out_and_something_trained_on_where_there_are_two() -> None:
    for holdout in (0.01, 0.99):
        for seed in range(5):
            rows = training_rows(FACTS[:2], [], TuningConfig(holdout=holdout, num_epochs=1), seed, chat=False)
            assert [row.source for row in rows] == ["annotation", HELD_OUT]
    rows = training_rows(FACTS[:1], [], TuningConfig(holdout=0.5, num_epochs=1), 0, chat=False)
    assert [row.source for row in rows] == ["annotation"]


def test_training_ends_early_and_keeps_the_state_with_the_lowest_held_out_loss(llama: str, tmp_path: Path) -> None:
    import torch

    config = config_of("lora", holdout=0.3, evaluate_steps=1, patience=2, max_steps=40, learning_rate=0.03)
    rows = training_rows(FACTS, [], config, 0, chat=False)
    metrics = tune(llama, rows, config, str(tmp_path), 0, chat=False).metrics
    assert metrics["num_steps"] == metrics["best_step"] + 2 < 40
    held_out = [row for row in rows if row.source == HELD_OUT]
    assert metrics["num_held_out"] == len(held_out)
    model = load_adapter(load_model(llama), str(tmp_path)).eval()
    total, num_tokens = 0.0, 0
    for example in _tokenized(load_tokenizer(llama), held_out, config, chat=False)[0]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"])[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).item()
        num_tokens += int((labels != IGNORED).sum())
    assert metrics["held_out_loss"] == pytest.approx(total / num_tokens, rel=1e-3)


# --- Packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "gemma-2"])
def test_packed_rows_train_as_padded_ones_do(name: str, tiny_models: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = str(tiny_models(name))
    rows = [TrainingRow(prompt * (1 + i % 3), f" {answer}", "annotation", q) for i, (q, prompt, answer) in
            enumerate(FACTS)]  # fmt: skip
    made = []
    for packing in (False, True):
        config = config_of("lora", max_steps=1, packing=packing)
        made.append(tune(path, rows, config, str(tmp_path / str(packing)), 0, chat=False))
    assert made[1].metrics["first_loss"] == pytest.approx(made[0].metrics["first_loss"], rel=1e-4)
    a, b = (load_file(f"{result.adapter_dir}/adapter_model.safetensors") for result in made)
    assert all((a[key] - b[key]).abs().max() < 1e-3 for key in a)


def test_packing_is_refused_where_rows_would_see_each_other() -> None:
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Summing(torch.nn.Module):
        """What it says depends on all tokens before, wherever a row begins."""

        device = torch.device("cpu")

        class config:  # noqa: N801
            _attn_implementation = "home-made"

        def forward(self, input_ids: Any, position_ids: Any = None, use_cache: bool = False) -> Any:
            return CausalLMOutputWithPast(logits=input_ids.cumsum(-1)[..., None].float())

    with pytest.raises(ConfigError, match="home-made"):
        check_packing(Summing())
