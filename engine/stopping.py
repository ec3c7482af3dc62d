"""Decides whether a run goes on: its caps, and the rules of the section ``stopping``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


def used_up(campaign: Campaign, round_index: int) -> str | None:
    """Which cap leaves nothing for this round, in a sentence; None where none does."""
    if campaign.num_left(round_index) == 0:
        return f"The budget of {campaign.config.annotation_cap:,} annotations is used up."
    return money_reason(campaign, round_index - 1) if round_index else None


def enough(campaign: Campaign, round_index: int) -> str | None:
    """Which rule of ``stopping`` this round's state meets, in a sentence; None where none does. The base model is
    never enough."""
    rules = campaign.config.stopping
    if not round_index:
        return None
    metrics = campaign.stage("knowledge", round_index).require().metrics
    predicted = {name: metrics.get(f"predicted_{name}") for name in ("unknown", "wrong")}
    known = {name: share for name, share in predicted.items() if share is not None}
    # What was learnt wrongly is not unknown, but worth an annotation.
    if rules.unknown_share is not None and known and max(known.values()) < rules.unknown_share:
        name, share = max(known.items(), key=lambda item: item[1])
        return (
            f"{share:.1%} of the candidates left is predicted {name}, less than stopping.unknown_share = "
            f"{rules.unknown_share:g}."
        )
    then, now = (
        campaign.stage("cluster", index).require().metrics.get("accuracy") for index in (round_index - 1, round_index)
    )
    if rules.gain is None or then is None or now is None:
        return None
    if now - then < rules.gain:
        return (
            f"Round {round_index - 1} has raised accuracy by {now - then:+.3f}, less than stopping.gain = "
            f"{rules.gain:g}."
        )
    return None


def money_reason(campaign: Campaign, round_index: int) -> str | None:
    """That the cap on money ended a round's annotation early, in a sentence; None where it did not."""
    annotated = campaign.stage("annotate", round_index).require()
    if annotated.metrics.get("stopped") != "money":
        return None
    unasked = annotated.metrics["num_not_asked"]
    cap = campaign.config.budget.money
    return f"The budget of {cap:g} for annotation is used up; {unasked:,} selected questions were not asked."


def nothing_learnt(campaign: Campaign, round_index: int) -> str | None:
    """Why a round's annotation has brought no answer, in a sentence; None where it has brought one."""
    if campaign.num_annotated(round_index + 1) > campaign.num_annotated(round_index):
        return None
    return money_reason(campaign, round_index) or "The annotator refused every question of this round."
