"""Pools of any size: what is selected does not depend on how the pool is cut, and the driver never holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from actors import decoder
from actors.workers.placement import Placement
from engine import stages
from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.forecast import warm_up
from engine.report.collect import collect
from engine.stages import tables, tuning
from engine.stages.choosing import annotation_context
from engine.stages.tables import annotated_ids, asked_ids, states_of
from engine.store import shards
from engine.store.events import Events
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.schemas import CLUSTERS, PERPLEXITY, QUESTIONS, REFERENCES, SAMPLES, hidden_states_schema
from ka2l.selection import diversity
from ka2l.selection.strategies import SelectionConfig

NUM, LAYERS, WIDTH = 600, [1, 2], 5
IDS = [f"q{index:03d}" for index in range(NUM)]
SPLIT = ["seed" if index % 5 == 0 else "eval" if index % 5 == 1 else "candidate" for index in range(NUM)]
RNG = np.random.default_rng(0)
DOUBT = RNG.random(NUM)
STATES = RNG.normal(size=(NUM, len(LAYERS), WIDTH))
STATES[:, 1, 0] += 6 * DOUBT


def commit(stage: Stage, table: pa.Table, shard_rows: int, metrics: dict[str, Any] | None = None) -> None:
    """Shard k of every table holds the same questions."""
    for index, start in enumerate(range(0, NUM, shard_rows)):
        inside = pc.is_in(table["question_id"], pa.array(IDS[start : start + shard_rows]))
        write_shard(stage.url, shard_name(index), table.filter(inside), {})
    stage.commit(wanted=stage.label, config={}, inputs={}, metrics=metrics or {}, cost={}, seed=0, seconds=0.0)


def questions() -> pa.Table:
    columns = {
        "question_id": IDS,
        "question": [f"What is {name}?" for name in IDS],
        "split": SPLIT,
        "group": pa.nulls(NUM, pa.string()),
        "fact": pa.nulls(NUM, pa.string()),
        "metadata": [f'{{"kind": "kind {index % 3}", "place": {index}}}' for index in range(NUM)],
    }
    return pa.table(columns).cast(QUESTIONS)


def clusters() -> pa.Table:
    table = pa.table({"question_id": IDS, "purpose": SPLIT})
    is_eval = pc.equal(table["purpose"], "eval")
    none = pa.nulls(NUM, pa.bool_())
    columns = {
        "question_id": IDS,
        "purpose": pc.if_else(is_eval, "eval", "probe"),
        "semantic_ids": [[0]] * NUM,
        "num_clusters": [1] * NUM,
        "semantic_entropy": DOUBT,
        "weighted_semantic_entropy": DOUBT,
        "predictive_entropy": DOUBT,
        "disagreement": DOUBT / DOUBT.max(),
        "top_answer": ["an answer"] * NUM,
        "correct": pc.if_else(is_eval, pa.array(DOUBT < 0.5), none),
        "exact_match": none,
        "token_f1": pa.nulls(NUM, pa.float32()),
    }
    kept = pc.or_(is_eval, pc.equal(table["purpose"], "seed"))
    return pa.table(columns).cast(CLUSTERS).filter(kept)


def own_answers() -> pa.Table:
    """Of every candidate two answers, which agree about most of two of three."""
    names = [name for name, split in zip(IDS, SPLIT, strict=True) if split == "candidate"]
    drawn = clusters().slice(0, 1).to_pylist()[0] | {"purpose": "rehearsal", "correct": None}
    rows = [drawn | {"question_id": name, "disagreement": 0.6 if int(name[1:]) % 3 == 0 else 0.1} for name in names]
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def samples() -> pa.Table:
    """Two answers of the model itself to every question but those that measure."""
    asked = [(name, number) for name, split in zip(IDS, SPLIT, strict=True) if split != "eval" for number in range(2)]
    num = len(asked)
    columns = {
        "question_id": [name for name, _ in asked],
        "purpose": ["probe" if SPLIT[int(name[1:])] == "seed" else "rehearsal" for name, _ in asked],
        "sample_index": [number for _, number in asked],
        "answer": [f"answer {number} to {name}" for name, number in asked],
        "logprob": [0.0] * num,
        "num_tokens": [1] * num,
        "num_prompt_tokens": [1] * num,
        "finish_reason": ["stop"] * num,
    }
    return pa.table(columns).cast(SAMPLES)


def states() -> pa.Table:
    flat = pa.array(STATES.astype(np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, len(LAYERS) * WIDTH)
    columns = {"question_id": IDS, "split": SPLIT, "states": column}
    return pa.table(columns, schema=hidden_states_schema(LAYERS, WIDTH))


#: Makes a campaign that has sampled and extracted, with so many questions a shard.
Begin = Callable[[int], Campaign]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    def made(shard_rows: int) -> Campaign:
        run = RunDirectory(tmp_path / f"{shard_rows}")
        Path(run.path).mkdir()
        config = RunConfig.model_validate(
            {
                "rounds": 60,  # which leave annotations over for exploring
                "shard_rows": shard_rows,
                "model": {"path": "nobody/nothing"},
                "probe": {"kind": "linear", "num_epochs": 10, "num_bootstrap": 20},
                "selection": {"kind": "probe", "budget": 12},
            }
        )
        campaign = Campaign(config, run, Events(run, Console(quiet=True)), config.model, "pool.jsonl")
        counts = {split: SPLIT.count(split) for split in set(SPLIT)}
        commit(campaign.stage("questions"), questions(), shard_rows, counts)
        answers = pa.table({"question_id": IDS, "answers": [["yes"]] * NUM}).cast(REFERENCES)
        commit(campaign.stage("references"), answers, shard_rows)
        commit(campaign.stage("observe", 0), samples(), shard_rows)
        commit(campaign.stage("cluster", 0), clusters(), shard_rows)
        commit(campaign.stage("extract", 0), states(), shard_rows)
        commit(campaign.stage("feedback", 0), own_answers(), shard_rows)
        return campaign

    return made


def select(campaign: Campaign) -> list[dict[str, Any]]:
    for stage in (stages.label, stages.probe, stages.knowledge, stages.select):
        stage(campaign, 0)
    rows: list[dict[str, Any]] = campaign.stage("select", 0).table(["question_id", "rank"]).to_pylist()
    return rows


#: Strategies that need no other stage than these.
KINDS = tuple(kind for kind in SelectionConfig.KINDS if kind not in (*SelectionConfig.SAMPLED, "perplexity"))


def test_the_same_is_selected_however_the_pool_is_cut(begin: Begin) -> None:
    chosen: dict[str, list[Any]] = {}
    for shard_rows in (NUM, 100, 7):
        campaign = begin(shard_rows)
        for kind in KINDS:
            selection = campaign.config.selection.model_copy(update={"kind": kind})
            campaign.config = campaign.config.model_copy(update={"selection": selection})
            campaign.stage("select", 0).remove()
            chosen.setdefault(kind, []).append(select(campaign))
    for cuts in chosen.values():
        assert len(cuts[0]) == 12
        assert cuts[0] == cuts[1] == cuts[2]
    assert len({str(cuts[0]) for cuts in chosen.values()}) == len(chosen)


@pytest.mark.parametrize("kind", [*SelectionConfig.SAMPLED, "perplexity"])
def test_a_strategy_that_ranks_by_what_a_stage_measures_joins_it_by_question(kind: str, begin: Begin) -> None:
    campaign = begin(100)
    values = np.random.default_rng(1).permutation(NUM).astype(np.float32)
    of = dict(zip(IDS, values.tolist(), strict=True))
    best = sorted((name for name, split in zip(IDS, SPLIT, strict=True) if split == "candidate"), key=lambda n: -of[n])
    values[IDS.index(best[0])] = np.nan  # what could not be measured is not ranked
    if kind == "perplexity":
        table = pa.table({"question_id": IDS, "perplexity": values}, schema=PERPLEXITY)
        commit(campaign.stage("perplexity", 0), table.take(pa.array(range(NUM - 1, -1, -1))), 100)
    else:
        column = {"semantic_entropy": "semantic_entropy", "entropy": "predictive_entropy"}[kind]
        table = clusters()
        drawn = table.slice(0, 1).to_pylist()[0] | {"purpose": "probe", "correct": None}
        rows = [drawn | {"question_id": name, column: float(values[IDS.index(name)])} for name in best]
        joined = pa.concat_tables([table, pa.Table.from_pylist(rows, schema=CLUSTERS)])
        campaign.stage("cluster", 0).remove()
        commit(campaign.stage("cluster", 0), joined, 100)
    selection = campaign.config.selection.model_copy(update={"kind": kind})
    campaign.config = campaign.config.model_copy(update={"selection": selection})
    assert [row["question_id"] for row in select(campaign)] == best[1:13]


@pytest.mark.parametrize("kind", SelectionConfig.COMPARED)
def test_of_a_large_pool_the_states_of_a_uniform_draw_alone_are_read(
    kind: str, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "MAX_COMPARED", 50)
    read: list[int] = []
    monkeypatch.setattr(
        "engine.stages.choosing.states_of",
        lambda stage, ids, layer: read.append(len(ids)) or states_of(stage, ids, layer),
    )
    campaign = begin(100)
    selection = campaign.config.selection.model_copy(update={"kind": kind})
    campaign.config = campaign.config.model_copy(update={"selection": selection})
    assert len({row["question_id"] for row in select(campaign)}) == 12
    assert read == [50]
    metrics = campaign.stage("select", 0).require().metrics
    assert (metrics["num_compared"], metrics["num_candidates"]) == (50, SPLIT.count("candidate"))


def test_no_stage_reads_a_table_of_the_pools_size_at_once(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = begin(20)
    monkeypatch.setattr(tuning, "_MOST_REHEARSED", 30)
    most = 0
    table = Stage.table

    def watched(stage: Stage, *others: Any, **options: Any) -> pa.Table:
        nonlocal most
        found = table(stage, *others, **options)
        most = max(most, found.num_rows)
        return found

    monkeypatch.setattr(Stage, "table", watched)
    select(campaign)
    stages.annotate(campaign, 0)
    tuning._training_rows(campaign, [campaign.stage("annotate", 0)], [], campaign.stage("observe", 0), Echo())
    warm_up._drawn(campaign, 10)
    # The seed and the eval questions are a fifth of the pool each, and the largest that any stage asks for.
    assert SPLIT.count("seed") <= most < NUM / 4


class Echo:
    """Stands in for a prompter."""

    is_chat = False

    def text(self, question: str) -> str:
        return question


def test_a_shard_without_wanted_questions_keeps_its_states_unread(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted = begin(50).stage("extract", 0)
    read: list[Any] = []
    monkeypatch.setattr(
        "engine.stages.tables.read_shard",
        lambda url, name, columns=None: read.append((name, columns)) or shards.read_shard(url, name, columns),
    )
    wanted = [IDS[120], IDS[110]]
    ids, found, _ = states_of(extracted, wanted, LAYERS[1])
    assert ids == sorted(wanted)
    np.testing.assert_allclose(found[:, 0], STATES[[110, 120], 1], rtol=1e-6)
    assert [name for name, columns in read if columns is None] == ["part-00002.parquet"]
    assert states_of(extracted, []).states.shape == (0, len(LAYERS), WIDTH)


def test_references_of_all_batches_are_looked_up_in_one_pass(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = begin(50)
    passes: list[str] = []
    table = Stage.table
    monkeypatch.setattr(Stage, "table", lambda stage, *others: passes.append(stage.name) or table(stage, *others))
    reveal = annotation_context(campaign, 0, dict.fromkeys(IDS[:40], "?"), Placement(0)).reveal
    for start in range(0, 40, 4):
        assert reveal(IDS[start : start + 4]) == {name: ["yes"] for name in IDS[start : start + 4]}
    assert passes == ["references"]
    assert reveal([IDS[50]]) == {}


def test_the_same_questions_are_rehearsed_however_the_pool_is_cut(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_MOST_REHEARSED", 25)
    drawn = []
    for shard_rows in (7, 100, NUM):
        campaign = begin(shard_rows)
        ids = tuning._drawn_to_rehearse(campaign, campaign.stage("observe", 0), 0)
        assert ids is not None
        drawn.append(sorted(ids.to_pylist()))
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 25


def test_of_few_questions_all_are_rehearsed_and_never_fewer_than_training_turns_to(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = begin(100)
    own = campaign.stage("observe", 0)
    assert tuning._drawn_to_rehearse(campaign, own, 10) is None
    monkeypatch.setattr(tuning, "_MOST_REHEARSED", 25)
    few = tuning._drawn_to_rehearse(campaign, own, 10)
    assert few is not None
    assert len(few) == 10 * campaign.config.tuning.num_epochs


def test_the_canary_asks_the_questions_with_the_lowest_ids(begin: Begin) -> None:
    assert tables.first_questions(begin(7).stage("questions"), 3) == [f"What is {name}?" for name in IDS[:3]]


def test_the_warm_up_draws_the_same_questions_however_the_pool_is_cut(begin: Begin) -> None:
    drawn = [warm_up._drawn(begin(shard_rows), 10) for shard_rows in (7, 100, NUM)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert {split: {row["split"] for row in rows} for split, rows in drawn[0].items()} == {
        split: {split} for split in ("seed", "candidate", "eval")
    }


def test_the_report_shows_the_same_however_the_pool_is_cut(begin: Begin) -> None:
    shown = []
    for shard_rows in (7, 100, NUM):
        campaign = begin(shard_rows)
        select(campaign)
        data = collect(campaign.run)
        assert not data.problems
        first = data.rounds[0]
        assert first.points is not None
        groups = [(share.column, share.value, share.num_questions, share.num_unknown) for share in first.groups]
        shown.append((groups, first.points.questions, data.num_seed, data.num_candidates, data.num_eval))
    assert shown[0] == shown[1] == shown[2]
    assert {column for column, *_ in shown[0][0]} == {"kind", "place"}


def test_a_decoder_is_fitted_on_the_same_questions_however_the_pool_is_cut(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MOST_PAIRS", 40)
    read = []
    for shard_rows in (7, 100):
        run = begin(shard_rows).run
        asked, extracted = run.stage("questions"), run.stage("extract", 0)
        source = decoder.PairSource(asked.url, extracted.url, asked.shard_names(), "candidate")
        read.append(decoder.read_pairs([source], LAYERS[0], seed=3))
    assert read[0][1] == read[1][1]
    assert len(read[0][1]) == len(read[0][0]) == 40
    np.testing.assert_array_equal(read[0][0], read[1][0])
    monkeypatch.setattr(decoder, "MOST_PAIRS", NUM)
    assert len(decoder.read_pairs([source], LAYERS[0])[1]) == SPLIT.count("candidate")


def test_asked_and_annotated_questions_are_found_again(begin: Begin) -> None:
    campaign = begin(20)
    chosen = [row["question_id"] for row in sorted(select(campaign), key=lambda row: row["rank"])]
    stages.annotate(campaign, 0)
    assert asked_ids(campaign, 0) == chosen
    assert sorted(annotated_ids(campaign, 1)) == sorted(chosen)
