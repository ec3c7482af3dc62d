"""Which of the selected questions new ones are decoded from."""

from __future__ import annotations

from engine.stages.decoding import unknown_parents


def test_what_was_selected_to_explore_is_no_parent() -> None:
    p_unknown = {"likely": 0.9, "explored": 0.1, "even": 0.5, "not selected": 0.99}
    assert unknown_parents(["likely", "explored", "even"], p_unknown) == ["likely", "even"]


def test_where_all_of_the_selected_look_known_all_are_parents() -> None:
    assert unknown_parents(["a", "b"], {"a": 0.2, "b": 0.4}) == ["a", "b"]
