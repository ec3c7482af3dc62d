"""The report of a benchmark, from summaries and knowledge maps made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import engine.benchmark.agreement
from engine.benchmark.agreement import cohen_kappa, count_unknown
from engine.benchmark.collect import collect_benchmark
from engine.benchmark.data import BenchmarkData, Combination
from engine.benchmark.matrix import MatrixConfig, cells
from engine.benchmark.report import render_benchmark, write_benchmark_report
from engine.benchmark.runner import CellState, cell_url
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from ka2l.schemas import KNOWLEDGE

ATTACK = "<script>alert(1)</script>"


def matrix(**values: Any) -> MatrixConfig:
    axes = {"models": {"a": {}, "b": {}, "c": {}}, "data": {"facts": {}, "law": {}}}
    return MatrixConfig.model_validate({"name": "by-hand"} | axes | values)


def summarise(root: RunDirectory, cell: str, curve: Sequence[tuple[int, float]], **more: Any) -> None:
    """A cell's summary: one round for each (annotations, accuracy)."""
    rounds = [
        {"round": index, "num_annotated": number, "accuracy": accuracy, "accuracy_ci": [accuracy - 0.1, accuracy + 0.1],
         "unknown_fraction": 0.25, "cost": {"annotation": 10, "money": 0.5, "tokens_generated": 100, "seconds": 3.0,
                                            "cpu_seconds": 6.0, "gpu_seconds": 2.0}}
        for index, (number, accuracy) in enumerate(curve)
    ]  # fmt: skip
    summary = {"status": "complete", "rounds": rounds, "num_candidates": 40, "total_seconds": 7.5} | more
    RunDirectory(cell_url(root, cell)).write_json("summary.json", summary)


def note_state(root: RunDirectory, cell: str, **state: Any) -> None:
    root.write_json(f"states/{cell}.json", CellState(**state)._asdict())


def map_knowledge(root: RunDirectory, cell: str, shards: Sequence[dict[str, float]]) -> Path:
    """The knowledge map of a cell's base model: P(unknown) by question id, for each shard."""
    stage = RunDirectory(cell_url(root, cell)).stage("knowledge", 0)
    for index, questions in enumerate(shards):
        rows = [
            {"question_id": name, "split": "candidate", "p_unknown": p, "logit": 0.0, "score": p, "pca_0": 0.0,
             "pca_1": 0.0}
            for name, p in questions.items()
        ]  # fmt: skip
        write_shard(stage.url, shard_name(index), pa.Table.from_pylist(rows, KNOWLEDGE), {})
    stage.commit(wanted=f"map of {cell}", config={}, inputs={}, metrics={}, cost={}, seed=0, seconds=1.0)
    return Path(stage.path)


def collected(root: RunDirectory, config: MatrixConfig) -> BenchmarkData:
    return collect_benchmark(root, config, cells(config))


def combination(data: BenchmarkData, model: str, source: str = "facts", strategy: str = "probe") -> Combination:
    (found,) = [
        each for each in data.combinations if (each.model, each.data, each.strategy) == (model, source, strategy)
    ]
    return found


@pytest.fixture
def root(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


# -- who knows what ----------------------------------------------------------------------------------------------------


def test_kappa_is_what_it_is_by_hand() -> None:
    # Ten questions: both do not know 4, both know 3, only the first does not know 2, only the second 1.
    # They agree on 0.7; by chance on 0.6 * 0.5 + 0.4 * 0.5 = 0.5; kappa = (0.7 - 0.5) / (1 - 0.5) = 0.4.
    assert cohen_kappa(0.4, 0.3, 0.6, 0.5) == pytest.approx(0.4)
    assert cohen_kappa(0.5, 0.5, 0.5, 0.5) == pytest.approx(1.0)
    assert cohen_kappa(0.0, 0.0, 0.5, 0.5) == pytest.approx(-1.0)
    assert cohen_kappa(0.0, 1.0, 0.0, 0.0) is None


def test_shards_are_aligned_by_question_and_add_up(root: RunDirectory) -> None:
    # As above, in two shards; the second model's rows stand in another order.
    first = [
        {"q0": 0.9, "q1": 0.8, "q2": 0.7, "q3": 0.1, "q4": 0.2},
        {"q5": 0.6, "q6": 0.5, "q7": 0.9, "q8": 0.0, "q9": 0.4},
    ]
    second = [
        {"q4": 0.1, "q3": 0.3, "q2": 0.4, "q1": 0.5, "q0": 1.0},
        {"q9": 0.8, "q8": 0.1, "q7": 0.2, "q6": 0.9, "q5": 0.7},
    ]
    map_knowledge(root, "a--facts--probe--0", first)
    map_knowledge(root, "b--facts--probe--0", second)
    (found,) = collected(root, matrix()).agreement
    (pair,) = found.pairs
    assert pair.kappa == pytest.approx(0.4)
    assert (pair.first, pair.second, pair.both_known, pair.both_unknown, pair.differ) == ("a", "b", 0.3, 0.4, 0.3)
    assert (found.num_questions, found.num_left_out) == (10, 0)
    assert found.unknown == {"a": 0.6, "b": 0.5}
    assert found.known_by == [4, 3, 3]


def test_how_many_models_know_a_question() -> None:
    # Three models, columns are questions: known by all, by one, by none, by two.
    unknown = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]], bool)
    counts = count_unknown(unknown)
    assert counts.known_by.tolist() == [1, 1, 1, 1]
    assert counts.both_unknown.tolist() == [[1, 1, 1], [1, 2, 2], [1, 2, 3]]


