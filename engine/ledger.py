"""What was spent: one row for each quantity of each stage, and one for each answer that was revealed.

Derived from the committed manifests and annotation tables alone, so it is right after any crash and never counts a
thing twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from engine.artifacts import RunDirectory, Stage
from ka2l.records import LEDGER

#: Stages in the order of the loop.
ROUND_STAGES = (
    "observe",
    "cluster",
    "label",
    "extract",
    "probe",
    "feedback",
    "knowledge",
    "select",
    "corpus_states",
    "decoder",
    "decode",
    "annotate",
    "tune",
)
POOL_STAGES = ("questions", "references", "corpus")


def committed_stages(run: RunDirectory) -> Iterator[Stage]:
    """Every committed stage of a run, in the order of the loop."""
    for name in POOL_STAGES:
        if (stage := run.stage(name)).manifest() is not None:
            yield stage
    for round_index in range(run.num_rounds_begun()):
        for name in ROUND_STAGES:
            if (stage := run.stage(name, round_index)).manifest() is not None:
                yield stage


def ledger_table(run: RunDirectory) -> pa.Table:
    """The ledger of what is committed (records.LEDGER)."""
    rows: list[dict[str, Any]] = []
    for stage in committed_stages(run):
        manifest = stage.require()
        where = {"round": -1 if stage.round_index is None else stage.round_index, "stage": stage.name}
        spent = {"seconds": manifest.seconds} | {k: v for k, v in manifest.cost.items() if k != "seconds"}
        rows += [where | {"item": item, "quantity": float(quantity)} for item, quantity in spent.items()]
        if stage.name == "annotate":
            for question_id in stage.table(["question_id"])["question_id"].to_pylist():
                rows.append(where | {"item": "reveal", "quantity": 1.0, "question_id": question_id})
    return pa.Table.from_pylist(rows, schema=LEDGER)


def write_ledger(run: RunDirectory) -> None:
    """Write ``ledger.parquet``."""
    run.write_table("ledger.parquet", ledger_table(run))
