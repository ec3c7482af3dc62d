"""A benchmark is a product of axes; each cell of it is the config of an ordinary run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.benchmark.matrix import cells, dump_matrix, load_matrix, merge
from ka2l.errors import ConfigError
from ka2l.pool.sources import KNOWN_DATASETS


def matrix(folder: Path, **values: Any) -> str:
    path = folder / "matrix.yaml"
    given = {
        "models": {"a": {"model": {"path": "models/a"}}, "b": {"model": {"path": "models/b", "dtype": "float32"}}},
        "common": {"rounds": 2, "pool": {"path": "pool.jsonl"}, "selection": {"budget": 20}},
    }
    path.write_text(yaml.safe_dump(merge(given, values)))
    return str(path)


def test_there_is_a_cell_for_every_model_data_set_strategy_and_seed(tmp_path: Path) -> None:
    data = {"facts": {"pool": {"path": "facts.jsonl"}}, "law": {"pool": {"path": "law.jsonl", "num_eval": 50}}}
    strategies = {"probe": {}, "random": {"selection": {"kind": "random"}}}
    made = cells(load_matrix(matrix(tmp_path, data=data, strategies=strategies, seeds=[0, 1, 2])))
    assert len({cell.name for cell in made}) == len(made) == 2 * 2 * 2 * 3
    (one,) = [cell for cell in made if cell.name == "b--law--random--2"]
    assert (one.config.model.path, one.config.model.dtype) == ("models/b", "float32")
    assert (one.config.pool.path, one.config.pool.num_eval) == ("law.jsonl", 50)
    assert (one.config.selection.kind, one.config.selection.budget) == ("random", 20)
    assert (one.config.seed, one.config.rounds, one.config.name) == (2, 2, one.name)


def test_a_cell_starts_from_the_preset(tmp_path: Path) -> None:
    made = cells(load_matrix(matrix(tmp_path, preset="quickstart")))
    assert {cell.config.sampler.num_samples for cell in made} == {10}
    assert {cell.config.rounds for cell in made} == {2}


def test_the_highest_priority_comes_first_and_equal_ones_as_they_stand(tmp_path: Path) -> None:
    strategies = {"probe": {}, "random": {"selection": {"kind": "random"}}}
    path = matrix(tmp_path, strategies=strategies, priorities={"b": 1.0, "random": 5.0})
    assert [cell.name for cell in cells(load_matrix(path))] == [
        "b--pool--random--0", "a--pool--random--0", "b--pool--probe--0", "a--pool--probe--0",
    ]  # fmt: skip


def test_what_is_written_down_reads_back_as_the_same(tmp_path: Path) -> None:
    config = load_matrix(matrix(tmp_path, seeds=[3]), ["max_running=2"])
    (tmp_path / "again.yaml").write_text(dump_matrix(config))
    again = load_matrix(str(tmp_path / "again.yaml"))
    assert again == config
    assert again.max_running == 2
    assert cells(again) == cells(config)


@pytest.mark.parametrize("name", ["paper_triviaqa", "paper_nq_open", "paper_medmcqa"])
def test_the_papers_setting_is_its_nine_models_with_three_strategies_on_half_of_the_candidates(name: str) -> None:
    made = cells(load_matrix(name))
    assert {cell.model for cell in made} == {cell.model for cell in cells(load_matrix("nine"))}
    assert len(made) == 9 * 3
    assert {cell.config.selection.kind for cell in made} == {"probe", "random", "known"}
    (pool,) = {cell.config.pool for cell in made}
    assert pool.path in KNOWN_DATASETS
    for cell in made:
        config = cell.config
        assert (config.rounds, config.selection.budget, config.tuning.rehearsal) == (1, 5000, 0)
        assert 10_000 <= (pool.limit or 0) - pool.num_seed - pool.num_eval <= 12_000
        sampler = config.sampler
        assert (sampler.num_samples, sampler.temperature, sampler.max_tokens) == (10, 1.0, 256)
        assert (config.prompt.num_shots, config.equivalence.kind, config.equivalence.gpus) == (5, "nli", 0.25)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": {"a": {"model": {"pth": "x"}}}}, r"cell a--pool--probe--0: unknown key 'model.pth'"),
        ({"models": {"a/b": {}}}, "becomes part of a folder's name"),
        ({"models": {"a--b": {}}}, "becomes part of a folder's name"),
        ({"seeds": []}, "seeds"),
        ({"priorities": {"c": 1}}, "priorities names c"),
        ({"sedes": [1]}, "sedes"),
        ({"preset": "quickstrat"}, "did you mean 'quickstart'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cells(load_matrix(matrix(tmp_path, **values)))