def test_questions_that_a_model_has_not_judged_are_left_out_and_counted(root: RunDirectory) -> None:
    map_knowledge(root, "a--facts--probe--0", [{"q0": 0.9, "q1": 0.9, "q2": 0.1}, {"q3": 0.9}])
    map_knowledge(root, "b--facts--probe--0", [{"q0": 0.9, "q2": 0.9, "other": 0.9}])
    (found,) = collected(root, matrix()).agreement
    assert (found.num_questions, found.num_left_out) == (2, 3)
    assert (found.pairs[0].both_unknown, found.pairs[0].differ) == (0.5, 0.5)


def test_the_maps_of_one_seed_are_compared_where_most_models_have_one(root: RunDirectory) -> None:
    config = matrix(seeds=[0, 1])
    for cell in ("a--facts--probe--0", "a--facts--probe--1", "b--facts--probe--1", "a--law--probe--0"):
        map_knowledge(root, cell, [{"q0": 0.9}])
    (found,) = collected(root, config).agreement
    assert (found.data, found.strategy, found.seed, list(found.maps)) == ("facts", "probe", 1, ["a", "b"])


def test_what_was_compared_before_is_not_read_again(root: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    config = matrix()
    for model in ("a", "b"):
        map_knowledge(root, f"{model}--facts--probe--0", [{"q0": 0.9, "q1": 0.1}])
    before = write_benchmark_report(root, config, cells(config)).agreement
    monkeypatch.delattr(engine.benchmark.agreement, "read_shard")
    assert write_benchmark_report(root, config, cells(config)).agreement == before
    map_knowledge(root, "c--facts--probe--0", [{"q0": 0.9, "q1": 0.1}])
    with pytest.raises(NameError):
        write_benchmark_report(root, config, cells(config))


# -- cells -------------------------------------------------------------------------------------------------------------


def test_a_cell_shows_what_its_run_came_to_and_cost(root: RunDirectory) -> None:
    summarise(root, "a--facts--probe--0", [(0, 0.4), (20, 0.6), (40, 0.7)])
    note_state(root, "a--facts--probe--0", status="complete", attempts=2, seconds=30.0)
    data = collected(root, matrix())
    cell = data.cells[0]
    assert (cell.name, cell.status, cell.attempts, cell.wall_seconds) == ("a--facts--probe--0", "complete", 2, 30.0)
    assert [(point.num_annotated, point.accuracy) for point in cell.curve] == [(0, 0.4), (20, 0.6), (40, 0.7)]
    assert cell.cost.model_dump() == {
        "annotations": 30, "money": 1.5, "tokens_generated": 300,
        "seconds": 7.5, "cpu_seconds": 18.0, "gpu_seconds": 6.0,
    }  # fmt: skip
    assert (cell.num_candidates, cell.unknown_fraction) == (40, 0.25)
    own = combination(data, "a")
    assert (own.final_accuracy, own.final_range) == (0.7, None)
    assert own.final_ci == pytest.approx((0.6, 0.8))


def test_seeds_are_averaged_with_their_range(root: RunDirectory) -> None:
    for seed, final in ((0, 0.5), (1, 0.9)):
        summarise(root, f"a--facts--probe--{seed}", [(0, 0.4), (20 + 2 * seed, final)])
        note_state(root, f"a--facts--probe--{seed}", status="complete")
    summarise(root, "a--facts--probe--2", [(0, 0.1)])
    note_state(root, "a--facts--probe--2", status="running")
    own = combination(collected(root, matrix(seeds=[0, 1, 2])), "a")
    assert (own.num_cells, own.num_complete) == (3, 2)
    assert own.final_accuracy == pytest.approx(0.7)
    assert (own.final_range, own.final_ci) == ((0.5, 0.9), None)
    last = own.curve[-1]
    assert (last.num_annotated, last.low, last.high, last.num_seeds) == (21, 0.5, 0.9, 2)
    assert [point.accuracy for point in own.curve] == pytest.approx([0.4, 0.7])


def test_a_cell_that_is_not_complete_shows_its_error_and_no_final_accuracy(root: RunDirectory) -> None:
    summarise(root, "a--facts--probe--0", [(0, 0.4)], status="failed")
    note_state(root, "a--facts--probe--0", status="failed", attempts=2, error="exit code 1: out of memory")
    data = collected(root, matrix())
    assert {cell.status for cell in data.cells} == {"failed", "waiting"}
    assert data.cells[0].error == "exit code 1: out of memory"
    assert combination(data, "a").final_accuracy is None
    page = render_benchmark(data)
    assert "out of memory" in page
    assert "so far 40.0" in page


@pytest.mark.parametrize("damage", ["not json", "[]", "{}", '{"rounds": [1]}', '{"rounds": [{"accuracy": 0.5}]}'])
def test_one_damaged_cell_is_named_and_the_others_are_shown(root: RunDirectory, damage: str) -> None:
    config = matrix()
    for model in ("a", "b", "c"):
        summarise(root, f"{model}--facts--probe--0", [(0, 0.4), (20, 0.6)])
        note_state(root, f"{model}--facts--probe--0", status="complete")
        broken = map_knowledge(root, f"{model}--facts--probe--0", [{"q0": 0.9}])
    RunDirectory(cell_url(root, "b--facts--probe--0")).write_text("summary.json", damage)
    root.write_text("states/c--facts--probe--0.json", damage)
    (broken / shard_name(0)).write_bytes(b"cut")
    data = write_benchmark_report(root, config, cells(config))
    assert combination(data, "a").final_accuracy == 0.6
    assert combination(data, "b").curve == []
    assert any("b--facts--probe--0/summary.json" in problem for problem in data.problems)
    (found,) = data.agreement
    assert list(found.maps) == ["a", "b"]


# -- the page ----------------------------------------------------------------------------------------------------------


def views(page: str, chart: str) -> dict[str, Any]:
    content = re.search(rf'id="chart-{chart}".*?<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert content is not None
    found: dict[str, Any] = json.loads(content[1])["views"]
    return found


def test_there_is_a_chart_for_each_data_set_with_a_line_for_each_model(root: RunDirectory) -> None:
    for source in ("facts", "law"):
        for model in ("a", "b", "c"):
            summarise(root, f"{model}--{source}--probe--0", [(0, 0.4), (20, 0.6)])
            note_state(root, f"{model}--{source}--probe--0", status="complete")
    page = render_benchmark(collected(root, matrix()))
    for chart in ("curve-0", "curve-1"):
        lines = views(page, chart)[""]["data"]
        assert [line["name"] for line in lines] == ["a", "b", "c"]
        assert [line["y"] for line in lines] == [[0.4, 0.6]] * 3
    assert 'id="chart-curve-2"' not in page


def test_the_heat_map_has_a_cell_for_each_pair_and_measure(root: RunDirectory) -> None:
    for model, p in (("a", 0.9), ("b", 0.9), ("c", 0.1)):
        map_knowledge(root, f"{model}--facts--probe--0", [{"q0": p, "q1": 0.1, "q2": 0.9}])
    page = render_benchmark(collected(root, matrix()))
    shown = {key: figure["data"][0]["z"] for key, figure in views(page, "agreement").items()}
    assert shown["0|0"] == [
        [None, 1.0, pytest.approx(0.4)],
        [1.0, None, pytest.approx(0.4)],
        [pytest.approx(0.4)] * 2 + [None],
    ]
    assert shown["0|3"][0] == [None, 0.0, pytest.approx(1 / 3)]


def test_an_empty_benchmark_is_a_page_too(root: RunDirectory) -> None:
    config = matrix()
    data = write_benchmark_report(root, config, cells(config))
    page = (Path(root.path) / "benchmark.html").read_text()
    assert "No accuracy has been measured yet." in page
    assert "No two models have mapped the same data set yet." in page
    assert json.loads((Path(root.path) / "benchmark.json").read_text())["schema_version"] == 1
    assert len(data.cells) == 6


def test_text_of_a_cell_breaks_out_of_nothing_and_the_page_asks_nothing_of_the_network(root: RunDirectory) -> None:
    summarise(root, "a--facts--probe--0", [(0, 0.4)])
    note_state(root, "a--facts--probe--0", status="failed", error=ATTACK)
    page = render_benchmark(collected(root, matrix()))
    assert ATTACK not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"""<(?:script|img|link)[^>]+(?:src|href)=["']https?:""", page)


def test_what_the_json_holds_is_what_the_page_is_made_from(root: RunDirectory) -> None:
    config = matrix()
    summarise(root, "a--facts--probe--0", [(0, 0.4), (20, 0.6)])
    data = write_benchmark_report(root, config, cells(config))
    assert BenchmarkData.model_validate_json((Path(root.path) / "benchmark.json").read_text()) == data
