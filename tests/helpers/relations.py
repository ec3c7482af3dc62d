"""An equivalence that a test gives as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Relation:
    """An equivalence given by any function of two texts; counts what it is asked."""

    def __init__(self, same: Callable[[str, str], bool]) -> None:
        self.same = same
        self.asked: list[tuple[str, str, str]] = []
        self.num_calls = 0

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        self.num_calls += 1
        self.asked += zip(questions, left, right, strict=True)
        return [self.same(a, b) for a, b in zip(left, right, strict=True)]
