"""Which runs may be compared, and `ka2l report` with baselines and other prices: files only, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from engine.cli.main import app
from engine.report.baseline import read_baseline
from engine.report.build import write_report
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from ka2l import schemas
from ka2l.errors import ConfigError, RunDirectoryError

SPLITS = ("seed", "candidate", "eval")


def commit(
    run: RunDirectory,
    name: str,
    index: int | None,
    *,
    fingerprint: str = "0" * 16,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    tables: Sequence[pa.Table] = (),
) -> None:
    stage = run.stage(name, index)
    for part, table in enumerate(tables):
        write_shard(stage.url, shard_name(part), table, {})
    stage.commit(
        wanted=fingerprint, config=config or {}, inputs={}, metrics=metrics or {}, cost={}, seed=0, seconds=3.6
    )


def make_run(
    path: Path,
    accuracies: Sequence[float],
    *,
    budget: int = 10,
    fingerprint: str = "0" * 16,
    shard_rows: int = 20,
    content: str = "abc",
    wording: str = "Question",
    num_shots: int = 0,
    sampler: Mapping[str, Any] | None = None,
    equivalence: str = "lexical",
    status: str = "complete",
) -> RunDirectory:
    """A run that annotates ``budget`` questions between any two of its accuracies."""
    run = RunDirectory(path)
    run.write_text("config.yaml", "name: by-hand\nprices: {annotation: 3}\n")
    run.write_json("summary.json", {"status": status})
    questions = [
        {
            "question_id": f"q{index}",
            "question": f"{wording} {index}?",
            "split": SPLITS[index % 3],
            "group": None,
            "fact": None,
            "metadata": "{}",
        }
        for index in range(60)
    ]
    references = [{"question_id": row["question_id"], "answers": [row["question_id"]]} for row in questions]
    model = {"run": {"seed": 0, "model": {"content": content, "dtype": "float32", "trust_remote_code": False}}}
    for name, rows, schema in (
        ("questions", questions, schemas.QUESTIONS),
        ("references", references, schemas.REFERENCES),
    ):
        shards = [pa.Table.from_pylist(rows[start : start + shard_rows], schema) for start in range(0, 60, shard_rows)]
        commit(run, name, None, fingerprint=fingerprint, config=model, metrics={"candidate": 20}, tables=shards)
    asking = {
        "prompt": {"num_shots": num_shots},
        "sampler": {"max_tokens": 16, "num_samples": 10} | dict(sampler or {}),
    }
    for index, accuracy in enumerate(accuracies):
        commit(run, "observe", index, config=asking)
        metrics = {"accuracy": accuracy, "accuracy_ci": [accuracy - 0.01, accuracy + 0.01]}
        commit(run, "cluster", index, config={"kind": equivalence}, metrics=metrics)
        if index + 1 < len(accuracies):
            commit(run, "select", index, metrics={"strategy": "random", "num_selected": budget})
            commit(run, "annotate", index, metrics={"num_annotated": budget})
            commit(run, "tune", index)
    return run


@pytest.fixture
def mine(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "mine", [0.5, 0.8])


def refusal(mine: RunDirectory, url: str | Path) -> str:
    with pytest.raises(RunDirectoryError) as caught:
        read_baseline(mine, str(url))
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- which runs may be compared ----------------------------------------------------------------------------------------


def test_a_run_with_another_selection_is_accepted(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5, 0.6, 0.7])
    data = read_baseline(mine, other.url)
    assert [item.stage("cluster").number("accuracy") for item in data.rounds] == [0.5, 0.6, 0.7]


def test_a_pool_in_other_shards_is_the_same_pool(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5], fingerprint="1" * 16, shard_rows=7)
    assert read_baseline(mine, other.url).rounds


def test_more_samples_for_the_probe_measure_accuracy_in_the_same_way(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5], sampler={"num_samples": 20, "temperature": 0.7})
    assert read_baseline(mine, other.url).rounds


def test_a_run_of_another_model_is_refused(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5, 0.9], content="xyz")
    message = refusal(mine, other.url)
    assert "asks another model" in message
    assert "content 'xyz', here 'abc'" in message


def test_a_run_of_another_pool_is_refused(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5, 0.9], fingerprint="1" * 16, wording="Riddle")
    assert "asks other questions" in refusal(mine, other.url)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_shots": 5}, "num_shots 5, here 0"),
        ({"sampler": {"max_tokens": 64}}, "max_tokens 64, here 16"),
        ({"equivalence": "nli"}, "kind 'nli', here 'lexical'"),
    ],
)
def test_a_run_that_measures_in_another_way_is_refused(
    mine: RunDirectory, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    message = refusal(mine, make_run(tmp_path / "other", [0.5, 0.9], **change).url)
    assert "measures accuracy in another way" in message
    assert said in message


def test_a_run_that_does_not_say_its_model_is_refused(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5])
    commit(other, "questions", None, config={})
    assert "do not both say which model" in refusal(mine, other.url)


def test_a_run_that_is_not_finished_is_refused(mine: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [0.5, 0.9], status="paused")
    message = refusal(mine, other.url)
    assert "not finished: paused" in message
    assert f"ka2l resume {other.url}" in message


def test_what_is_no_run_or_the_run_itself_is_refused(mine: RunDirectory, tmp_path: Path) -> None:
    assert "holds no run" in refusal(mine, tmp_path / "nowhere")
    assert "is the run itself" in refusal(mine, mine.url)


# -- the command -------------------------------------------------------------------------------------------------------


def report(*words: str) -> Any:
    return CliRunner().invoke(app, ["report", *words])


def net_of(run: RunDirectory) -> Any:
    return json.loads(Path(run.path, "summary.json").read_text())["net"]


def test_report_compares_with_every_baseline_given(mine: RunDirectory, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", [0.5, 0.7, 0.9])
    second = make_run(tmp_path / "second", [0.5, 0.6])
    done = report(mine.url, "--baseline", first.url, "--baseline", second.url)
    assert done.exit_code == 0, done.exception
    found = net_of(mine)["baselines"]
    assert [(item["name"], item["reached"] is not None) for item in found] == [("first", True), ("second", False)]
    assert found[0]["reached"]["annotations"] == pytest.approx(15)
    assert found[0]["saving"]["annotation_money"] == pytest.approx(15)
    page = Path(mine.path, "report.html").read_text()
    assert 'id="chart-net_annotations"' in page
    assert 'id="chart-net_money"' in page


def test_report_takes_the_prices_of_the_run_and_changes_them_for_one_report(mine: RunDirectory) -> None:
    before = Path(mine.path, "config.yaml").read_bytes()
    manifests = {path: path.read_bytes() for path in Path(mine.path).rglob("manifest.json")}
    assert report(mine.url).exit_code == 0
    assert net_of(mine)["annotation_money"] == 30.0
    assert report(mine.url, "--set", "prices.annotation=0.5", "--set", "prices.currency=EUR").exit_code == 0
    assert (net_of(mine)["annotation_money"], net_of(mine)["currency"]) == (5.0, "EUR")
    assert Path(mine.path, "config.yaml").read_bytes() == before
    assert {path: path.read_bytes() for path in Path(mine.path).rglob("manifest.json")} == manifests


def test_report_prices_a_run_whose_config_is_of_another_version(mine: RunDirectory) -> None:
    mine.write_text("config.yaml", "name: old\nwas_a_key: once\n")
    assert report(mine.url, "--set", "prices.annotation=0.5").exit_code == 0
    assert net_of(mine)["annotation_money"] == 5.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("selection.budget=3", "a report can change prices only"),
        ("prices.anotation=3", "did you mean 'prices.annotation'?"),
        ("prices.annotation=-1", "prices.annotation: Input should be greater than or equal to 0"),
        ("prices.cpu_hour=.inf", "prices.cpu_hour: Input should be a finite number"),
    ],
)
def test_what_is_no_price_is_refused_and_nothing_is_written(mine: RunDirectory, override: str, said: str) -> None:
    done = report(mine.url, "--set", override)
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert not Path(mine.path, "report.html").exists()


def test_a_refused_baseline_leaves_the_old_report_alone(mine: RunDirectory, tmp_path: Path) -> None:
    write_report(mine, "complete")
    before = Path(mine.path, "report.html").read_bytes()
    other = make_run(tmp_path / "other", [0.5, 0.9], content="xyz")
    assert isinstance(report(mine.url, "--baseline", other.url).exception, RunDirectoryError)
    assert Path(mine.path, "report.html").read_bytes() == before


def test_prices_that_are_none_are_noted_and_the_defaults_taken(mine: RunDirectory) -> None:
    mine.write_text("config.yaml", "prices: {annotation: much}\n")
    content = write_report(mine, "complete")
    assert content["net"]["annotation_price"] == 1.0
    assert "prices: Input should be a valid number" in Path(mine.path, "report.html").read_text()
