"""The net saving: what is counted, how curves are compared, and what is never claimed."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig, parse_config
from engine.forecast.prices import PricesConfig
from engine.report.build import render
from engine.report.data import ReportData, RoundReport, StageReport
from engine.report.net import Reached, accuracy_at, difference_ci, net, net_summary, reach
from engine.report.page import money
from engine.report.spending import Point, everything, spending
from ka2l.tuning.sft import num_steps

ATTACK = "<script>alert(1)</script>"
#: 36 s on one CPU cost 0.01 with these, and so does an hour of a GPU's hundredth.
PRICES = PricesConfig(annotation=2.0, cpu_hour=1.0, gpu_hour=100.0, currency="EUR")


def points(*states: tuple[int, float]) -> list[Point]:
    """A curve on which an annotation costs 2 and reaching its first state 1."""
    return [Point(index, count, accuracy, None, 1.0 + 2 * count) for index, (count, accuracy) in enumerate(states)]


def run(
    name: str,
    *states: tuple[int, float | None],
    strategy: str = "probe",
    half: float = 0.02,
    cost: dict[str, float] | None = None,
    **values: Any,
) -> ReportData:
    """A run with a measured state after each number of annotations; every stage takes 36 s on one CPU."""
    cost = {"seconds": 36.0} if cost is None else cost
    rounds = []
    for index, (count, accuracy) in enumerate(states):
        graded = {} if accuracy is None else {"accuracy": accuracy, "accuracy_ci": [accuracy - half, accuracy + half]}
        stages = {"observe": StageReport({}, cost), "cluster": StageReport(graded, cost)}
        if index + 1 < len(states):
            more = states[index + 1][0] - count
            stages |= {
                "probe": StageReport({}, cost),
                "select": StageReport({"strategy": strategy, "num_selected": more}, {"seconds": 0.0}),
                "annotate": StageReport({"num_annotated": more}, {"seconds": 0.0, "annotations": more}),
                "tune": StageReport({"num_steps": 18, "training_seconds": 18.0}, cost),
            }
        rounds.append(RoundReport(index, stages, answer_tokens={"probe": 300, "eval": 100}))
    given = {"num_candidates": 1000, "num_seed": 100, "prices": PRICES, "location": f"runs/{name}"} | values
    return ReportData(name, status="complete", rounds=rounds, **given)


# -- where a curve reaches an accuracy --------------------------------------------------------------------------------


def test_an_accuracy_between_two_states_is_reached_on_the_straight_line_between_them() -> None:
    assert reach(points((0, 0.5), (100, 0.7), (300, 0.9)), 0.8) == Reached(
        pytest.approx(200), pytest.approx(401), (100, 300)
    )


def test_an_accuracy_of_a_state_is_reached_there() -> None:
    assert reach(points((0, 0.5), (100, 0.7)), 0.7) == Reached(100.0, 201.0, (0, 100))


def test_a_curve_that_stays_below_never_reaches() -> None:
    assert reach(points((0, 0.5), (100, 0.7)), 0.71) is None
    assert reach([], 0.5) is None


def test_a_curve_that_starts_above_has_reached_with_its_first_state() -> None:
    assert reach(points((0, 0.5), (100, 0.7)), 0.4) == Reached(0.0, 1.0, (0, 0))


def test_a_curve_that_falls_again_counts_where_it_reached_first() -> None:
    found = reach(points((0, 0.5), (100, 0.9), (200, 0.6), (300, 0.9)), 0.9)
    assert found is not None
    assert found.annotations == 100


def test_states_that_are_equal_do_not_divide_by_zero() -> None:
    assert reach(points((100, 0.5), (100, 0.7)), 0.6) == Reached(100.0, 201.0, (100, 100))
    flat = reach(points((0, 0.5), (100, 0.5), (200, 0.5)), 0.5)
    assert flat == Reached(0.0, 1.0, (0, 0))


def test_accuracy_at_a_number_of_annotations_has_an_interval_only_where_it_was_measured() -> None:
    curve = [Point(0, 0, 0.5, (0.4, 0.6), 0.0), Point(1, 100, 0.7, (0.6, 0.8), 0.0)]
    assert accuracy_at(curve, 100) == (0.7, (0.6, 0.8))
    assert accuracy_at(curve, 50) == (pytest.approx(0.6), None)
    assert accuracy_at(curve, 101) is None
    assert accuracy_at(curve[1:], 50) is None
    assert accuracy_at([*curve, Point(2, 100, 0.75, None, 0.0)], 100) == (0.75, None)


def test_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, case (a): 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    low, high = difference_ci(56 / 70, (0.6918, 0.8770), 48 / 80, (0.4904, 0.7004))
    assert (low, high) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_one_engine_session_is_shared_out_by_what_its_answers_are_for() -> None:
    data = run("mine", (0, 0.5), (100, 0.8))
    seconds = {name: work.seconds for name, work in spending(data).work.items()}
    # Two rounds of observe and cluster, 72 s each: three quarters of the tokens are the probe's.
    assert seconds == {"sampling": 108, "probing": 36, "decoding": 0, "tuning": 36, "measuring": 36, "rest": 0}


def test_answers_to_rehearse_count_as_tuning_and_unread_tokens_as_sampling() -> None:
    data = run("mine", (0, 0.5))
    data.rounds[0].answer_tokens = {"probe": 1, "eval": 1, "rehearsal": 2}
    work = spending(data).work
    assert (work["tuning"].seconds, work["sampling"].seconds, work["measuring"].seconds) == (18, 27, 27)
    data.rounds[0].answer_tokens = {}
    assert spending(data).work["sampling"].seconds == 72


def test_recorded_cpu_and_gpu_time_counts_and_is_said_to_be_recorded() -> None:
    result = net(run("mine", (0, 0.5), cost={"seconds": 1.0, "cpu_seconds": 1800.0, "gpu_seconds": 360.0}))
    assert result.compute_recorded
    assert (result.compute_total.cpu_hours, result.compute_total.gpu_hours) == (1.0, 0.2)
    assert result.money == pytest.approx(1.0 + 20.0)


def test_without_recorded_time_it_is_wall_clock_time_on_the_configured_workers() -> None:
    sampler = "sampler: {replicas: 2, cpus_per_replica: 3, gpus_per_replica: 1}"
    data = run("mine", (0, 0.5), config=parse_config(sampler))
    data.rounds[0].answer_tokens = {}
    work = spending(data).work["sampling"]
    assert not net(data).compute_recorded
    assert (work.cpu_seconds, work.gpu_seconds) == (36 * 6 + 36, 36 * 2)


def test_booked_money_takes_the_place_of_the_assumed_price() -> None:
    data = run("mine", (0, 0.5), (100, 0.8), (200, 0.9))
    assert (net(data).annotation_price, net(data).annotation_booked) == (2.0, False)
    for item in data.rounds[:2]:
        stage = item.stages["annotate"]
        item.stages["annotate"] = replace(stage, cost={**stage.cost, "money": 5.0})
    result = net(data)
    assert (result.annotation_price, result.annotation_booked, result.annotation_money) == (0.05, True, 10.0)


def test_rounds_without_booked_money_are_priced_beside_those_with() -> None:
    data = run("mine", (0, 0.5), (100, 0.8), (200, 0.9))
    stage = data.rounds[0].stages["annotate"]
    data.rounds[0].stages["annotate"] = replace(stage, cost={**stage.cost, "money": 5.0})
    assert net(data).annotation_money == 5.0 + 100 * 2.0


def test_money_of_a_state_is_all_that_was_spent_when_it_was_measured() -> None:
    result = net(run("mine", (0, 0.5), (100, 0.8)))
    assert [point.money for point in result.curve] == pytest.approx([0.02, 200 + 0.06])
    assert result.money == pytest.approx(result.curve[-1].money)


# -- against annotating everything -------------------------------------------------------------------------------------


def test_annotating_everything_takes_the_steps_of_the_config_at_the_speed_of_the_last_tuning() -> None:
    config = parse_config("tuning: {num_epochs: 3, batch_size: 10}")
    data = run("mine", (0, 0.5), (100, 0.8), config=config)
    estimate = everything(data)
    assert estimate is not None
    assert estimate.work is not None
    assert estimate.steps == num_steps(config.tuning, 1000, 100) == 330
    assert estimate.work.seconds == pytest.approx(18 + 330 * 1.0)
    result = net(data).everything
    assert result is not None
    assert result.money == pytest.approx(2000 + 348 / 3600)
    assert result.saving.annotations == 900
    assert result.saving.money == pytest.approx(result.money - net(data).money)


def test_no_accuracy_is_claimed_for_annotating_everything() -> None:
    result = net_summary(net(run("mine", (0, 0.5), (100, 0.8))))
    assert "accuracy" not in result["everything"]
    page = _text(run("mine", (0, 0.5), (100, 0.8)))
    assert "what annotating everything would reach is not known" in page
    assert "at equal accuracy, " not in page


@pytest.mark.parametrize(
    "data",
    [
        run("mine", (0, 0.5), (100, 0.8)),  # no config of this version
        run("mine", (0, 0.5), config=RunConfig()),  # nothing tuned
    ],
)
def test_a_tuning_that_cannot_be_estimated_is_left_out(data: ReportData) -> None:
    result = net(data).everything
    assert result is not None
    assert (result.compute, result.money) == (None, 2000.0)
    assert "its tuning cannot be estimated" in _text(data)


def test_without_counted_candidates_there_is_no_estimate() -> None:
    data = run("mine", (0, 0.5), (100, 0.8), num_candidates=None)
    assert net(data).everything is None
    assert "Annotating everything, estimated" not in _text(data)


# -- against other runs ------------------------------------------------------------------------------------------------


def compared(mine: ReportData, *others: ReportData) -> Any:
    return net(replace(mine, baselines=list(others))).baselines


def test_net_saving_is_annotation_and_computation_at_equal_accuracy() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8))
    (other,) = compared(mine, run("other", (0, 0.5), (200, 0.7), (400, 0.9)))
    assert other.reached == Reached(pytest.approx(300), pytest.approx(600 + 0.08), (200, 400))
    saving = other.saving
    assert saving.annotations == pytest.approx(200)
    assert saving.annotation_money == pytest.approx(400)
    assert saving.compute_money == pytest.approx(0.08 - 0.06)
    assert saving.money == pytest.approx(400.02)
    # Three quarters of 144 s of observe and cluster, and 36 s of probe, 1 an hour.
    assert saving.knowing_share == pytest.approx(0.04 / 400)
    assert saving.break_even_price == 0.0
    assert other.annotations_ci == (pytest.approx(280), pytest.approx(320))
    assert other.saving_within_ci is False


def test_a_random_baseline_is_not_charged_for_the_probing_that_it_did_not_need() -> None:
    mine, states = run("mine", (0, 0.5), (100, 0.8)), ((0, 0.5), (300, 0.8))
    random, probed = compared(mine, run("random", *states, strategy="random"), run("probed", *states))
    assert (random.knowing_counted, probed.knowing_counted) == (False, True)
    # It keeps tuning and its quarter of observe and cluster.
    assert random.reached.money == pytest.approx(600 + 0.02)
    assert probed.reached.money == pytest.approx(600 + 0.06)
    assert random.saving.money == pytest.approx(400 - 0.04)
    assert random.saving.break_even_price == pytest.approx(0.04 / 200)


def test_a_baseline_that_annotates_everything_needs_no_probe() -> None:
    (everything_,) = compared(run("mine", (0, 0.5), (100, 0.8)), run("all", (0, 0.5), (1000, 0.9)))
    assert not everything_.knowing_counted


def test_a_baseline_that_never_reaches_shows_no_saving_but_the_difference() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8))
    (other,) = compared(mine, run("random", (0, 0.5), (100, 0.6), strategy="random"))
    assert (other.reached, other.saving, other.saving_within_ci) == (None, None, None)
    assert other.annotations_ci == (None, None)
    assert other.difference.value == pytest.approx(0.2)
    assert other.difference.within_ci is False
    page = _text(replace(mine, baselines=[run("random", (0, 0.5), (100, 0.6), strategy="random")]))
    assert "random does not reach 80.0 % with 100 annotations: it ends 20.0 points below this run" in page
    assert "spares more than" not in page
    assert "not reached" in page


def test_a_baseline_that_never_reaches_with_more_annotations_shows_how_many_are_spared_at_least() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8))
    page = _text(replace(mine, baselines=[run("random", (0, 0.5), (250, 0.6), strategy="random")]))
    assert "This run spares more than 150 annotations." in page


def test_a_difference_within_the_intervals_shows_no_saving() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8), half=0.05)
    near = run("near", (0, 0.5), (100, 0.81), half=0.05)
    (other,) = compared(mine, near)
    assert other.difference.within_ci is True
    assert other.saving_within_ci is True
    assert other.annotations_ci[1] is None
    assert other.saving.annotations < 0
    assert other.saving.knowing_share is None
    page = _text(replace(mine, baselines=[near]))
    assert "no saving is shown" in page
    assert "that holds zero, so no difference is shown" in page
    assert "more than 100" in page


def test_a_baseline_that_is_better_costs_less_and_that_is_said() -> None:
    mine = run("mine", (0, 0.5), (100, 0.6))
    (other,) = compared(mine, run("better", (0, 0.5), (50, 0.9)))
    assert other.saving.money < 0
    assert "This run saves nothing; it costs" in _text(replace(mine, baselines=[run("better", (0, 0.5), (50, 0.9))]))


@pytest.mark.parametrize("states", [((0, None), (100, None)), ()])
def test_a_baseline_without_accuracy_is_shown_as_such(states: tuple[tuple[int, None], ...]) -> None:
    mine = run("mine", (0, 0.5), (100, 0.8))
    (other,) = compared(mine, run("blind", *states))
    assert (other.curve, other.difference, other.reached, other.saving) == ([], None, None, None)
    assert "blind has measured no accuracy" in _text(replace(mine, baselines=[run("blind", *states)]))


def test_a_run_without_accuracy_has_nothing_to_compare_at() -> None:
    mine = run("mine", (0, None), (100, None))
    (other,) = compared(mine, run("other", (0, 0.5), (200, 0.9)))
    assert (other.difference, other.reached) == (None, None)
    assert "This run has no accuracy to compare at" in _text(replace(mine, baselines=[run("other", (0, 0.5))]))


def test_missing_intervals_leave_confidence_open() -> None:
    mine, other = run("mine", (0, 0.5), (100, 0.8)), run("other", (0, 0.5), (300, 0.9))
    for item in [*mine.rounds, *other.rounds]:
        item.stages["cluster"] = StageReport({"accuracy": item.stage("cluster").number("accuracy")}, {})
    (found,) = compared(mine, other)
    assert (found.difference.ci, found.difference.within_ci, found.saving_within_ci) == (None, None, None)
    assert found.saving.annotations > 0


def test_runs_of_one_name_are_told_apart_by_the_folder_before() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8))
    twins = [run("x", (0, 0.5), location=f"work/{seed}/random") for seed in ("a", "b")]
    assert [item.name for item in compared(mine, *twins)] == ["a/random", "b/random"]
    assert [item.name for item in compared(mine, twins[0])] == ["random"]


# -- report and summary ------------------------------------------------------------------------------------------------


def _text(data: ReportData) -> str:
    """The section as a reader sees it."""
    section = re.search(r'<section id="net">(.*?)</section>', render(data), re.DOTALL)
    assert section is not None
    words = re.sub(r"<[^>]*>", "", re.sub(r"<script.*?</script>", "", section[1], flags=re.DOTALL))
    return re.sub(r"\s+", " ", html.unescape(words))


def test_summary_is_json_and_holds_what_the_documentation_says() -> None:
    mine = run("mine", (0, 0.5), (100, 0.8), baselines=[run("other", (0, 0.5), (200, 0.7), (400, 0.9))])
    values = json.loads(json.dumps(net_summary(net(mine)), allow_nan=False))
    assert values["curve"][1] == {
        "round": 1,
        "annotations": 100,
        "accuracy": 0.8,
        "accuracy_ci": pytest.approx([0.78, 0.82]),
        "money": pytest.approx(200.06),
    }
    (other,) = values["baselines"]
    assert other["reached"].keys() == {"annotations", "money", "between"}
    assert other["curve"][2]["annotations"] == 400
    assert other["at_equal_annotations"]["accuracy"] == pytest.approx(0.6)
    assert other["at_equal_annotations"]["difference"]["ci"] is None
    documented = (Path(__file__).resolve().parents[3] / "docs" / "net-saving.md").read_text()
    names = {*values, *other, *other["saving"], *values["everything"], *other["difference"], *values["compute_total"]}
    documented = set(re.findall(r"\w+", documented.partition("## `net`")[2]))
    assert names - documented == set()


def test_the_section_states_its_assumptions_and_the_share_of_probing() -> None:
    page = _text(run("mine", (0, 0.5), (100, 0.8), baselines=[run("random", (0, 0.5), (300, 0.9), strategy="random")]))
    assert "Assumed: 2.00 EUR an annotation; assumed: 1.00 EUR a CPU hour and 100.00 EUR a GPU hour" in page
    assert "random reaches 80.0 % with 225 annotations" in page
    assert "Sampling and probing took under 0.1 % of what annotation spares." in page
    assert "between its states with 0 and 300, for nothing was measured between them" in page
    assert "saves 249.96 EUR net: 250.00 EUR less for annotation, 0.044 EUR more for computation" in page
    assert "at equal accuracy, 80.0 %: 125 fewer annotations, if its curve is straight from 0 to 300" in page
    assert "Its own sampling for a probe and its probing are not counted" in page


def test_a_run_that_has_spent_nothing_says_so() -> None:
    assert "Nothing has been spent yet." in _text(ReportData("just-begun"))


def test_names_of_baselines_and_currencies_cannot_become_markup() -> None:
    other = run("x", (0, 0.5), (300, 0.9), strategy=ATTACK, location=f"runs/{ATTACK}".replace("/script", "script"))
    mine = run("mine", (0, 0.5), (100, 0.8), prices=PricesConfig(currency=ATTACK), baselines=[other])
    page = render(mine)
    assert "<script>alert" not in page
    charts = dict(
        re.findall(r'id="chart-(net_\w+)">.*?<script type="application/json">(.*?)</script>', page, re.DOTALL)
    )
    assert set(charts) == {"net_annotations", "net_money"}
    figures = [json.loads(chart)["views"][""] for chart in charts.values()]
    shown = [text for figure in figures for trace in figure["data"] for text in (trace["name"], *trace["customdata"])]
    shown += [figure["layout"]["xaxis"]["title"]["text"] for figure in figures]
    assert not any("<script" in text for text in shown)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (0.05, "0.05"),
        (0.0047, "0.0047"),
        (1343.021, "1,343.02"),
        (-13.6, "−13.60"),
        (0.2, "0.20"),
        (1e-7, "0.0000001"),
        (None, "–"),
    ],
)
def test_money_is_shown_with_digits_that_count(value: float | None, shown: str) -> None:
    assert money(value) == shown


def test_prices_change_no_result() -> None:
    first, second = parse_config("{}"), parse_config("prices: {annotation: 9, cpu_hour: 9, gpu_hour: 9, currency: X}")
    assert first.prices != second.prices
    assert first.result_fields() == second.result_fields()
    assert "prices" not in first.result_fields()
