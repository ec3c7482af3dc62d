from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.reply import SampleResult, TeacherResult, TeacherRun
from ka2l.testbed.build import TestbedConfig, build_world
from ka2l.testbed.lives import LifeWriter, Statement, grade_life, sentences, tell
from ka2l.tuning.knowledge_writer import (
    AtomicFacts,
    Extract,
    LongAnswer,
    QuestionAndAnswer,
    Refused,
    Rephrase,
    Revise,
    Rewrite,
    Task,
    TeacherWriter,
    task_prompt,
    task_result,
)
from ka2l.tuning.knowtuning import (
    ASPECTS,
    FINE_GRAINED,
    KnownFacts,
    KnowTuningConfig,
    augment,
    disordered,
    extract_facts,
    hardest,
    incomplete,
)

WORLD = TestbedConfig(lives=True, num_people=20, num_seed_people=4, num_steps=20)
LIFE = build_world(WORLD).facts[0].answers[0]
QUESTION = "Tell me about someone."


def known(perplexities: list[float], question_id: str = "q") -> KnownFacts:
    return KnownFacts(question_id, QUESTION, LIFE, sentences(LIFE)[: len(perplexities)], perplexities)


def pairs_of(config: KnowTuningConfig, answer: KnownFacts, writer: Any = None) -> dict[str, Any]:
    made = augment([answer], config, writer or LifeWriter(WORLD, 0), seed=3)
    return {pair.part: pair for pair in made.pairs}


# --- which facts -----------------------------------------------------------------------------------------------------


def test_the_facts_of_highest_perplexity_are_the_hardest() -> None:
    assert hardest([3.0, 9.0, 1.0, 7.0], 0.5) == [1, 3]


def test_of_an_odd_number_of_facts_the_larger_half_is_hard_and_ties_go_to_the_first() -> None:
    assert hardest([5.0, 5.0, 5.0], 0.5) == [0, 1]


def test_a_single_fact_is_hard_whatever_the_share() -> None:
    assert hardest([1.0], 0.01) == [0]


@given(st.lists(st.text(), min_size=2, max_size=9), st.floats(0.01, 0.99), st.integers(0, 99))
def test_an_incomplete_answer_lacks_something_keeps_something_and_keeps_its_order(
    facts: list[str], share: float, seed: int
) -> None:
    left = incomplete(facts, share, seed)
    assert 0 < len(left) < len(facts)
    rest = iter(facts)
    assert all(fact in rest for fact in left)


def test_half_of_the_facts_are_deleted() -> None:
    assert len(incomplete(list("abcdefgh"), 0.5, 0)) == 4


@given(st.lists(st.text(), min_size=2, max_size=9, unique=True), st.integers(0, 99))
def test_a_disordered_answer_has_all_facts_in_another_order(facts: list[str], seed: int) -> None:
    order = disordered(facts, seed)
    assert order != facts
    assert sorted(order) == sorted(facts)


# --- both training sets, on the testbed ------------------------------------------------------------------------------


def test_stage_one_asks_for_the_hardest_facts_and_answers_with_these_alone() -> None:
    answer = known([1.0, 8.0, 1.0, 9.0, 1.0])
    pair = pairs_of(KnowTuningConfig(hard_share=0.4), answer)[FINE_GRAINED]
    assert pair.question.startswith("What is the profession and instrument of ")
    assert pair.better == " ".join([answer.facts[1], answer.facts[3]])
    assert pair.worse is None


def test_each_aspect_makes_the_worse_answer_worse_in_that_aspect_alone() -> None:
    pairs = pairs_of(KnowTuningConfig(), known([1.0] * 5))
    grades = {part: grade_life(str(pairs[part].worse), LIFE) for part in ASPECTS}
    assert all(pairs[part].better == LIFE for part in ASPECTS)
    assert (grades["completeness"].num_missing, grades["completeness"].num_incorrect) == (2, 0)
    assert (grades["factuality"].num_correct, grades["factuality"].num_incorrect) == (0, 5)
    assert grades["logicality"].num_correct == 5
    assert grades["completeness"].order == 1.0
    assert grades["logicality"].order is not None
    assert grades["logicality"].order < 1.0


