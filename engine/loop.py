"""The active-learning loop. Start reading here.

One round asks one model state, the base model with the adapter tuned so far:

    observe   sample answers                          -> what it says
    cluster   group them by meaning                   -> semantic entropy; accuracy on eval
    label     dynamic threshold                       -> known / unknown for the seed questions
    extract   one forward pass a question             -> hidden states
    probe     classifier on the seed questions' states
    feedback  how sure is the base model of its own samples, and was it right about what has been annotated?
    knowledge P(unknown) of every question            -> the knowledge map
    evaluate  facts, wording, calibration             -> figures beside accuracy; nothing depends on them
    perplexity one forward pass a candidate           -> how hard its wording is; for the strategy of that name alone
    select    query strategy                          -> what to ask the annotator
    decode    unknown states to new questions         -> gated; a share of the round's annotations goes to them
    annotate  answers for the selected questions      -> the only stage that costs annotation
    tune      LoRA on answers and on the model's own answers to the rest

With ``tuning.kind: knowtuning`` answers are taken apart before they are tuned on, and compared afterwards:

    facts      an answer's atomic facts
    difficulty perplexity of each under the current model
    augment    questions for the hardest; better and worse answers
    compare    DPO from the tuned adapter on

A last observation measures the final state. Every stage commits a table and is skipped when it is already there, so
running a finished run again does nothing and running a killed one goes on where it stopped. Where the cap on hours is
near, a stage that would not fit ends the run (ka2l.errors.HoursUsedUp), at a point where its last state is measured.
"""

from __future__ import annotations

from engine import stages
from engine.campaign import Campaign
from engine.ledger import write_ledger
from engine.report import write_report


def run(campaign: Campaign) -> None:
    """Run all rounds that are not committed yet, and write the report after each."""
    stages.check_tables(campaign)
    stages.pool(campaign)
    stages.check_budget(campaign)
    if campaign.config.decoder.kind != "none":
        stages.corpus(campaign)
    reason = None
    rounds = campaign.config.rounds
    for round_index in range(rounds):
        reason = campaign.used_up(round_index)
        if reason is not None:
            campaign.events.say(reason)
            rounds = round_index
            break
        probe_round(campaign, round_index)
        reason = campaign.enough(round_index)
        if reason is not None:
            campaign.events.say(reason)
            rounds = round_index
            break
        if campaign.config.selection.kind == "perplexity":
            stages.perplexity(campaign, round_index)
        stages.select(campaign, round_index)
        if campaign.config.decoder.kind != "none":
            stages.fit_decoder(campaign, round_index)
            stages.decode(campaign, round_index)
        stages.annotate(campaign, round_index)
        reason = campaign.money_reason(round_index)
        if campaign.num_annotated(round_index + 1) == campaign.num_annotated(round_index):
            campaign.events.say(reason or "The annotator refused every question of this round.")
            rounds = round_index
            break
        if campaign.config.tuning.augments:
            stages.facts(campaign, round_index)
            stages.difficulty(campaign, round_index)
            stages.augment(campaign, round_index)
        stages.tune(campaign, round_index)
        if campaign.config.tuning.compares:
            stages.compare(campaign, round_index)
        publish(campaign, "running")
    stages.observe(campaign, rounds)
    stages.cluster(campaign, rounds)
    if rounds > 0:
        stages.feedback(campaign, rounds)
    stages.evaluate(campaign, rounds)
    publish(campaign, "complete", reason)


def probe(campaign: Campaign) -> None:
    """Only map what the model knows of the pool: the first round up to the knowledge table."""
    stages.pool(campaign)
    probe_round(campaign, 0)
    publish(campaign, "complete")


def probe_round(campaign: Campaign, round_index: int) -> None:
    """Ask one model state what it knows."""
    stages.observe(campaign, round_index)
    stages.cluster(campaign, round_index)
    stages.label(campaign, round_index)
    stages.extract(campaign, round_index)
    stages.probe(campaign, round_index)
    if campaign.config.has_feedback(round_index):
        stages.feedback(campaign, round_index)
    stages.knowledge(campaign, round_index)
    stages.evaluate(campaign, round_index)


def publish(campaign: Campaign, status: str, reason: str | None = None) -> None:
    """Bring ledger, summary and report up to date with what is committed."""
    write_ledger(campaign.run)
    content = write_report(campaign.run, status, reason)
    if status != "paused":  # then its last round goes on
        campaign.trackers.log_rounds(content["rounds"])
