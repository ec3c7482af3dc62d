"""Decodes hidden states of unknown questions into new questions, and gates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors.decoder import decode_states, extract_states
from actors.workers.placement import Placement
from engine import build
from engine.annotation import annotators
from engine.stages.choosing import annotation_context, annotator_fields
from engine.stages.fitting import one_layer, pool_keys
from engine.stages.kind import Outcome, Room, Work, declare
from engine.stages.tables import among, by_id, each_states, kept_questions, load_stage_probe, make_table, states_of
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.decoder.gates import (
    GATES,
    NearestStates,
    Variant,
    diversity,
    first_of_text,
    is_well_formed,
    make_variants,
    needs_mark,
)
from ka2l.pool.rows import question_key
from ka2l.schemas import DECODED, stored_next_token, stored_states
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

_UNKNOWN = 0.5


class _Drafts:
    """Decoded questions on their way through the gates."""

    def __init__(self, variants: Sequence[Variant], questions: Sequence[str]) -> None:
        self.variants = variants
        self.questions = questions
        self.gate: list[str] = ["kept"] * len(questions)
        self.similarity: list[float | None] = [None] * len(questions)
        self.p_unknown: list[float | None] = [None] * len(questions)

    @property
    def left(self) -> np.ndarray:
        """Rows that have passed every gate so far."""
        return np.flatnonzero(np.array(self.gate) == "kept")

    def stop(self, rows: Collection[int], passed: np.ndarray, gate: str) -> None:
        """End the rows that did not pass at ``gate``."""
        for row, good in zip(rows, passed, strict=True):
            if not good:
                self.gate[row] = gate

    def table(self) -> pa.Table:
        return make_table(
            {
                "question_id": [decoded_id(question) for question in self.questions],
                "question": list(self.questions),
                "parents": [variant.parents for variant in self.variants],
                "variant": [variant.kind for variant in self.variants],
                "gate": self.gate,
                "similarity": self.similarity,
                "p_unknown": self.p_unknown,
            },
            DECODED,
        )


def decoded_id(question: str) -> str:
    """Id of a decoded question, from its normalised text."""
    return f"d-{question_key(question)}"


@declare(
    "decoding",
    room=lambda config: Room(config.decoder.cpus_per_worker, config.decoder.gpus_per_worker),
    needed=lambda config, round_index: config.decoder.kind != "none",
)
def decode(campaign: Campaign, round_index: int) -> Work:
    """Decode the unknown ones' states among the selected, and variants of them, into new questions; keep those that
    pass all gates.

    The gates, in this order: well-formed; not a question of the pool or decoded before, by text and by state; still
    unknown; answerable by the annotator.
    """
    config = campaign.config
    questions, extracted = campaign.stage("questions"), campaign.stage("extract", round_index)
    probed, chosen = campaign.stage("probe", round_index), campaign.stage("select", round_index)
    knowing = campaign.stage("knowledge", round_index)
    fitted = campaign.stage("decoder", round_index)
    earlier = [campaign.stage("decode", index) for index in range(round_index)]
    source = campaign.stage("decoder", int(fitted.require().metrics["fitted_round"]))

    def work(stage: Stage) -> Outcome:
        layer = int(probed.require().metrics["layer"])
        selected = chosen.table(["question_id", "rank"]).sort_by("rank")["question_id"].to_pylist()
        p_unknown = by_id(knowing.table(["question_id", "p_unknown"], among(selected)), "p_unknown")
        read = states_of(extracted, unknown_parents(selected, p_unknown), layer)
        seed = row_seed(config.seed, round_index, "decode", "")
        centre, spread = _moments(extracted, layer)
        noise = float(source.require().metrics["noise"])
        variants = make_variants(read.ids, read.states[:, 0], config.decoder, seed, spread=spread, noise=noise)
        drafts = _Drafts(variants, _decode(campaign, source.round_index, variants, seed, campaign.log_path(stage)))
        cost = _gate_drafts(campaign, round_index, drafts, layer, centre, campaign.log_path(stage))
        num_wanted = int(config.decoder.share * len(selected))
        kept = _best(drafts, num_wanted)
        drafts.stop(drafts.left, np.isin(drafts.left, kept), "surplus")
        table = drafts.table()
        order = np.array([*kept, *sorted(set(range(len(variants))) - set(kept))], dtype=int)
        write_shard(stage.url, shard_name(0), table.take(order), cost)
        said = campaign.events.say
        said(f"{stage.label:<22} {len(kept)} of {len(variants):,} decoded questions are kept")
        return _metrics(drafts), {}

    fields = {"decoder": config.decoder.result_fields(), "annotator": annotator_fields(campaign)}
    other = [source] if source.label != fitted.label else []
    return Work(fields, [questions, extracted, probed, knowing, chosen, fitted, *other, *earlier], work)


def unknown_parents(selected: Sequence[str], p_unknown: Mapping[str, float]) -> list[str]:
    """Of the selected questions those that look unknown, in their order; all where none does.

    What was selected to explore looks known, and so would most of what is decoded from it.
    """
    return [name for name in selected if p_unknown[name] >= _UNKNOWN] or list(selected)


def _decode(
    campaign: Campaign, fitted_round: int | None, variants: Sequence[Variant], seed: int, log: str
) -> list[str]:
    """One question a variant: sampled where the state is a question's own, else the likeliest."""
    config = campaign.config.decoder
    sampled = np.array([variant.kind == "sampled" for variant in variants], dtype=bool)
    with campaign.hold(1, config.cpus_per_worker, config.gpus_per_worker) as placement:
        return decode_states(
            folder=campaign.decoder_dir(fitted_round),
            model_path=campaign.model.source,
            states=np.stack([variant.state for variant in variants]),
            sampled=sampled,
            config=config,
            seed=seed,
            trust_remote_code=campaign.model.trust_remote_code,
            log_path=log,
            placement=placement,
            faults=campaign.config.faults,
        )


