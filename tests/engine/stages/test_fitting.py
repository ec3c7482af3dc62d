"""When a decoder is fitted again: how far tuning has moved the states since its last fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.stages.fitting import measure_drift
from engine.store.events import Events
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.knowledge.probe import ProbeConfig, fit_probe
from ka2l.model.loading import ModelConfig
from ka2l.schemas import LABELS, hidden_states_schema

NUM, WIDTH = 120, 6
IDS = [f"q{index:03d}" for index in range(NUM)]
SPLITS = ["train", "validation", "test"] * (NUM // 3)
LAYERS = [1, 2]


def commit(stage: Stage, metrics: dict[str, Any]) -> None:
    stage.commit(wanted="f", config={}, inputs={}, metrics=metrics, cost={}, seed=0, seconds=0.0)


def write_round(run: RunDirectory, index: int, states: np.ndarray, layer: int | None = None) -> None:
    """Label, extract and probe of a round whose states are (N, L, D); known and unknown differ in dimension 0."""
    unknown = np.arange(NUM) % 2 == 0
    label = run.stage("label", index)
    columns = {
        "question_id": IDS,
        "probe_split": SPLITS,
        "semantic_entropy": unknown * 1.0,
        "unknown": unknown,
        "disagreement": unknown * 0.5,
    }
    write_shard(label.url, shard_name(0), pa.table(columns).cast(LABELS), {})
    commit(label, {})
    extract = run.stage("extract", index)
    schema = hidden_states_schema(LAYERS, WIDTH)
    flat = pa.array(states.astype(np.float32).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, len(LAYERS) * WIDTH)
    table = pa.table({"question_id": IDS, "split": ["seed"] * NUM, "states": values}, schema=schema)
    write_shard(extract.url, shard_name(0), table, {})
    commit(extract, {})
    probe = run.stage("probe", index)
    chosen = LAYERS if layer is None else [layer]
    kept = states[:, [LAYERS.index(number) for number in chosen]]
    fitted = fit_probe(kept, unknown, SPLITS, chosen, ProbeConfig(kind="linear", num_bootstrap=20), 0)
    fitted.save(probe.path)
    commit(probe, fitted.metrics)


def base_states() -> np.ndarray:
    states = np.random.default_rng(0).normal(size=(NUM, len(LAYERS), WIDTH))
    states[::2, :, 0] += 6
    return states


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    run = RunDirectory(tmp_path / "run")
    Path(run.path).mkdir()
    config = RunConfig.model_validate({"decoder": {"kind": "inversion"}})
    made = Campaign(config, run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")
    write_round(run, 0, base_states(), layer=2)
    commit(run.stage("decoder", 0), {"fitted_round": 0})
    return made


def test_the_first_round_always_fits(campaign: Campaign) -> None:
    drift = measure_drift(campaign, 0)
    assert drift.needs_fit
    assert drift.fitted_round is None


def test_states_that_stayed_where_they_were_need_no_new_decoder(campaign: Campaign) -> None:
    write_round(campaign.run, 1, base_states(), layer=2)
    drift = measure_drift(campaign, 1)
    assert (drift.fitted_round, drift.needs_fit, drift.same_layer) == (0, False, True)
    assert drift.mean_cosine == pytest.approx(1.0)
    assert drift.auroc_drop == pytest.approx(0.0)


def test_states_that_turned_away_need_a_new_decoder(campaign: Campaign) -> None:
    write_round(campaign.run, 1, base_states() * np.array([-1.0, 1, 1, 1, 1, 1]), layer=2)
    drift = measure_drift(campaign, 1)
    assert drift.needs_fit
    assert drift.mean_cosine is not None
    assert drift.mean_cosine < 0.9
    assert drift.auroc_drop is not None
    assert drift.auroc_drop > campaign.config.decoder.max_auroc_drop


def test_a_probe_on_another_layer_needs_a_new_decoder(campaign: Campaign) -> None:
    write_round(campaign.run, 1, base_states(), layer=1)
    drift = measure_drift(campaign, 1)
    assert drift.needs_fit
    assert not drift.same_layer


def test_drift_is_measured_from_the_last_fit_and_not_from_the_last_round(campaign: Campaign) -> None:
    write_round(campaign.run, 1, base_states(), layer=2)
    commit(campaign.run.stage("decoder", 1), {"fitted_round": 0})
    write_round(campaign.run, 2, base_states() * np.array([1.0, -1, 1, -1, 1, -1]), layer=2)
    drift = measure_drift(campaign, 2)
    assert drift.fitted_round == 0
    assert drift.needs_fit
