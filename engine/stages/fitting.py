"""Fits the decoder on its corpus, again whenever tuning has moved the hidden states too far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.decoder import PairSource, run_decoder_training
from engine import build
from engine.execution.jobs import ShardInput
from engine.execution.shard_run import run_host
from engine.stages.kind import Outcome, Room, Work, declare, replicas
from engine.stages.tables import adapter_input, by_id, load_stage_probe, states_of
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.evaluation.statistics import auroc
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.pool.rows import question_key
from ka2l.pool.sources import content_identity, find_pieces, read_piece
from ka2l.seeds import row_seed

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

_CORPUS = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("question_id", "question", "split")],
)


def check_tables(campaign: Campaign) -> None:
    """Raise PoolError or ConfigError where a file of the decoder or of its annotator cannot be used."""
    if campaign.config.decoder.kind == "none":
        return
    for path, columns in (
        (campaign.corpus_path(), ("question",)),
        (campaign.reference_table_path(), ("question", "answers")),
    ):
        if path is not None:
            find_pieces(path, columns)


@declare("decoding", in_rounds=False, needed=lambda config, round_index: config.decoder.kind != "none")
def corpus(campaign: Campaign, round_index: int) -> Work:
    """Read the questions that the decoder is trained on beside the candidates: none that the pool holds."""
    config, path = campaign.config.decoder, campaign.corpus_path()
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        in_pool = np.sort(np.concatenate([_as_numbers(keys) for _, keys in pool_keys(questions)]))
        taken: set[str] = set()
        rows: list[dict[str, str]] = []
        num_skipped = 0
        for question in _corpus_questions(path) if path else ():
            key = question_key(question)
            if len(rows) == config.num_corpus:
                break
            if not question.strip() or key in taken or _holds(in_pool, key):
                num_skipped += 1
                continue
            taken.add(key)
            rows.append({"question_id": f"c-{key}", "question": question.strip(), "split": "corpus"})
        size = campaign.config.shard_rows
        for index, start in enumerate(range(0, len(rows), size)):
            table = pa.Table.from_pylist(rows[start : start + size], schema=_CORPUS)
            write_shard(stage.url, shard_name(index), table, {})
        return {"num_questions": len(rows), "num_skipped": num_skipped}, {}

    fields = {
        "source": content_identity(path) if path else None,
        "num_corpus": config.num_corpus,
        "shard_rows": campaign.config.shard_rows,
    }
    return Work(fields, [questions], work)


def _corpus_questions(path: str) -> Iterator[str]:
    for piece in find_pieces(path, ("question",)):
        for _, row in read_piece(piece):
            if isinstance(row, Mapping) and isinstance(row.get("question"), str):
                yield row["question"]


def _as_numbers(keys: Sequence[str]) -> np.ndarray:
    """Keys as the 64-bit hashes that they are: all that is held of a pool's questions, 8 bytes each."""
    return np.array([int(key, 16) for key in keys], dtype=np.uint64)


def _holds(ordered: np.ndarray, key: str) -> bool:
    number = np.uint64(int(key, 16))
    place = int(np.searchsorted(ordered, number))
    return place < len(ordered) and bool(ordered[place] == number)


def pool_keys(questions: Stage) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and keys of the pool's questions, shard by shard."""
    for name in questions.shard_names():
        table = read_shard(questions.url, name, ["question_id", "question"])
        yield table["question_id"].to_pylist(), [question_key(text) for text in table["question"].to_pylist()]


# --- the decoder -----------------------------------------------------------------------------------------------------


class Drift(NamedTuple):
    """How far this round's states are from those that the last decoder was fitted on."""

    fitted_round: int | None
    """Round of the last fit; None before the first."""
    needs_fit: bool
    same_layer: bool
    mean_cosine: float | None
    auroc_drop: float | None


