"""A stage is declared once: its name in the round is enough for ledger, status, hours, report and --redo-from."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from toy_stage import count_words

from engine import loop, stages
from engine.cli import main
from engine.config import RunConfig, dump_config
from engine.execution.campaign import Campaign
from engine.execution.hours import needed_seconds
from engine.launch import remove_from
from engine.report.reader import Reader
from engine.report.spending import spending
from engine.report.stages import collect_stages
from engine.store.events import Events
from engine.store.ledger import committed_stages, ledger_table, worked_seconds
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from ka2l.errors import ConfigError
from ka2l.model.loading import ModelConfig


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A run whose pool is read."""
    run = RunDirectory(tmp_path / "run")
    config = RunConfig(rounds=2)
    run.write_text("config.yaml", dump_config(config))
    questions = run.stage("questions")
    questions.begin("f", {}, {})
    table = pa.table({"question_id": ["a", "b"], "question": ["Who wrote Hamlet?", "Why?"]})
    write_shard(questions.url, shard_name(0), table, {})
    questions.commit(wanted="f", config={}, inputs={}, metrics={"candidate": 2}, cost={}, seed=0, seconds=1.0)
    made = Campaign(config, run, Events(run, Console(quiet=True)), ModelConfig(), "pool.jsonl")
    made._model_id = "model"
    return made


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in which one is asked to count words and nothing else is done."""
    monkeypatch.setattr(stages, "KNOW", ())
    monkeypatch.setattr(stages, "ASK", (count_words,))
    monkeypatch.setattr(stages, "LEARN", ())
    for name in ("used_up", "enough", "nothing_learnt"):
        monkeypatch.setattr(loop, name, lambda *_: None)


@pytest.mark.usefixtures("only_ours")
def test_a_stage_of_ones_own_is_made_and_told_of_everywhere(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = campaign.run
    assert loop.run_round(campaign, 0) is None
    assert run.stage("count_words", 0).table()["words"].to_pylist() == [3, 1]
    assert [stage.label for stage in committed_stages(run)] == ["pool/questions", "round-000/count_words"]

    booked = {row["item"]: row["quantity"] for row in ledger_table(run).to_pylist() if row["stage"] == "count_words"}
    assert booked["tokens_prompt"] == 4.0
    assert booked.keys() >= {"seconds", "cpu_seconds"}
    seconds = run.stage("count_words", 0).require().seconds
    assert worked_seconds(run) == pytest.approx(1.0 + seconds)
    assert needed_seconds(campaign, count_words, 1) == pytest.approx(seconds)
    assert stages.room_of("count_words", campaign.config) == (2.0, 0.0)

    data = collect_stages(Reader(run))
    assert list(data.rounds[0].stages) == ["count_words"]
    assert spending(data).work["probing"].seconds == pytest.approx(seconds)

    monkeypatch.setattr(sys, "argv", ["ka2l", "status", run.url])
    main.main()
    assert "num_words 4" in " ".join(capsys.readouterr().out.split())

    remove_from(run, "count_words", 0)
    assert [stage.name for stage in committed_stages(run)] == ["questions"]


def test_without_its_name_in_the_round_nobody_knows_it(campaign: Campaign) -> None:
    count_words(campaign, 0)
    assert [stage.name for stage in committed_stages(campaign.run)] == ["questions"]
    with pytest.raises(ConfigError, match="no stage is called 'count_words'"):
        remove_from(campaign.run, "count_words", 0)


def test_every_stage_is_in_the_order_that_runs_before_declarations_had() -> None:
    assert stages.pool_folders() == ["questions", "references", "corpus"]
    assert stages.round_folders() == [
        "observe", "cluster", "label", "extract", "probe", "feedback", "knowledge", "evaluate", "perplexity", "select",
        "corpus_states", "decoder", "decode", "annotate", "facts", "difficulty", "augment", "tune", "compare",
    ]  # fmt: skip


def test_costs_are_booked_by_purpose() -> None:
    found = stages.folders_by_purpose()
    assert list(found) == ["sampling", "probing", "decoding", "tuning", "measuring", "rest"]
    assert found["sampling"] == ["observe", "cluster"]
    assert set(found["probing"]) == {"label", "extract", "probe", "feedback", "knowledge", "perplexity", "select"}
    assert set(found["decoding"]) == {"corpus", "corpus_states", "decoder", "decode"}
    assert set(found["tuning"]) == {"facts", "difficulty", "augment", "tune", "compare"}
    assert found["measuring"] == ["evaluate"]
    assert set(found["rest"]) == {"questions", "references", "annotate"}
