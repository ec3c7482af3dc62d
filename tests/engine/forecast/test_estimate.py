"""Counts of a run are exact before it starts; the rest comes from measured rates, with intervals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.config import load_config
from engine.forecast.estimate import Teaching, _capped, predict, teaching_of
from engine.forecast.prediction import Estimate, Prediction
from engine.forecast.rates import Pace, Range, Rates, Refining, Scoring, exactly, mean_of, measured_once
from ka2l.teacher.config import Prices, TeacherConfig

RATES = Rates(
    prompt_tokens=dict.fromkeys(("seed", "candidate", "eval"), exactly(10.0)),
    shared_tokens=4.0,
    answer_tokens={"probe": Range(3.0, 2.8, 3.2), "eval": exactly(2.0), "rehearsal": exactly(3.0)},
    adapted_tokens={"probe": Range(4.0, 3.9, 4.1), "eval": exactly(2.0)},
    observe=Pace(exactly(20.0), exactly(0.001)),
    observe_adapted=Pace(exactly(25.0), Range(0.002, 0.001, 0.003)),
    extract=Pace(exactly(8.0), exactly(0.01)),
    extract_adapted=Pace(exactly(8.0), exactly(0.02)),
    cluster=Pace(exactly(2.0), exactly(0.0)),
    feedback=Pace(exactly(2.0), exactly(0.001)),
    driver=(
        {name: Pace(exactly(5.0), exactly(0.001)) for name in ("label", "probe", "knowledge", "select")},
        {name: Pace(exactly(0.0), exactly(0.001)) for name in ("label", "probe", "knowledge", "select")},
    ),
    tune=Pace(exactly(15.0), Range(0.2, 0.1, 0.3)),
)
COUNTS = {"seed": 400, "candidate": 1500, "eval": 1500}
#: The quickstart with questions of its pool alone, three times 250 of them.
PLAIN = ("rounds=3", "decoder.kind=none", "selection.budget=250")
TEACHING = Teaching(exactly(100.0), exactly(20.0), Range(0.01, 0.005, 0.02))


def rows(*overrides: str, cap: int = 750, teaching: Teaching | None = None) -> list[Prediction]:
    return predict(load_config("quickstart", [*PLAIN, *overrides]), COUNTS, RATES, cap, teaching)


def of(stage: str, made: list[Prediction]) -> list[Prediction]:
    return [row for row in made if row.stage == stage]


def test_annotations_are_rounds_times_budget_and_stop_at_the_cap() -> None:
    assert sum(row.annotations for row in rows()) == 750
    assert sum(row.annotations for row in rows(cap=300)) == 300


def test_the_model_is_asked_once_more_than_there_are_rounds() -> None:
    made = rows("rounds=2", cap=500)
    assert [row.round_index for row in of("observe", made)] == [0, 1, 2]
    assert [row.round_index for row in of("tune", made)] == [0, 1]


def test_own_answers_to_rehearse_are_sampled_in_the_first_round_alone() -> None:
    without = rows("tuning.rehearsal=0")
    first = of("observe", rows())[0].tokens_generated.value
    assert of("observe", without)[0].tokens_generated.value == 400 * 10 * 3 + 1500 * 2
    assert first - of("observe", without)[0].tokens_generated.value == 1500 * 10 * 3
    assert [row.forward_passes for row in of("observe", rows())] == [3400, 1900, 1900, 1900]


def test_an_adapted_model_answers_at_its_own_length_and_pace() -> None:
    base, adapted, *_ = of("observe", rows())
    assert adapted.tokens_generated == Range(4000 * 4.0 + 3000, 4000 * 2.8 + 3000, 4000 * 4.1 + 3000)
    assert base.seconds == exactly(20.0 + 20_500 * 0.001)
    assert adapted.seconds.value == 25.0 + 5_500 * 0.002
    assert adapted.seconds.high == pytest.approx(25.0 + 5_500 * 0.003)


def test_every_question_is_extracted_in_every_round_that_selects_without_what_all_prompts_share() -> None:
    extracted = of("extract", rows())
    assert [row.forward_passes for row in extracted] == [3400, 3400, 3400]
    assert {row.tokens_prompt.value for row in extracted} == {3400 * 6.0}
    assert [row.seconds.value for row in extracted] == [42.0, 76.0, 76.0]


def test_replicas_share_the_work_and_hold_their_cpus_and_gpus() -> None:
    options = ("sampler.replicas=4", "sampler.gpus_per_replica=0.5", "sampler.cpus_per_replica=2")
    observed = of("observe", rows(*options))[0]
    assert observed.seconds == exactly(20.0 + 20_500 * 0.001 / 4)
    assert observed.cpu_seconds == observed.seconds * 8
    assert observed.gpu_seconds == observed.seconds * 2
    assert of("select", rows(*options))[0].cpu_seconds == of("select", rows(*options))[0].seconds


def test_seconds_are_start_up_plus_work_and_their_interval_is_that_of_the_rates() -> None:
    tuned = of("tune", rows("tuning.max_steps=100"))[0]
    assert tuned.seconds == Range(15.0 + 100 * 0.2, 15.0 + 100 * 0.1, 15.0 + 100 * 0.3)


def test_what_the_driver_does_pays_for_its_start_once() -> None:
    assert [row.seconds.value for row in of("probe", rows())] == [5.0 + 0.4, 0.4, 0.4]
    assert [row.seconds.value for row in of("select", rows())] == [5.0 + 3.4, 3.4, 3.4]


def test_own_answers_are_grouped_in_the_first_round_and_graded_in_later_ones() -> None:
    grouped = of("feedback", rows())
    assert [row.round_index for row in grouped] == [0, 1, 2, 3]
    assert [row.seconds.value for row in grouped] == [2.0 + 1500 * 0.001, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("option", ["tuning.rehearsal=0", "tuning.rehearsal_labels=greedy"])
def test_where_no_own_answers_can_disagree_the_first_round_groups_none(option: str) -> None:
    assert [row.round_index for row in of("feedback", rows(option))] == [1, 2, 3]


REFINING = Refining(
    facts=Pace(exactly(1.0), exactly(0.0)),
    difficulty=Pace(exactly(8.0), exactly(0.01)),
    augment=Pace(exactly(1.0), exactly(0.0)),
    compare=Pace(exactly(10.0), exactly(0.5)),
    pairs={"fine_grained": 1.0, "completeness": 1.0, "factuality": 1.0, "logicality": 0.5},
    num_facts=5.0,
    num_tokens=60.0,
)


def test_finer_questions_lengthen_tuning_and_comparisons_come_after_it() -> None:
    config = load_config("knowtuning", ["rounds=1", "tuning.rehearsal=0", "tuning.num_epochs=2"])
    made = predict(config, COUNTS, RATES._replace(refining=REFINING), 100)
    names = [row.stage for row in made if row.round_index == 0]
    assert names[names.index("annotate") :] == ["annotate", "facts", "difficulty", "augment", "tune", "compare"]
    (difficulty,), (tuned,), (compared,) = (of(name, made) for name in ("difficulty", "tune", "compare"))
    assert difficulty.seconds == exactly(8.0 + 100 * 0.01)
    assert (difficulty.forward_passes, difficulty.tokens_prompt.value) == (500, 6000.0)
    assert tuned.rows == 7  # 2 * 200 rows in batches of 64
    assert compared.rows == 16  # 250 comparisons in batches of 16
    assert compared.seconds == exactly(10.0 + 16 * 0.5)


def test_a_writer_that_was_not_asked_is_told_with_its_requests() -> None:
    overrides = ["tuning.knowtuning.writer=teacher", "annotator.kind=teacher", "annotator.teacher.model=m"]
    _, notes = _capped(load_config("knowtuning", overrides), COUNTS, RATES, 100, None)
    assert any("up to 7 an annotation" in note for note in notes)


@pytest.mark.parametrize("kind", ["semantic_entropy", "entropy"])
def test_a_strategy_that_ranks_by_samples_has_every_candidate_sampled_but_after_the_last_round(kind: str) -> None:
    more, less = (of("observe", rows(f"selection.kind={name}")) for name in (kind, "probe"))
    extra = [one.forward_passes - other.forward_passes for one, other in zip(more, less, strict=True)]
    assert extra == [1500, 1500, 1500, 0]


def test_the_perplexity_of_candidates_is_a_forward_pass_each() -> None:
    config = load_config("quickstart", [*PLAIN, "selection.kind=perplexity", "extraction.replicas=2"])
    scoring = Scoring(Pace(exactly(8.0), exactly(0.01)), num_tokens=12.0)
    made = predict(config, COUNTS, RATES._replace(scoring=scoring), 750)
    scored = of("perplexity", made)
    assert [(row.round_index, row.forward_passes) for row in scored] == [(0, 1500), (1, 1500), (2, 1500)]
    assert scored[0].seconds == exactly(8.0 + 1500 * 0.01 / 2)
    assert scored[0].tokens_prompt.value == 1500 * 12
    held = 2 * config.extraction.cpus_per_replica
    assert scored[0].cpu_seconds.value == pytest.approx(held * scored[0].seconds.value)
    names = [row.stage for row in made if row.round_index == 0]
    assert names.index("perplexity") + 1 == names.index("select")


def test_rounds_and_run_are_the_sums_of_their_stages() -> None:
    made = Estimate(COUNTS, rows(teaching=TEACHING))
    assert made.total.annotations == 750
    assert made.total.money == TEACHING.money * 250 + TEACHING.money * 500
    assert made.total.seconds.value == pytest.approx(sum(row.seconds.value for row in made.stages))
    assert [row.annotations for row in made.rounds] == [250, 250, 250, 0]
    read = json.loads(made.as_json())
    assert read["total"]["seconds"]["low"] < read["total"]["seconds"]["value"] < read["total"]["seconds"]["high"]
    assert len(read["stages"]) == len(made.stages)
    assert "25 %" in read["intervals"]


def test_a_teacher_costs_its_prices_for_the_characters_of_prompts_and_short_replies() -> None:
    config = TeacherConfig(model="t", num_samples=2, temperature=1.0, prices=Prices(output_per_million=1e6))
    short, long = (teaching_of(config, ["Where?"], [["x" * size]]) for size in (4, 44))
    assert long.tokens_generated.value - short.tokens_generated.value == 2 * 40 / 4
    assert long.money == long.tokens_generated
    assert long.money.low < long.money.value < long.money.high
    wordier = teaching_of(config, ["Where?" + "?" * 400], [["xxxx"]])
    assert wordier.tokens_prompt.value - short.tokens_prompt.value == pytest.approx(2 * 400 / 4)


def test_a_cap_on_money_ends_the_annotations_where_it_is_used_up_and_says_so() -> None:
    def capped(**values: Any) -> tuple[list[Prediction], list[str]]:
        overrides = [f"budget.{key}={value}" for key, value in values.items()]
        return _capped(load_config("quickstart", [*PLAIN, *overrides]), COUNTS, RATES, 750, TEACHING)

    made, notes = capped(money=3.0)
    assert sum(row.annotations for row in made) == 300
    assert any("The budget of 3 for annotation lets about 300 annotations through" in note for note in notes)
    made, notes = capped(money=100.0)
    assert sum(row.annotations for row in made) == 750
    assert len(notes) == 1
    assert any("budget of 0.01 hours" in note for note in capped(hours=0.01)[1])


def test_a_mean_of_some_has_an_interval_and_a_mean_of_all_has_none() -> None:
    some = mean_of([1.0, 2.0, 3.0])
    assert some.value == 2.0
    assert some.high - some.value == some.value - some.low == pytest.approx(1.96 / 3**0.5)
    assert mean_of([1.0, 2.0, 3.0], num_all=3) == exactly(2.0)
    assert mean_of([2.0]) == measured_once(2.0)