@declare(
    "decoding",
    room=lambda config: Room(config.decoder.cpus_per_worker, config.decoder.gpus_per_worker),
    needed=lambda config, round_index: config.decoder.kind != "none",
)
def decoder(campaign: Campaign, round_index: int) -> Work:
    """Fit a decoder to this round's states, or say that the last one still reads them."""
    config = campaign.config
    questions, corpus_, extracted = (
        campaign.stage("questions"),
        campaign.stage("corpus"),
        campaign.stage("extract", round_index),
    )
    probed = campaign.stage("probe", round_index)
    drift = measure_drift(campaign, round_index)
    earlier = [] if drift.fitted_round is None else [campaign.stage("decoder", drift.fitted_round)]
    sources = [PairSource(questions.url, extracted.url, questions.shard_names(), "candidate")]
    inputs = [questions, extracted, probed, corpus_, *earlier]
    layer = int(probed.require().metrics["layer"])
    if drift.needs_fit and corpus_.shard_names():
        states = campaign.stage("corpus_states", round_index)
        sources.append(PairSource(corpus_.url, states.url, corpus_.shard_names(), "corpus"))
        inputs.append(states)

    def work(stage: Stage) -> Outcome:
        if not drift.needs_fit:
            return drift._asdict() | {"fitted_round": drift.fitted_round}, {}
        gpus = config.decoder.gpus_per_worker
        previous = campaign.decoder_dir(drift.fitted_round) if earlier else None
        with (
            campaign.run.scratch() as scratch,
            campaign.events.progress(stage.label, 1, "steps") as progress,
            campaign.hold(1, config.decoder.cpus_per_worker, gpus, reserve=False),
        ):

            def on_progress(report: dict[str, Any]) -> None:
                progress.resize(report["num_steps"])
                progress.advance(report["step"] - progress.done, f"loss {report['loss']:.3f}")

            metrics = run_decoder_training(
                model_path=campaign.model.source,
                sources=sources,
                held_out=PairSource(questions.url, extracted.url, questions.shard_names(), "seed"),
                layer=layer,
                config=config.decoder,
                output_dir=str(scratch / "decoder"),
                seed=row_seed(config.seed, round_index, "decoder", ""),
                scratch_dir=str(scratch / "train"),
                previous=previous,
                trust_remote_code=campaign.model.trust_remote_code,
                log_path=campaign.log_path(stage),
                on_progress=on_progress,
                faults=config.faults,
                tags=campaign.tags(stage),
            )
            for file in sorted((scratch / "decoder").iterdir()):
                if file.is_file():
                    stage.write_file(f"decoder/{file.name}", file.read_bytes())
            progress.note = f"reads {metrics['exact_match']:.0%} of unseen questions word for word"
        tokens = float(metrics.pop("num_tokens"))
        return drift._asdict() | metrics | {"fitted_round": round_index, "layer": layer}, {"tokens_trained": tokens}

    fields = {
        "decoder": config.decoder.result_fields(),
        "extraction": config.extraction.result_fields(),
        "prompt": config.prompt.result_fields(),
    }
    return Work(fields, inputs, work)


def measure_drift(campaign: Campaign, round_index: int) -> Drift:
    """Compare the seed questions' states of now with those of the last fit, and its probe on both."""
    config = campaign.config.decoder
    if round_index == 0:
        return Drift(None, True, False, None, None)
    fitted_round = int(campaign.stage("decoder", round_index - 1).require().metrics["fitted_round"])
    probed = campaign.stage("probe", fitted_round)
    layer = int(probed.require().metrics["layer"])
    same_layer = layer == campaign.stage("probe", round_index).require().metrics["layer"]
    labels = campaign.stage("label", round_index).table()
    labels = labels.filter(pc.equal(labels["probe_split"], "test"))
    unknown = by_id(labels, "unknown")
    then = states_of(campaign.stage("extract", fitted_round), list(unknown), layer)
    now = states_of(campaign.stage("extract", round_index), list(unknown), layer)
    both = sorted(set(then.ids) & set(now.ids))
    now_rows = [now.ids.index(name) for name in both]
    left, right = then.states[[then.ids.index(name) for name in both], 0], now.states[now_rows, 0]
    centre = left.mean(axis=0)
    a, b = left - centre, right - centre
    cosine = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    probe = load_stage_probe(campaign, probed)
    truth = np.array([unknown[name] for name in both])
    drop = None
    if 0 < truth.sum() < len(truth):
        own = campaign.stage("probe", round_index).require().metrics["auroc"]
        certainty = None if now.next_token is None else now.next_token[now_rows]
        drop = None if own is None else float(own - auroc(truth, probe.predict_logit(right, certainty)))
    mean_cosine = float(cosine.mean())
    moved = mean_cosine < config.min_cosine or (drop or 0.0) > config.max_auroc_drop
    return Drift(fitted_round, moved or not same_layer, same_layer, mean_cosine, drop)


@declare(
    "decoding",
    room=lambda config: replicas(config.extraction),
    needed=lambda config, round_index: config.decoder.kind != "none",
)
def corpus_states(campaign: Campaign, round_index: int) -> Work | None:
    """States of the corpus under this round's model state, at the probe's layer alone; nothing where no decoder is to
    be fitted to them."""
    config = campaign.config
    corpus_ = campaign.stage("corpus")
    if not corpus_.shard_names() or not measure_drift(campaign, round_index).needs_fit:
        return None
    layer = int(campaign.stage("probe", round_index).require().metrics["layer"])
    # The decoder reads states alone, so the layers above need not run.
    extraction = one_layer(config.extraction, layer).model_copy(update={"next_token": False})
    state = campaign.state(round_index)

    def work(stage: Stage) -> Outcome:
        run_host(
            campaign,
            stage,
            partial(build.extractor_host, state.model, config.prompt, extraction, state.adapter),
            {"questions": ShardInput(corpus_.url)},
            replicas=extraction.replicas,
            cpus=extraction.cpus_per_replica,
            gpus=extraction.gpus_per_replica,
            over=corpus_,
        )
        return {}, {}

    fields = {"extraction": extraction.result_fields(), "prompt": config.prompt.result_fields()}
    return Work(fields, [corpus_, *adapter_input(campaign, round_index)], work)


def one_layer(config: ExtractionConfig, layer: int) -> ExtractionConfig:
    return config.model_copy(update={"layers": [layer]})
