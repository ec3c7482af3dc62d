"""What is measured beside accuracy, on a campaign that has run: figures, a judge that is paid once, a stage that others
do not read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from rich.console import Console

from engine import stages
from engine.config import RunConfig, parse_config
from engine.execution.campaign import Campaign
from engine.report.build import write_report
from engine.store.events import Events
from engine.store.ledger import committed_stages, ledger_table
from engine.store.run_directory import RunDirectory
from ka2l.errors import ConfigError

JUDGE = {"model": "judge-1", "api_key_env": None, "prices": {"input_per_million": 0.0, "output_per_million": 1e6}}


def verdict(question: str, body: Mapping[str, Any]) -> str:
    """One fact for every answer; the same where the texts are; the first answer is always better."""
    text = body["messages"][-1]["content"]
    kind = body["response_format"]["json_schema"]["name"]
    if kind == "StatedFacts":
        return json.dumps({"facts": [text.split("Answer: ")[1].split("\n\n")[0]]})
    if kind == "MatchedFacts":
        said, expected = re.findall(r"1\. (.*)", text)
        return json.dumps({"numbers": [int(said == expected)]})
    return json.dumps({"completeness": "first", "factuality": "tie", "logicality": "tie"})


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> RunDirectory:
    """A copy of the finished campaign."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def evaluate(run: RunDirectory, changes: Mapping[str, Any] | None = None) -> None:
    """All rounds' evaluation with other settings, as `ka2l resume --set` would."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    config = parse_config(run.read_text("config.yaml") or "", overrides)
    campaign = Campaign(config, run, Events(run, Console(quiet=True)), config.model, config.pool.path)
    for index in range(3):
        stages.evaluate(campaign, index)


def metrics(run: RunDirectory, index: int) -> Mapping[str, Any]:
    return run.stage("evaluate", index).require().metrics


def test_calibration_and_abstention_are_of_the_eval_questions_under_each_state(run: RunDirectory) -> None:
    for index in range(3):
        graded = run.stage("cluster", index).table(["question_id", "correct", "purpose"])
        correct = graded.filter(pc.equal(graded["purpose"], "eval"))["correct"].to_pylist()
        made = metrics(run, index)["confidence"]
        assert made.keys() >= ({"agreement"} if index == 2 else {"p_unknown", "agreement"})
        for source in made.keys() - {"p_wrong"}:
            assert made[source]["num_answers"] == len(correct) == 24
            assert made[source]["abstention"]["area_at_random"] == pytest.approx(np.mean(correct))
            assert sum(entry["count"] for entry in made[source]["reliability"]["bins"]) == 24


def test_agreement_is_the_share_of_samples_that_mean_the_same(run: RunDirectory) -> None:
    drawn = run.stage("cluster", 0).table(["purpose", "semantic_ids", "correct"], pc.field("purpose") == "agreement")
    assert drawn.num_rows == 24
    assert drawn["correct"].null_count == 24  # greedy answers alone are graded
    shares = [max(map(ids.count, ids)) / 3 for ids in drawn["semantic_ids"].to_pylist()]
    bins = metrics(run, 0)["confidence"]["agreement"]["reliability"]["bins"]
    stated = sum(entry["count"] * entry["predicted"] for entry in bins)
    assert stated == pytest.approx(sum(shares))


def test_p_wrong_is_judged_on_the_base_models_answers_without_what_was_annotated(run: RunDirectory) -> None:
    known = run.stage("knowledge", 1).table(["p_wrong"], pc.field("split") == "eval")
    made = metrics(run, 1)["confidence"]
    assert ("p_wrong" in made) == (known["p_wrong"].null_count < known.num_rows)
    assert "p_wrong" not in metrics(run, 0)["confidence"]


def test_other_settings_make_the_figures_again_and_nothing_else(run: RunDirectory) -> None:
    before = {s.label: s.require().committed_at for s in committed_stages(run)}
    assert metrics(run, 0)["text"] == {}
    evaluate(run)
    assert {s.label: s.require().committed_at for s in committed_stages(run)} == before
    evaluate(run, {"evaluation.text": ["rouge_l"]})
    after = {s.label: s.require().committed_at for s in committed_stages(run)}
    assert {name for name in before if after[name] != before[name]} == {f"round-00{r}/evaluate" for r in range(3)}
    for index in range(3):
        table = run.stage("evaluate", index).table(["rouge_l", "num_correct"])
        assert metrics(run, index)["text"]["rouge_l"]["mean"][0] == pytest.approx(pc.mean(table["rouge_l"]).as_py())
        assert table["num_correct"].null_count == table.num_rows == 24


JUDGED = {"evaluation.facts": "judge", "evaluation.pairs": "judge", "evaluation.num_judged": 10}


def test_a_judge_counts_facts_and_compares_with_the_base_model(run: RunDirectory, teacher_server: Any) -> None:
    server = teacher_server(content=verdict)
    evaluate(run, JUDGED | {"annotator.teacher": JUDGE | {"base_url": server.url}})
    seen = None
    for index in range(3):
        table = run.stage("evaluate", index).table(["question_id", "num_correct"], pc.field("num_correct").is_valid())
        assert table.num_rows == 10
        assert seen in (None, table["question_id"].to_pylist())  # the same questions in every round
        seen = table["question_id"].to_pylist()
        assert metrics(run, index)["facts"]["num_answers"] == 10
    assert metrics(run, 0)["aspects"] == {}
    made = metrics(run, 2)
    assert made["aspects"]["by_facts"]["completeness"]["num_pairs"] == 10
    # The judge always prefers what stands first, so nobody wins, and the figure that tells says so.
    assert made["aspects"]["by_judge"]["completeness"]["tie"] == 1.0
    assert made["judge"]["same_in_both_positions"] == {"completeness": 0.0, "factuality": 1.0, "logicality": 1.0}


def test_no_verdict_is_paid_twice_and_the_ledger_holds_them_all(run: RunDirectory, teacher_server: Any) -> None:
    server = teacher_server(content=verdict)
    settings = JUDGED | {"annotator.teacher": JUDGE | {"base_url": server.url}}
    evaluate(run, settings)
    num_billed, spent = sum(server.billed.values()), _money(run)
    assert num_billed == len(server.billed) > 0
    assert spent == pytest.approx(sum(_tokens(run).values()))  # a token costs one
    run.stage("evaluate", 1).remove()
    evaluate(run, settings)
    assert (sum(server.billed.values()), _money(run)) == (num_billed, pytest.approx(spent))


def test_after_an_error_in_the_middle_nothing_is_asked_again(run: RunDirectory, teacher_server: Any) -> None:
    server = teacher_server(lambda number, body: "401" if number > 12 else None, content=verdict)
    settings = JUDGED | {"annotator.teacher": JUDGE | {"base_url": server.url, "concurrency": 1}}
    with pytest.raises(ConfigError):
        evaluate(run, settings)
    assert sum(server.billed.values()) == 12
    server.fault_of = lambda number, body: None
    evaluate(run, settings)
    assert set(server.billed.values()) == {1}
    assert _money(run) == pytest.approx(sum(_tokens(run).values()))


def _money(run: RunDirectory) -> float:
    rows = ledger_table(run).to_pylist()
    return sum(row["quantity"] for row in rows if row["stage"] == "evaluate" and row["item"] == "money")


def _tokens(run: RunDirectory) -> dict[int, float]:
    rows = ledger_table(run).to_pylist()
    return {
        row["round"]: row["quantity"]
        for row in rows
        if row["stage"] == "evaluate" and row["item"] == "tokens_generated"
    }


def test_the_cap_on_money_ends_judging_and_leaves_the_other_figures(run: RunDirectory, teacher_server: Any) -> None:
    server = teacher_server(content=verdict)
    teacher = JUDGE | {"base_url": server.url, "max_tokens": 64}
    evaluate(run, JUDGED | {"annotator.teacher": teacher, "budget.money": 100.0})
    assert _money(run) <= 100
    assert {metrics(run, index)["judge"]["stopped"] for index in range(3)} == {"money"}
    assert metrics(run, 0)["confidence"].keys() >= {"p_unknown"}


def test_report_and_summary_show_what_was_measured(run: RunDirectory, teacher_server: Any) -> None:
    server = teacher_server(content=verdict)
    evaluate(run, JUDGED | {"annotator.teacher": JUDGE | {"base_url": server.url}, "evaluation.text": ["rouge_l"]})
    content = write_report(run)
    shown = [row["evaluation"] for row in content["rounds"]]
    assert [entry["facts"]["num_answers"] for entry in shown] == [10, 10, 10]
    assert shown[0]["confidence"]["p_unknown"].keys() >= {"ece", "abstention_area", "auroc"}
    assert shown[1]["text"]["rouge_l"]["how"] == "F1, Porter stems"
    page = (Path(run.path) / "report.html").read_text()
    for chart in ("facts", "reliability", "abstention"):
        assert f'id="chart-{chart}"' in page
    assert "wins less losses" in page


def test_two_runs_are_compared_by_the_facts_that_both_have_counted(
    run: RunDirectory, finished: Any, teacher_server: Any, tmp_path: Path
) -> None:
    server = teacher_server(content=verdict)
    settings = JUDGED | {"annotator.teacher": JUDGE | {"base_url": server.url}}
    shutil.copytree(finished.run_dir, tmp_path / "other")
    other = RunDirectory(tmp_path / "other")
    evaluate(run, settings)
    assert write_report(run, baselines=[other.url])["aspects_against"] == {}  # the other has counted nothing
    evaluate(other, settings)
    (rates,) = write_report(run, baselines=[other.url])["aspects_against"].values()
    assert rates["completeness"] == {"num_pairs": 10, "win": 0, "tie": 1, "lose": 0, "net": [0, 0, 0]}
    assert "Against the last answers of other runs" in (Path(run.path) / "report.html").read_text()


def test_a_run_without_evaluation_has_no_such_section(run: RunDirectory) -> None:
    for index in range(3):
        run.stage("evaluate", index).remove()
    assert {row["evaluation"] for row in write_report(run)["rounds"]} == {None}
    assert 'href="#evaluation"' not in (Path(run.path) / "report.html").read_text()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"facts": "testbed"}, "testbed.lives"),
        ({"facts": "judge"}, "annotator.teacher"),
        ({"pairs": "judge"}, "annotator.teacher"),
        ({"text": ["bert_score"]}, "evaluation.encoder"),
    ],
)
def test_a_setting_that_lacks_another_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_config(json.dumps({"evaluation": section}))


def test_by_default_nothing_costs_money_or_needs_an_extra() -> None:
    made = RunConfig().evaluation
    assert not made.judges
    assert (made.text, made.facts, made.num_samples) == ((), "none", 0)
