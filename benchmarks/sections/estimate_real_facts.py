"""What `ka2l estimate` predicts of a campaign on real facts."""

from __future__ import annotations

from typing import Any

from pages import Section
from sections.estimate import compared

TITLE = "Estimates: a campaign on real facts"
COMMAND = (
    "python benchmarks/bench_estimate.py quickstart --question estimate_real_facts --set decoder.kind=none "
    "--set testbed.outside_share=0 --set extraction.layers=all --set extraction.position=last_token "
    "--set annotator.reference_table=null --set testbed.facts=facts.jsonl --set selection.budget=250 --set "
    "name=real-facts"
)


def section(result: dict[str, Any]) -> Section:
    """Predicted against measured."""
    return compared(result, "a campaign on real facts")