def _gate_drafts(
    campaign: Campaign, round_index: int, drafts: _Drafts, layer: int, centre: np.ndarray, log: str
) -> dict[str, float]:
    """Let drafts through the gates; returns what the forward pass took."""
    config = campaign.config
    questions, extracted = campaign.stage("questions"), campaign.stage("extract", round_index)
    first = read_shard(questions.url, questions.shard_names()[0], ["question"])["question"].to_pylist()
    marked = needs_mark(first)
    drafts.stop(
        drafts.left, np.array([is_well_formed(drafts.questions[i], marked=marked) for i in drafts.left]), "malformed"
    )

    before = [text for index in range(round_index) for text in kept_questions(campaign, index)["question"].to_pylist()]
    wanted = {question_key(drafts.questions[row]) for row in drafts.left}
    taken = {question_key(text) for text in before}
    taken |= {key for _, keys in pool_keys(questions) for key in keys if key in wanted}
    texts = [drafts.questions[row] for row in drafts.left]
    drafts.stop(drafts.left, first_of_text(texts, taken), "duplicate_text")

    rows = drafts.left
    if not len(rows):
        return {}
    texts = [drafts.questions[row] for row in rows]
    table, cost = _states(campaign, round_index, layer, [*texts, *before], log)
    have = {text: row for row, text in enumerate(table["question"].to_pylist())}
    drafts.stop(rows, np.array([text in have for text in texts]), "malformed")
    rows = drafts.left
    states = stored_states(table)[:, 0]
    places = [have[drafts.questions[row]] for row in rows]
    mine = states[places]
    near = NearestStates(mine, centre)
    for others in each_states(extracted, layer):
        near.add(others)
    near.add(states[[have[text] for text in before if text in have]])
    probe = load_stage_probe(campaign, campaign.stage("probe", round_index))
    p_unknown = probe.predict(mine, stored_next_token(table.take(places)))
    order = np.argsort(-p_unknown, kind="stable")
    new = np.zeros(len(rows), dtype=bool)
    new[order] = near.first_of_kind(order, config.decoder.max_similarity)
    for position, row in enumerate(rows):
        drafts.similarity[row] = float(near.similarity[position])
        drafts.p_unknown[row] = float(p_unknown[position])
    drafts.stop(rows, new, "duplicate_state")
    rows = drafts.left
    drafts.stop(rows, np.array([(drafts.p_unknown[row] or 0.0) >= _UNKNOWN for row in rows], dtype=bool), "known")

    rows = drafts.left
    annotator = annotators.annotator(config.annotator, annotation_context(campaign, round_index, {}, Placement(0)))
    asked = {decoded_id(drafts.questions[row]): drafts.questions[row] for row in rows}
    answerable = annotator.answerable(asked)
    drafts.stop(rows, np.array([name in answerable for name in asked], dtype=bool), "unanswerable")
    return cost


def _states(
    campaign: Campaign, round_index: int, layer: int, texts: Sequence[str], log: str
) -> tuple[pa.Table, dict[str, float]]:
    """States of some texts under this round's model state; texts that cannot be forwarded are left out."""
    config = campaign.config
    extraction = one_layer(config.extraction, layer)
    cpus, gpus = extraction.cpus_per_replica, extraction.gpus_per_replica
    state = campaign.state(round_index)
    make = partial(build.extractor_host, state.model, config.prompt, extraction, state.adapter)
    with campaign.hold(1, cpus, gpus) as placement:
        return extract_states(
            make,
            texts,
            cpus=cpus,
            gpus=gpus,
            log_path=log,
            placement=placement,
            faults=config.faults,
        )


def _moments(extracted: Stage, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the pool's states, both of shape (D,)."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for states in each_states(extracted, layer):
        scaler.partial_fit(states.astype(np.float64))
    return np.asarray(scaler.mean_), np.sqrt(np.asarray(scaler.var_))


def _best(drafts: _Drafts, num_wanted: int) -> list[int]:
    """Rows to annotate: one of each parent in turn, the likeliest unknown first."""
    rows = sorted(drafts.left.tolist(), key=lambda row: -(drafts.p_unknown[row] or 0.0))
    turn: Counter[str] = Counter()
    turns = []
    for row in rows:
        parent = drafts.variants[row].parents[0]
        turns.append((turn[parent], row))
        turn[parent] += 1
    return [row for _, row in sorted(turns, key=lambda item: item[0])][:num_wanted]


def _metrics(drafts: _Drafts) -> dict[str, Any]:
    """How many drafts ended where, by variant; the share that passed all gates; how different they are."""
    gates = Counter(drafts.gate)
    by_variant: dict[str, Counter[str]] = {}
    for variant, gate in zip(drafts.variants, drafts.gate, strict=True):
        by_variant.setdefault(variant.kind, Counter())[gate] += 1

    def passed(counts: Mapping[str, int]) -> float:
        return (counts.get("kept", 0) + counts.get("surplus", 0)) / max(1, sum(counts.values()))

    kept = [question for question, gate in zip(drafts.questions, drafts.gate, strict=True) if gate == "kept"]
    return {
        "num_drafts": len(drafts.gate),
        "num_kept": len(kept),
        "gates": {gate: gates.get(gate, 0) for gate in GATES},
        "by_variant": {
            kind: {gate: counts.get(gate, 0) for gate in GATES} | {"passed": passed(counts)}
            for kind, counts in by_variant.items()
        },
        "passed": passed(gates),
        **diversity(kept),
    }
