"""The active-learning loop. Start reading here.

A round asks one model state, the base model with the adapter tuned so far, what it knows; asks the annotator for what
it does not know; and learns from the answers. The stages of each part stand in ``engine/stages/__init__.py``, in their
order: ``KNOW``, ``ASK``, ``LEARN``. A last observation measures the final state.

Every stage commits a table and is skipped when it is already there, so running a finished run again does nothing and
running a killed one goes on where it stopped. Where the cap on hours is near, a stage that would not fit ends the run
(ka2l.errors.HoursUsedUp), at a point where its last state is measured.
"""

from __future__ import annotations

from engine import stages
from engine.execution.campaign import Campaign
from engine.report.build import write_report
from engine.stages.fitting import check_tables
from engine.stages.kind import StageKind
from engine.stages.pool import check_budget
from engine.stopping import enough, money_reason, nothing_learnt, used_up
from engine.store.ledger import write_ledger


def run(campaign: Campaign) -> None:
    """Run all rounds that are not committed yet, and write the report after each."""
    check_tables(campaign)
    for stage in stages.POOL:
        stage(campaign)
    check_budget(campaign)
    round_index, reason = 0, None
    while reason is None and round_index < campaign.config.rounds:
        reason = run_round(campaign, round_index)
        if reason is None:
            publish(campaign, "running")
            round_index += 1
        else:
            campaign.events.say(reason)
    for stage in stages.KNOW:
        if stage.closes:
            stage(campaign, round_index)
    if reason is None and round_index:
        reason = money_reason(campaign, round_index - 1)
    publish(campaign, "complete", reason)


def run_round(campaign: Campaign, round_index: int) -> str | None:
    """Run one round; returns why the run ends with the state that it began with, None where it has made another."""
    for part in (stages.KNOW, stages.ASK, stages.LEARN):
        reason = stop_reason(campaign, part, round_index)
        if reason is not None:
            return reason
        for stage in part:
            stage(campaign, round_index)
    return None


def stop_reason(campaign: Campaign, part: tuple[StageKind, ...], round_index: int) -> str | None:
    """Why the run ends before this part of the round, in a sentence; None where it goes on."""
    if part is stages.KNOW:
        return used_up(campaign, round_index)
    if part is stages.ASK:
        return enough(campaign, round_index)
    return nothing_learnt(campaign, round_index)


def probe(campaign: Campaign) -> None:
    """Only map what the model knows of the pool: the first round up to the knowledge table."""
    stages.pool(campaign)
    for stage in stages.KNOW:
        stage(campaign, 0)
    publish(campaign, "complete")


def publish(campaign: Campaign, status: str, reason: str | None = None) -> None:
    """Bring ledger, summary and report up to date with what is committed."""
    write_ledger(campaign.run)
    content = write_report(campaign.run, status, reason)
    if status != "paused":  # then its last round goes on
        campaign.trackers.log_rounds(content["rounds"])
