"""Helpers that read committed tables as ids, grades and states, and write new ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.knowledge.probe import Probe, load_probe
from ka2l.schemas import DECODED, stored_layers, stored_next_token, stored_states

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign


def adapter_input(campaign: Campaign, round_index: int) -> list[Stage]:
    return [campaign.adapter_stage(round_index - 1)] if round_index else []


def num_rows(stage: Stage) -> int:
    names = stage.finished_shards()
    return sum(pq.read_metadata(f"{stage.path}/{name}", filesystem=stage.run.fs).num_rows for name in names)


def make_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of exactly this schema."""
    arrays = [
        column.cast(field.type) if isinstance(column, pa.ChunkedArray | pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in schema)
    ]
    return pa.table(arrays, schema=schema)


def by_id(table: pa.Table, column: str) -> dict[str, Any]:
    """The column's value of each question."""
    return dict(zip(table["question_id"].to_pylist(), table[column].to_pylist(), strict=True))


def among(ids: Iterable[str]) -> pc.Expression:
    """True of these questions."""
    return pc.field("question_id").isin(pa.array(list(ids), pa.string()))


def first_questions(questions: Stage, count: int) -> list[str]:
    """The questions with the lowest ids."""
    first: list[pa.Table] = []
    for name in questions.shard_names():
        rows = pa.concat_tables([*first, read_shard(questions.url, name, ["question_id", "question"])])
        first = [rows.take(pc.select_k_unstable(rows, count, [("question_id", "ascending")]))]
    return first[0]["question"].to_pylist()


def eval_grades(campaign: Campaign, round_index: int) -> dict[str, bool]:
    """Whether each eval question was answered right in a round."""
    graded = campaign.stage("cluster", round_index)
    return by_id(graded.table(["question_id", "correct"], pc.field("purpose") == "eval"), "correct")


def facts_asked(campaign: Campaign, ids: Iterable[str]) -> tuple[dict[str, str | None], dict[str, str]]:
    """The fact that each of these questions asks for, None where it names none; and of the pool's candidates those that
    ask for one of them, with the fact."""
    questions = campaign.stage("questions")
    fact_of = by_id(questions.table(["question_id", "fact"], among(ids)), "fact")
    facts = pa.array(sorted({fact for fact in fact_of.values() if fact is not None}), pa.string())
    asks_one = (pc.field("split") == "candidate") & pc.field("fact").isin(facts)
    return fact_of, by_id(questions.table(["question_id", "fact"], asks_one), "fact")


def asked_ids(campaign: Campaign, round_index: int) -> list[str]:
    """Questions that a round asks the annotator for: as many of the selected as the decoded ones leave room for, the
    best first, and these."""
    chosen = campaign.stage("select", round_index).table(["question_id", "rank"]).sort_by("rank")
    decoded = kept_questions(campaign, round_index)["question_id"].to_pylist()
    return [*chosen["question_id"].to_pylist()[: chosen.num_rows - len(decoded)], *decoded]


def kept_questions(campaign: Campaign, round_index: int) -> pa.Table:
    """The round's decoded questions that passed all gates and are annotated (schemas.DECODED); empty without a
    decoder."""
    if campaign.config.decoder.kind == "none":
        return DECODED.empty_table()
    table = campaign.stage("decode", round_index).table()
    return table.filter(pc.equal(table["gate"], "kept"))


def load_stage_probe(campaign: Campaign, probed: Stage) -> Probe:
    """The probe that a stage has committed."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("probe.json", "probe.safetensors"):
            (Path(folder) / name).write_bytes(campaign.run.read_bytes(f"{probed.path}/{name}") or b"")
        return load_probe(folder)


def annotated_ids(campaign: Campaign, before_round: int) -> list[str]:
    ids: list[str] = []
    for index in range(before_round):
        ids += campaign.stage("annotate", index).table(["question_id"])["question_id"].to_pylist()
    return ids


class Read(NamedTuple):
    """Results of the forward passes of some questions."""

    ids: list[str]
    states: np.ndarray
    """Shape (num_questions, num_layers, width), with ``num_layers`` 1 where one layer was asked for."""
    next_token: np.ndarray | None
    """Certainty of the first answer token, shape (num_questions, 3); None where it was not read."""


def states_of(extracted: Stage, wanted: Sequence[str], layer: int | None = None) -> Read:
    """What is known of the wanted questions that have states, sorted by id: of all layers, or of one."""
    ids: list[str] = []
    states: list[np.ndarray] = []
    next_token: list[np.ndarray | None] = []
    layers, values = layers_of(extracted), pa.array(wanted, pa.string())
    kept = slice(None) if layer is None else [layers.index(layer)]
    names = extracted.shard_names()
    for name in names:
        is_wanted = pc.is_in(read_shard(extracted.url, name, ["question_id"])["question_id"], values)
        # States are most of what a run holds: of a shard without any of the questions they stay unread.
        if (name == names[-1] and not states) or pc.any(is_wanted).as_py():
            table = read_shard(extracted.url, name).filter(is_wanted)
            ids += table["question_id"].to_pylist()
            states.append(stored_states(table, len(layers))[:, kept])
            next_token.append(stored_next_token(table))
    order = np.argsort(ids)  # whatever the number of shards, the same rows in the same order
    certainty = [rows for rows in next_token if rows is not None]
    return Read(
        [ids[index] for index in order],
        np.concatenate(states)[order],
        np.concatenate(certainty)[order] if certainty else None,
    )


def each_states(extracted: Stage, layer: int) -> Iterator[np.ndarray]:
    """States of one layer, shard by shard, shape (num_rows, width)."""
    layers = layers_of(extracted)
    for name in extracted.shard_names():
        yield stored_states(read_shard(extracted.url, name), len(layers))[:, layers.index(layer)]


def layers_of(extracted: Stage) -> list[int]:
    """Layers that a stage's states hold. Reads the stage's manifest: to be asked once, not for every shard."""
    path = f"{extracted.path}/{extracted.shard_names()[0]}"
    return stored_layers(pq.read_schema(path, filesystem=extracted.run.fs))
