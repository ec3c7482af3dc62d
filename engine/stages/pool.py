"""Writes the pool as two tables: questions for every stage, references for annotator and grading alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.pool_reader import read_pool
from engine.stages.kind import Outcome, Work, declare
from engine.store.shards import shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.errors import BudgetError, PoolError
from ka2l.pool.sources import content_identity

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


@declare("rest", in_rounds=False, tables=("questions", "references"))
def pool(campaign: Campaign, round_index: int) -> Work:
    """Read, check and split the pool: ``questions`` for everybody, ``references`` for annotator and grading alone."""
    config = campaign.config.pool.model_copy(update={"path": campaign.pool_path})
    fields = campaign.config.pool.result_fields() | {
        "path": None,
        "source": _source_identity(campaign),
        "shard_rows": campaign.config.shard_rows,
    }
    questions = campaign.stage("questions")

    def read(references: Stage) -> Outcome:
        questions.remove()
        tables = read_pool(
            config,
            campaign.config.seed,
            write_quarantine=partial(campaign.run.write_tables, "quarantine.parquet"),
            shard_rows=campaign.config.shard_rows,
        )
        with campaign.events.progress("pool", tables.counts["usable"], "questions") as progress:
            for index, num_rows in tables.write_shards(partial(_write, questions.url, references.url)):
                campaign.note_shard(references, shard_name(index), num_rows, {})
                progress.advance(num_rows)
            if tables.counts["quarantined"]:
                progress.note = f"{tables.counts['quarantined']} quarantined, see quarantine.parquet"
        return tables.counts, {}

    return Work(fields, [], read)


def _write(questions_url: str, references_url: str, index: int, questions: pa.Table, references: pa.Table) -> None:
    write_shard(questions_url, shard_name(index), questions, {})
    write_shard(references_url, shard_name(index), references, {})


def _source_identity(campaign: Campaign) -> str:
    """What the pool's files hold, never where they lie. A pool that is committed outlives its source."""
    try:
        return content_identity(campaign.pool_path)
    except PoolError:
        committed = campaign.stage("questions").manifest()
        if committed is None:
            raise
        identity: str = committed.config["source"]
        return identity


def check_budget(campaign: Campaign) -> None:
    """Raise BudgetError where the run asks for more annotations than there are candidates."""
    candidates = campaign.stage("questions").require().metrics["candidate"]
    if campaign.config.annotation_cap > candidates:
        raise BudgetError(
            f"the budget of {campaign.config.annotation_cap} annotations ({campaign.config.rounds} rounds x "
            f"{campaign.config.selection.budget}) is larger than the pool's {candidates} candidates",
            hint="Lower rounds or selection.budget, or set budget.annotations.",
        )
