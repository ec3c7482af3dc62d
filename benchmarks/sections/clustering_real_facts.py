"""Calls of the equivalence that clustering answers about real facts needs."""

from __future__ import annotations

from typing import Any

from pages import Section
from sections.clustering import compared

TITLE = "Clustering against full pairwise comparison: real facts"
COMMAND = "python benchmarks/bench_clustering.py --world entity_questions"


def section(result: dict[str, Any]) -> Section:
    """The same of another world's answers."""
    return compared(result, explained=False)
