"""Query strategies that need more than the probe's score, in whole campaigns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.stages.tables import states_of
from engine.store.run_directory import RunDirectory
from ka2l.knowledge.perplexity import PerplexityScorer, question_tokens
from ka2l.model.adapter import load_tokenizer
from ka2l.prompts import PromptConfig, Prompter
from ka2l.schemas import PERPLEXITY
from ka2l.seeds import row_seed
from ka2l.selection.candidates import Candidates
from ka2l.selection.strategies import SelectionConfig, select

pytestmark = [pytest.mark.slow, pytest.mark.whole]

#: What the first round makes from the selection on, and all that follows.
_LATER = ("select", "annotate", "tune", "round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet")


def go_on(finished: Any, ka2l: Any, options: list[str], run_dir: Path, **values: Any) -> RunDirectory:
    """The finished campaign from its first selection on, with another strategy."""
    shutil.copytree(finished.run_dir, run_dir, ignore=shutil.ignore_patterns(*_LATER, "*.html"))
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    ended = ka2l("resume", run_dir, *options, *words)
    assert ended.returncode == 0, ended.stderr
    return RunDirectory(run_dir)


def chosen(run: RunDirectory, round_index: int) -> list[str]:
    ids: list[str] = run.stage("select", round_index).table().sort_by("rank")["question_id"].to_pylist()
    return ids


def candidates_of(run: RunDirectory) -> dict[str, str]:
    rows = run.stage("questions").table().to_pylist()
    return {row["question_id"]: row["question"] for row in rows if row["split"] == "candidate"}


def test_perplexity_asks_the_questions_whose_wording_the_model_finds_hardest(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run = go_on(finished, ka2l, on_cluster, tmp_path / "run", **{"selection.kind": "perplexity", "rounds": 1})
    stage = run.stage("perplexity", 0)
    table = stage.table()
    assert table.schema.equals(PERPLEXITY)
    measured = dict(zip(table["question_id"].to_pylist(), table["perplexity"].to_pylist(), strict=True))
    questions = candidates_of(run)
    assert measured.keys() == questions.keys()
    path = str(finished.files.model)
    prompter = Prompter(load_tokenizer(path), PromptConfig(**finished.files.values["prompt"]))
    texts = [question_tokens(prompter, question) for question in questions.values()]
    by_hand = np.log(PerplexityScorer(path, "float32").perplexities(texts))
    np.testing.assert_allclose([measured[name] for name in questions], by_hand, rtol=1e-4)
    hardest = sorted(measured.values(), reverse=True)[:12]
    assert [measured[name] for name in chosen(run, 0)] == hardest
    manifest = stage.require()
    assert manifest.cost["forward_passes"] == 60
    assert manifest.metrics["mean_perplexity"] == pytest.approx(by_hand.mean(), rel=1e-4)
    (first, _) = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]
    assert first["num_annotated"] == 0


def test_core_set_keeps_away_from_what_earlier_rounds_have_asked(
    finished: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    run = go_on(finished, ka2l, on_cluster, tmp_path / "run", **{"selection.kind": "core_set"})
    asked: list[str] = []
    for index in range(2):
        layer = run.stage("probe", index).require().metrics["layer"]
        left = [name for name in candidates_of(run) if name not in asked]
        ids, states, _ = states_of(run.stage("extract", index), left, layer)
        others = states_of(run.stage("extract", index), asked, layer).states[:, 0] if asked else None
        scores = np.zeros(len(ids))
        candidates = Candidates(ids, scores, scores, states=states[:, 0], asked_states=others)
        config = SelectionConfig(kind="core_set", budget=12)
        selected = select(candidates, config, row_seed(0, index, "select", "")).indices
        assert chosen(run, index) == [ids[row] for row in selected]
        if asked:
            alone = select(candidates._replace(asked_states=None), config, row_seed(0, index, "select", "")).indices
            assert alone.tolist() != selected.tolist()
        assert run.stage("select", index).require().metrics["num_compared"] == len(left)
        asked += chosen(run, index)
    assert len(set(asked)) == 24


def test_entropy_samples_every_candidate_and_labels_the_seed_questions_alone(
    campaign_files: Any, ka2l: Any, on_cluster: list[str], tmp_path: Path
) -> None:
    words = ("--set", "selection.kind=entropy", "--set", "rounds=1", "--set", "tuning.rehearsal=0")
    ended = ka2l("run", campaign_files.config, "--run-dir", tmp_path / "run", *words, *on_cluster)
    assert ended.returncode == 0, ended.stderr
    run = RunDirectory(tmp_path / "run")
    questions = candidates_of(run)
    rows = [row for row in run.stage("cluster", 0).table().to_pylist() if row["purpose"] == "probe"]
    entropy_of = {row["question_id"]: row["predictive_entropy"] for row in rows if row["question_id"] in questions}
    assert entropy_of.keys() == questions.keys()
    assert [entropy_of[name] for name in chosen(run, 0)] == sorted(entropy_of.values(), reverse=True)[:12]
    seed = {row["question_id"] for row in run.stage("questions").table().to_pylist() if row["split"] == "seed"}
    assert set(run.stage("label", 0).table()["question_id"].to_pylist()) == seed
    # After the last round nothing is chosen, so candidates are not sampled again.
    last = run.stage("observe", 1).table()
    assert not questions.keys() & set(last["question_id"].to_pylist())
