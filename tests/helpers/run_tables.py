"""Whether one run came to the tables of another."""

from __future__ import annotations

from engine.store.ledger import committed_stages
from engine.store.run_directory import RunDirectory


def check_same_tables(run: RunDirectory, reference: RunDirectory) -> list[tuple[str, int | None]]:
    """Assert that all tables that a run has committed are those of another, but for when they were annotated, and by
    which batches. Returns names and rounds of its stages."""
    stages = [(stage.name, stage.round_index) for stage in committed_stages(run)]
    for name, index in stages:
        first, second = reference.stage(name, index), run.stage(name, index)
        assert bool(first.shard_names()) == bool(second.shard_names())
        if first.shard_names():
            columns = [column for column in first.table().column_names if column != "annotated_at"]
            assert first.table(columns).equals(second.table(columns)), f"{name} of round {index} differs"
    return stages
