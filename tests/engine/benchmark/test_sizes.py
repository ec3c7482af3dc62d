"""Each cell of a benchmark gets the GPUs that its model needs, unless its config names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from engine.benchmark.matrix import cells, load_matrix
from engine.benchmark.sizes import Sizes, plan_table
from engine.cli.main import app
from engine.config import RunConfig
from ka2l.errors import ConfigError, ModelError
from ka2l.model.loading import ModelConfig
from ka2l.model.sizing import ModelNeeds

GIB = 2**30
MODEL = ModelConfig(path="some/model")


def sizes(weights_gib: float, gpu_gib: float = 80, kv_bytes: int = 128 * 1024, max_positions: int = 4096) -> Sizes:
    needs = ModelNeeds(1, int(weights_gib * GIB), kv_bytes, 32, max_positions)
    return Sizes(gpu_gib, lambda *_, **__: needs)


def test_all_three_kinds_of_workers_are_sized() -> None:
    # 15 GiB of weights, 8 of cache and 3 beside them: half of a card. An extractor fits beside it.
    config = sizes(15).sized(RunConfig(), MODEL)
    sampler = config.sampler
    assert (sampler.gpus_per_replica, sampler.tensor_parallel_size, sampler.gpu_memory_utilization) == (0.5, 1, 0.46)
    assert (config.extraction.gpus_per_replica, config.tuning.gpus_per_worker) == (0.5, 1.0)


def test_an_engine_spreads_over_cards_that_do_not_hold_it_alone() -> None:
    config = sizes(17, gpu_gib=24).sized(RunConfig(), MODEL)
    assert (config.sampler.gpus_per_replica, config.sampler.tensor_parallel_size) == (2.0, 2)
    assert config.extraction.gpus_per_replica == 1.0


def test_a_long_context_needs_room_for_one_sequence_at_least() -> None:
    long = sizes(8, max_positions=256 * 1024)
    assert long.sized(RunConfig(), MODEL).sampler.gpus_per_replica == 1.0
    short = RunConfig.model_validate({"sampler": {"max_model_len": 2048}})
    assert long.sized(short, MODEL).sampler.gpus_per_replica == 0.5


@pytest.mark.parametrize("own", [{"gpus_per_replica": 1}, {"tensor_parallel_size": 4, "gpus_per_replica": 4}])
def test_what_the_config_says_stays(own: dict[str, Any]) -> None:
    given = RunConfig.model_validate({"sampler": own, "tuning": {"gpus_per_worker": 2}})
    config = sizes(15).sized(given, MODEL)
    assert config.sampler == given.sampler
    assert config.tuning == given.tuning
    assert config.extraction.gpus_per_replica == 0.25


def test_a_config_that_names_everything_needs_no_model() -> None:
    def unread(*_: Any, **__: Any) -> ModelNeeds:
        raise ModelError("cannot be read")

    given = {
        "sampler": {"gpus_per_replica": 1},
        "extraction": {"gpus_per_replica": 1},
        "tuning": {"gpus_per_worker": 1},
    }
    config = RunConfig.model_validate(given)
    assert Sizes(80, unread).sized(config, MODEL) == config


def test_a_model_that_one_card_does_not_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"some/model does not fit one GPU of 24 GiB"):
        sizes(40, gpu_gib=24).sized(RunConfig(), MODEL)


def test_training_all_weights_is_refused_where_their_optimiser_does_not_fit() -> None:
    needs = ModelNeeds(8_000_000_000, 15 * GIB, 128 * 1024, 32, 4096)
    found = Sizes(80, lambda *_, **__: needs)
    full = {"adapter": {"kind": "full"}, "workers": 2, "gpus_per_worker": 1}
    with pytest.raises(ConfigError, match=r"full fine-tuning of some/model takes 119 GiB a worker"):
        found.sized(RunConfig.model_validate({"tuning": full}), MODEL)
    found.sized(RunConfig.model_validate({"tuning": full | {"parallel": "fsdp"}}), MODEL)


def test_only_where_a_worker_runs_changes() -> None:
    config = RunConfig()
    sized = sizes(15).sized(config, MODEL)
    for name in ("sampler", "extraction", "tuning"):
        assert getattr(sized, name).result_fields() == getattr(config, name).result_fields()


def test_a_dry_run_prints_each_cell_and_names_what_cannot_be_read(
    tiny_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "models": {"there": {"model": {"path": str(tiny_models("gemma-2"))}}},
        "common": {"pool": {"path": "pool.jsonl"}},
        "gpu_gib": 80,
    }
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["benchmark", str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "there--pool--probe--0" in line]
    assert "1 x 0.25" in line
    (tmp_path / "empty").mkdir()
    values["models"]["gone"] = {"model": {"path": str(tmp_path / "empty")}}
    path.write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["benchmark", str(path), "--dry-run"])
    assert isinstance(done.exception, ModelError)
    assert "gone--pool--probe--0" in str(done.exception)
    assert f"not sized: the size of {tmp_path / 'empty'} cannot be read" in " ".join(done.output.split())
    assert not (tmp_path / "runs").exists()


def test_the_nine_are_nine_models_on_the_same_data_sets() -> None:
    made = cells(load_matrix("nine"))
    assert len({cell.config.model.path for cell in made}) == 9
    assert len(made) == 9 * len({cell.data for cell in made})
    sized = [cell._replace(config=sizes(15).sized(cell.config, cell.config.model)) for cell in made]
    assert {cell.config.sampler.gpus_per_replica for cell in sized} == {0.5}
    out = Console(width=160)
    with out.capture() as caught:
        out.print(plan_table(sized))
    assert caught.get().count("2 x 0.5") == 2 * len(made)
