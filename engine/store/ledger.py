"""The ledger: what was spent, by quantity, stage and annotator, and each answer bought.

| item | unit |
|---|---|
| `seconds` | wall-clock seconds of all attempts at the stage |
| `cpu_seconds`, `gpu_seconds` | CPUs and GPUs reserved x seconds that workers held them (engine.execution.meter) |
| `tokens_prompt`, `tokens_generated` | tokens read and written: in `annotate` by the teacher, else by the model |
| `tokens_trained` | tokens that were trained on, each time that they were |
| `forward_passes` | prompts that the model under study has read |
| `annotations`, `reveal` | answers bought: how many, and which, one row each |
| `money` | in the currency of the teacher's price table |
| others | what a stage counts for itself, such as `num_rejected` |

Rows of an item add up to all that was spent on it: the money of a stage stands in the rows of the answers bought and in
one row of the rest, which is what refused questions cost.

Derived from manifests, annotation tables and the notes of unfinished stages alone, so it is right after any crash and
never counts a thing twice. What a killed process had not written yet is missing: a few seconds of time, and tokens of
unfinished shards. A teacher's money never is: its journal holds every answer before it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from engine.stages import pool_folders, round_folders
from engine.store.manifest import add_up
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.schemas import LEDGER


def committed_stages(run: RunDirectory) -> Iterator[Stage]:
    """Every committed stage of a run, in the order of the loop."""
    return (stage for stage in _stages(run) if stage.manifest() is not None)


def begun_stages(run: RunDirectory) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Stages that were begun and are not committed, each with its plan."""
    return ((stage, plan) for stage in _stages(run) if (plan := stage.plan()) is not None)


def _stages(run: RunDirectory) -> Iterator[Stage]:
    for name in pool_folders():
        yield run.stage(name)
    for round_index in range(run.num_rounds_begun()):
        for name in round_folders():
            yield run.stage(name, round_index)


def worked_seconds(run: RunDirectory) -> float:
    """Wall-clock seconds of all stages so far, unfinished ones included."""
    begun = sum(plan.get("spent", {}).get("seconds", 0.0) for _, plan in begun_stages(run))
    return begun + sum(stage.require().seconds for stage in committed_stages(run))


def ledger_table(run: RunDirectory) -> pa.Table:
    """The ledger of what a run has spent so far (schemas.LEDGER)."""
    rows: list[dict[str, Any]] = []
    for stage in committed_stages(run):
        manifest = stage.require()
        rows += _rows(stage, manifest.cost | {"seconds": manifest.seconds}, manifest.config, stage.shard_names())
    for stage, plan in begun_stages(run):
        shards = stage.begun_shards()
        rows += _rows(stage, add_up(shards.values()) | plan.get("spent", {}), plan["config"], list(shards))
    return pa.Table.from_pylist(rows, schema=LEDGER)


def _rows(
    stage: Stage, cost: Mapping[str, float], config: Mapping[str, Any], shards: list[str]
) -> Iterator[dict[str, Any]]:
    where = {"round": -1 if stage.round_index is None else stage.round_index, "stage": stage.name}
    if stage.name == "annotate":
        yield from (where | row for row in _annotation_rows(stage, dict(cost), config, shards))
    else:
        yield from (where | {"item": item, "quantity": float(quantity)} for item, quantity in cost.items())


def _annotation_rows(
    stage: Stage, cost: dict[str, float], config: Mapping[str, Any], shards: list[str]
) -> Iterator[dict[str, Any]]:
    """Every answer with its annotator and its money; by annotator how many; what is left of the stage's cost is the
    teacher's, if there is one."""
    teacher = config.get("teacher")
    asked = teacher["model"] if config.get("kind") in ("teacher", "local_teacher") and teacher else None
    annotated: Counter[str] = Counter()
    for name in shards:
        for row in read_shard(stage.url, name, ["question_id", "annotator", "cost"]).to_pylist():
            of_row = {"question_id": row["question_id"], "annotator": row["annotator"]}
            annotated[row["annotator"]] += 1
            yield of_row | {"item": "reveal", "quantity": 1.0}
            if row["cost"]:
                cost["money"] -= row["cost"]
                yield of_row | {"item": "money", "quantity": row["cost"]}
    cost.pop("annotations", None)
    for annotator, count in annotated.items():
        yield {"item": "annotations", "quantity": float(count), "annotator": annotator}
    if abs(cost.get("money", 0.0)) < 1e-9:
        cost["money"] = 0.0  # nothing left but rounding
    if asked and len(annotated) == 1:
        (asked,) = annotated  # a local teacher signs with its identity, too
    for item, quantity in cost.items():
        of_teacher = item in ("money", "tokens_prompt", "tokens_generated")
        if quantity or not of_teacher:
            yield {"item": item, "quantity": float(quantity), "annotator": asked if of_teacher else None}


def write_ledger(run: RunDirectory) -> None:
    """Write ``ledger.parquet``."""
    run.write_table("ledger.parquet", ledger_table(run))
