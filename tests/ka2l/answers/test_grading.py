"""Answers against accepted answers."""

from __future__ import annotations

from relations import Relation

from ka2l.answers.grading import Grade, grade_answers


def test_grades_ask_only_where_no_reference_matches_exactly() -> None:
    relation = Relation(lambda left, right: (left, right) == ("Roma", "Rome"))
    grades = grade_answers(
        ["q0", "q1", "q2", "q3", "q4"],
        ["The Rome.", "Roma", "Roma", "", "Rome"],
        [["Paris", "rome"], ["Paris", "Rome", ""], ["Paris"], ["Rome", ""], []],
        relation,
    )
    assert grades == [
        Grade(True, True, 1.0),
        Grade(True, False, 0.0),
        Grade(False, False, 0.0),
        Grade(False, False, 0.0),
        Grade(False, False, 0.0),
    ]
    assert relation.num_calls == 1
    assert relation.asked == [("q1", "Roma", "Paris"), ("q1", "Roma", "Rome"), ("q2", "Roma", "Paris")]


def test_an_answer_that_lists_accepted_answers_alone_is_correct() -> None:
    relation = Relation(lambda left, right: False)
    accepted = ["Joaquin Phoenix", "Reese Witherspoon", "Simon and Garfunkel"]
    answers = ["Reese Witherspoon and Joaquin Phoenix.", "Joaquin Phoenix, Tom Cruise", "Simon and Garfunkel", "and"]
    grades = grade_answers(["who"] * 4, answers, [accepted] * 4, relation)
    assert [(grade.correct, grade.exact_match) for grade in grades] == [
        (True, False),
        (False, False),
        (True, True),
        (False, False),
    ]


def test_nothing_to_grade_asks_nothing() -> None:
    relation = Relation(lambda left, right: True)
    assert grade_answers(["q"], [""], [["Rome"]], relation) == [Grade(False, False, 0.0)]
    assert relation.num_calls == 0
