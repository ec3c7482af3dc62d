"""People's answers become annotations; what cannot be used is said, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from ka2l.annotation.people import HumanAnswer, Place, Task, krippendorff_alpha, merge
from ka2l.answers.equivalence import LexicalEquivalence

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def task(question_id: str, question: str = "What is it?") -> Task:
    return Task(question_id, question, [("own", 3)], 0.7, 1.1)


def said(question_id: str, *answers: str, by: str = "anna", minute: int = 0, skipped: bool = False) -> HumanAnswer:
    return HumanAnswer(question_id, list(answers), by, NOON + timedelta(minutes=minute), skipped)


class CountingEquivalence(LexicalEquivalence):
    num_calls = 0

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        self.num_calls += 1
        return super().equivalent(questions, left, right)


def test_one_persons_answers_become_annotations_in_the_order_of_the_tasks() -> None:
    merged = merge([task("a"), task("b")], [said("b", "5 km"), said("a", "Paris", "Paname")], LexicalEquivalence())
    assert [(a.question_id, a.answers) for a in merged.annotations] == [("a", ["Paris", "Paname"]), ("b", ["5 km"])]
    first = merged.annotations[0]
    assert (first.question, first.annotator, first.cost, first.prompt_sha256) == ("What is it?", "anna", 0.0, None)
    assert first.annotated_at == NOON
    assert merged.agreement.share is None
    assert not merged.problems + merged.conflicts
    assert not merged.missing + merged.skipped


def test_bad_rows_are_returned_with_their_place_and_reason_and_the_rest_is_used() -> None:
    rows = [said("nobody", "x"), said("a", " . "), said("a"), said("b", "Rome")]
    places = [Place("answers.csv", line) for line in (2, 3, 5, 8)]
    merged = merge([task("a"), task("b")], rows, LexicalEquivalence(), places)
    assert [(p.place.line, p.question_id, p.reason.split(":")[0]) for p in merged.problems] == [
        (2, "nobody", "unknown question_id"),
        (3, "a", "empty answer"),
        (5, "a", "empty answer"),
    ]
    assert [a.question_id for a in merged.annotations] == ["b"]
    assert merged.missing == ["a"]


def test_of_one_persons_rows_the_latest_counts_and_the_earlier_is_reported() -> None:
    rows = [said("a", "new", minute=5), said("a", "old"), said("b", "x"), said("b", "x")]
    merged = merge([task("a"), task("b")], rows, LexicalEquivalence())
    assert [a.answers for a in merged.annotations] == [["new"], ["x"]]
    assert [(p.place.line, p.reason) for p in merged.problems] == [
        (2, "replaced by what anna says in line 1"),
        (3, "duplicate of what anna says in line 4"),
    ]


def test_people_who_mean_the_same_are_one_annotation_with_all_answers_and_names() -> None:
    rows = [said("a", "NYC", "New York", by="ben", minute=3), said("a", "new york", by="anna")]
    merged = merge([task("a", "Which city?")], rows, LexicalEquivalence())
    (annotation,) = merged.annotations
    assert annotation.answers == ["new york", "NYC"]
    assert annotation.annotator == "anna, ben"
    assert annotation.annotated_at == NOON + timedelta(minutes=3)
    assert merged.agreement.share == 1.0


def test_people_who_do_not_mean_the_same_are_a_conflict_and_left_out() -> None:
    rows = [said("a", "Paris"), said("a", "Rome", by="ben"), said("a", "Paris", by="cleo"), said("b", "x")]
    merged = merge([task("a"), task("b")], rows, LexicalEquivalence())
    assert [a.question_id for a in merged.annotations] == ["b"]
    (conflict,) = merged.conflicts
    assert [row.annotator for row in conflict.answers] == ["anna", "ben", "cleo"]
    assert (merged.agreement.num_questions, merged.agreement.num_pairs) == (1, 3)
    assert merged.agreement.share == pytest.approx(1 / 3)
    assert not merged.missing


def test_a_question_is_skipped_only_where_nobody_answers_it() -> None:
    rows = [said("a", skipped=True), said("b", skipped=True), said("b", "x", by="ben")]
    merged = merge([task("a"), task("b")], rows, LexicalEquivalence())
    assert merged.skipped == ["a"]
    assert [a.annotator for a in merged.annotations] == ["ben"]
    assert not merged.conflicts


def test_the_equivalence_is_asked_once_for_all_questions() -> None:
    equivalence = CountingEquivalence()
    tasks = [task(str(i)) for i in range(20)]
    rows = [said(str(i), f"thing {i}", by=name) for i in range(20) for name in ("anna", "ben")]
    assert len(merge(tasks, rows, equivalence).annotations) == 20
    assert equivalence.num_calls == 1


def test_agreement_on_yes_and_no_is_corrected_for_chance() -> None:
    tasks = [task(str(i)) for i in range(4)]
    first, second = ["yes", "yes", "yes", "no"], ["yes", "yes", "no", "yes"]
    rows = [said(str(i), text) for i, text in enumerate(first)]
    rows += [said(str(i), text, by="ben") for i, text in enumerate(second)]
    agreement = merge(tasks, rows, LexicalEquivalence()).agreement
    assert agreement.share == 0.5
    # Eight values, six of them yes: D_o = 4 / 8, D_e = 2 * 6 * 2 / (8 * 7).
    assert agreement.alpha == pytest.approx(1 - (4 / 8) / (24 / 56))
    assert "50%" in str(agreement)
    assert "alpha" in str(agreement)


def test_krippendorffs_alpha_is_that_of_his_published_example() -> None:
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[i] for row in rows if row[i] != "."] for i in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=0.0005)


@pytest.mark.parametrize("units", [[], [["a"]], [["a", "a"], ["a", "a"]]])
def test_krippendorffs_alpha_is_undefined_without_variation(units: list[list[str]]) -> None:
    assert krippendorff_alpha(units) is None
