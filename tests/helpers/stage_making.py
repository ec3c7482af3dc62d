"""Commits a stage under its own name whose work is the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.execution.campaign import Campaign
from engine.stages import stage_kind
from engine.stages.kind import Outcome, Work
from engine.store.stage_folder import Stage


def commit_stage(
    campaign: Campaign,
    name: str,
    round_index: int | None,
    *,
    config: Mapping[str, Any],
    inputs: Sequence[Stage],
    work: Callable[[Stage], Outcome],
) -> None:
    kind = stage_kind(name)
    assert kind is not None
    planned = replace(kind, plan=lambda *_: Work(config, inputs, work), needed=lambda *_: True)
    campaign.make(planned, round_index)
