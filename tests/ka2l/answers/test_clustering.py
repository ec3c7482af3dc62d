"""Clusters of answers: those of the plain greedy algorithm, and no comparison more than they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from relations import Relation

from ka2l.answers.clustering import ClusterResult, cluster_answers
from ka2l.answers.normalise import surface_key


class Plain(NamedTuple):
    """What the plain algorithm makes of one question's answers."""

    ids: list[int]
    num_pairs_full: int
    """Every answer against every representative before it."""
    num_pairs_needed: int
    """Distinct answers only, each up to the first representative that takes it."""


def greedy_clusters_reference(answers: Sequence[str], same: Callable[[str, str], bool]) -> Plain:
    """The plain algorithm on one question: every answer against every representative, nothing skipped."""
    first_spelling: dict[str, str] = {}
    for answer in answers:
        first_spelling.setdefault(surface_key(answer), answer)

    def equal(left: str, right: str) -> bool:
        key_left, key_right = surface_key(left), surface_key(right)
        if key_left == key_right or not key_left or not key_right:
            return key_left == key_right
        return same(first_spelling[key_left], first_spelling[key_right])

    representatives: list[str] = []
    ids: list[int] = []
    num_pairs = num_needed = 0
    for position, answer in enumerate(answers):
        matches = [equal(answer, representative) for representative in representatives]
        num_pairs += len(matches)
        if first_spelling[surface_key(answer)] == answer and answer not in answers[:position] and surface_key(answer):
            up_to_first = representatives[: matches.index(True) + 1] if any(matches) else representatives
            num_needed += sum(surface_key(representative) != "" for representative in up_to_first)
        if any(matches):
            ids.append(matches.index(True))
        else:
            ids.append(len(representatives))
            representatives.append(answer)
    return Plain(ids, num_pairs, num_needed)


_SPELLINGS = ["a", "A", "a.", "b", "B", "c", "d", " d ", "e", "f", "", "..."]


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.sampled_from(_SPELLINGS), max_size=12), max_size=4),
    st.sets(st.tuples(st.sampled_from(_SPELLINGS), st.sampled_from(_SPELLINGS))),
)
def test_clusters_equal_the_plain_algorithm_for_any_relation(
    answers: list[list[str]], related: set[tuple[str, str]]
) -> None:
    # The relation is arbitrary: neither reflexive, symmetric nor transitive.
    relation = Relation(lambda left, right: (left, right) in related)
    result = cluster_answers([f"q{i}" for i in range(len(answers))], answers, relation)
    plain = [greedy_clusters_reference(row, relation.same) for row in answers]
    assert result.ids == [made.ids for made in plain]
    assert result.num_pairs_full == sum(made.num_pairs_full for made in plain)
    assert result.num_pairs_asked == len(relation.asked) == sum(made.num_pairs_needed for made in plain)
    assert len(set(relation.asked)) == len(relation.asked)
    assert relation.num_calls <= max((len(set(made.ids)) for made in plain), default=0)
    assert all(surface_key(left) and surface_key(right) for _, left, right in relation.asked)


def test_an_answer_that_a_cluster_took_is_not_compared_with_later_representatives() -> None:
    relation = Relation(lambda left, right: left[0] == right[0])
    result = cluster_answers(["q0", "q1"], [["ax", "b", "ay", "Ax", "c"], ["c", "cz"]], relation)
    assert result == ClusterResult([[0, 1, 0, 0, 2], [0, 0]], num_pairs_asked=5, num_pairs_full=8)
    # Pairs of all questions together, the representative on the right.
    assert relation.asked == [
        ("q0", "b", "ax"),
        ("q0", "ay", "ax"),
        ("q0", "c", "ax"),
        ("q1", "cz", "c"),
        ("q0", "c", "b"),
    ]
    assert relation.num_calls == 2


def test_nothing_to_cluster_asks_nothing() -> None:
    relation = Relation(lambda left, right: True)
    assert cluster_answers([], [], relation) == ClusterResult([], 0, 0)
    assert cluster_answers(["q"], [[]], relation).ids == [[]]
    assert cluster_answers(["q"], [["", "a", ".", "A"]], relation).ids == [[0, 1, 0, 1]]
    assert relation.num_calls == 0