@pytest.mark.parametrize("aspect", ASPECTS)
def test_an_aspect_that_is_left_out_is_neither_compared_nor_asked_for(aspect: str) -> None:
    others = tuple(other for other in ASPECTS if other != aspect)
    writer = Recorder()
    assert set(pairs_of(KnowTuningConfig(aspects=others), known([1.0] * 5), writer)) == {FINE_GRAINED, *others}
    assert not any(key.endswith(f"/{aspect}") for key in writer.asked)


def test_without_stage_two_nothing_but_the_hard_facts_is_asked_for() -> None:
    writer = Recorder()
    assert set(pairs_of(KnowTuningConfig(aspects=()), known([1.0] * 5), writer)) == {FINE_GRAINED}
    assert writer.asked == [f"q/{FINE_GRAINED}"]


def test_a_single_fact_can_be_wrong_but_neither_incomplete_nor_disordered() -> None:
    assert set(pairs_of(KnowTuningConfig(augment=False), known([1.0]))) == {"factuality"}


def test_an_answer_without_facts_makes_no_comparison() -> None:
    made = augment([KnownFacts("q", QUESTION, "x", [], [])], KnowTuningConfig(augment=False), LifeWriter(WORLD, 0), 0)
    assert made.pairs == []
    assert made.refusals == []


def test_pairs_depend_on_seed_and_question_id_and_not_on_what_else_is_in_the_batch() -> None:
    answers = [known([1.0] * 5, f"q{index}") for index in range(6)]
    writer = LifeWriter(WORLD, 0)
    together = augment(answers, KnowTuningConfig(), writer, 1).pairs
    apart = [pair for answer in reversed(answers) for pair in augment([answer], KnowTuningConfig(), writer, 1).pairs]
    assert sorted(together) == sorted(apart)
    assert len({pair.worse for pair in together if pair.part == "logicality"}) > 1


def test_what_is_no_life_is_refused_with_a_reason() -> None:
    facts, reasons = extract_facts({"good": (QUESTION, LIFE), "bad": (QUESTION, "forty-two")}, LifeWriter(WORLD, 0))
    assert facts == {"good": sentences(LIFE)}
    assert reasons == {"bad": "not a life"}


class Recorder(LifeWriter):
    """Notes what it is asked, and refuses some tasks."""

    def __init__(self, refuse: tuple[str, ...] = (), unasked: tuple[str, ...] = ()) -> None:
        super().__init__(WORLD, 0)
        self.asked: list[str] = []
        self.refuse = refuse
        self.unasked = unasked

    def write(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        self.asked += list(tasks)
        written = {name: made for name, made in super().write(tasks).items() if not name.endswith(self.unasked or "?")}
        return {name: Refused("no") if name.endswith(self.refuse or "?") else made for name, made in written.items()}


def test_a_refused_part_is_told_and_the_others_are_made() -> None:
    made = augment([known([1.0] * 5)], KnowTuningConfig(), Recorder(refuse=("/completeness", "/revise")), 0)
    assert {pair.part for pair in made.pairs} == {FINE_GRAINED, "logicality"}
    assert sorted(made.refusals) == [("q", "completeness", "no"), ("q", "factuality", "no")]


def test_what_was_not_asked_to_the_end_is_not_refused() -> None:
    made = augment([known([1.0] * 5)], KnowTuningConfig(), Recorder(unasked=("/logicality",)), 0)
    assert {pair.part for pair in made.pairs} == {FINE_GRAINED, "completeness", "factuality"}
    assert made.refusals == []


# --- a teacher -------------------------------------------------------------------------------------------------------


def test_every_task_is_a_prompt_of_its_own_with_a_schema() -> None:
    facts = ["One.", "Two."]
    tasks = [Extract("Q?", "A."), Rewrite("Q?", facts), Revise("Q?", facts), Rephrase("Q?", facts)]
    prompts = [task_prompt(task) for task in tasks]
    assert [prompt.answer for prompt in prompts] == [AtomicFacts, QuestionAndAnswer, AtomicFacts, LongAnswer]
    assert len({prompt.sha256() for prompt in prompts}) == 4
    assert all("1. One.\n2. Two." in prompt.messages[0]["content"] for prompt in prompts[1:])


def test_facts_that_an_extraction_repeats_count_once() -> None:
    assert task_result(Extract("Q?", "A."), AtomicFacts(facts=[" One. ", "Two.", "One."])) == ["One.", "Two."]


def test_a_revision_of_another_length_is_refused() -> None:
    assert task_result(Revise("Q?", ["a", "b"]), AtomicFacts(facts=["c"])) == Refused("1 revised facts for 2")


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (AtomicFacts, {"facts": []}),
        (AtomicFacts, {"facts": ["a", " "]}),
        (QuestionAndAnswer, {"question": "", "answer": "b"}),
        (LongAnswer, {"answer": "\n"}),
    ],
)
def test_a_reply_that_says_nothing_is_malformed(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no "):
        model(**fields)


def test_a_teacher_is_asked_task_by_task_and_its_refusals_are_kept() -> None:
    def ask(prompts: Mapping[str, Any]) -> TeacherRun:
        good = SampleResult(LongAnswer(answer=" fine "), None, 9, 3, 0.5, 1, None)
        bad = good._replace(parsed=None, refusal="cut off at max_tokens")
        return TeacherRun({"a": TeacherResult([good], "x"), "b": TeacherResult([bad], "y")}, "money", 2)

    writer = TeacherWriter(TeacherConfig(model="m"), ask)
    tasks = {name: Rephrase("Q?", [name]) for name in "abc"}
    assert writer.write(tasks) == {"a": "fine", "b": Refused("cut off at max_tokens")}
    assert writer.stopped == "money"


# --- lives -----------------------------------------------------------------------------------------------------------


def test_a_life_is_five_sentences_that_can_be_read_back() -> None:
    assert tell([Statement(*found) for found in map(_parsed, sentences(LIFE))]) == LIFE
    assert len(sentences(LIFE)) == 5


def _parsed(sentence: str) -> Statement:
    from ka2l.testbed.lives import parse_statement

    found = parse_statement(sentence)
    assert found is not None
    return found


def test_grading_counts_what_is_true_untrue_repeated_unreadable_and_missing() -> None:
    birth, trade, *_ = sentences(LIFE)
    grade = grade_life(f"{trade} {birth} {birth} Nothing of the kind. And so on", LIFE)
    assert grade == (2, 3, 3, 0.0)
    assert grade_life("", LIFE) == (0, 0, 5, None)
    assert grade_life(LIFE, LIFE) == (5, 0, 0, 1.0)


def test_strangers_are_never_shown_partly_known_people_in_part_and_well_known_ones_whole() -> None:
    facts = build_world(TestbedConfig(lives=True, num_people=60, num_seed_people=10, num_steps=40)).facts
    num_told: dict[str, list[int]] = {"stranger": [], "partly": [], "well": []}
    for fact in facts:
        num_told[fact.exposure_group].append(len(sentences(fact.shown or "")) if fact.num_exposures else 0)
    assert set(num_told["stranger"]) == {0}
    assert set(num_told["well"]) == {5}
    assert len(set(num_told["partly"])) > 2


def test_what_is_shown_of_a_person_is_true_and_of_some_in_a_wrong_order() -> None:
    grades = [grade_life(fact.shown, fact.answers[0]) for fact in build_world(WORLD).facts if fact.shown]
    assert all(grade.num_incorrect == 0 for grade in grades)
    in_order = [grade.order == 1.0 for grade in grades if grade.order is not None]
    assert 0 < sum(in_order) < len(in_order)
