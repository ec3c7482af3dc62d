"""Ray hosts of the decoder: its fit on Ray Train; decoding, and the forward pass of decoded questions, in tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.host import Host, Stats, set_num_threads
from actors.metrics import Tags
from actors.workers.faults import FaultsConfig
from actors.workers.placement import Placement
from actors.workers.ray_task import Workers, run_remote
from actors.workers.ray_train import run_loop
from ka2l.decoder.config import DecoderConfig
from ka2l.schemas import stored_layers, stored_states
from ka2l.seeds import row_seed

#: Questions of one source that a decoder is fitted on at most: their states are held by one worker.
MOST_PAIRS = 100_000


class PairSource(NamedTuple):
    """Where (state, question) pairs lie: the same shards of two tables."""

    questions_url: str
    states_url: str
    shards: list[str]
    split: str
    """Only questions of this split."""


def read_pairs(sources: Sequence[PairSource], layer: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """States of one layer, shape (N, D), and their questions, in the order of the shards.

    Of a source with more than MOST_PAIRS questions so many are drawn, by a hash of (seed, question id).
    """
    states, questions = [], []
    for source in sources:
        drawn = _drawn(source, seed)
        for name in source.shards:
            texts = pq.read_table(f"{source.questions_url}/{name}", columns=["question_id", "question", "split"])
            text_of = dict(zip(texts["question_id"].to_pylist(), texts["question"].to_pylist(), strict=True))
            table = pq.read_table(f"{source.states_url}/{name}", columns=["question_id", "split", "states"])
            layers = stored_layers(table.schema)
            table = table.filter(pc.equal(table["split"], source.split))
            if drawn is not None:
                table = table.filter(pc.is_in(table["question_id"], value_set=drawn))
            states.append(stored_states(table, len(layers))[:, layers.index(layer)].astype(np.float32))
            questions += [text_of[name] for name in table["question_id"].to_pylist()]
    return np.concatenate(states), questions


def _drawn(source: PairSource, seed: int) -> pa.Array | None:
    """Ids of the questions to read; None where a source holds few enough to read all."""
    ids = [
        pq.read_table(
            f"{source.states_url}/{name}", columns=["question_id"], filters=pc.field("split") == source.split
        )["question_id"]
        for name in source.shards
    ]
    if sum(map(len, ids)) <= MOST_PAIRS:
        return None
    draws = np.array([row_seed(seed, 0, "pairs", name) for part in ids for name in part.to_pylist()])
    last = np.partition(draws, MOST_PAIRS - 1)[MOST_PAIRS - 1]
    return pa.chunked_array(ids).filter(pa.array(draws <= last)).combine_chunks()


def run_decoder_training(
    *,
    model_path: str,
    sources: Sequence[PairSource],
    held_out: PairSource,
    layer: int,
    config: DecoderConfig,
    output_dir: str,
    seed: int,
    scratch_dir: str,
    previous: str | None,
    trust_remote_code: bool,
    log_path: str | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
    faults: FaultsConfig,
    tags: Tags | None = None,
) -> dict[str, Any]:
    """Train a decoder under Ray Train; blocks until it is written to ``output_dir``.

    Args:
        sources: pairs to train on.
        held_out: pairs that it is measured on.
        previous: folder of the decoder to go on from.
        scratch_dir: folder for Ray Train's own files; the caller removes it.
        on_progress: called in a thread of this process with what `train_decoder` reports.
        tags: of the worker's metrics.

    Returns:
        What `train_decoder` returns, the `fidelity` to held-out questions, and the ``noise`` of noised states.

    Raises:
        KA2LError: as a worker raised it.
        ResourcesBusyError: the cluster has no room for the worker.
        StageFailedError: anything else; carries the last lines of the log.
    """
    arguments = {
        "model_path": model_path,
        "sources": [tuple(source) for source in sources],
        "held_out": tuple(held_out),
        "layer": layer,
        "config": config.model_dump(),
        "output_dir": output_dir,
        "seed": seed,
        "previous": previous,
        "trust_remote_code": trust_remote_code,
    }
    workers = Workers("decoder", 1, config.cpus_per_worker, config.gpus_per_worker, faults, tags=tags)
    return run_loop(_train, arguments, workers, scratch_dir, log_path, on_progress)


def _train(arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from ka2l.decoder.training import calibrate_noise, fidelity, load_decoder, train_decoder

    config = DecoderConfig(**arguments["config"])
    set_num_threads(config.cpus_per_worker)
    sources = [PairSource(*source) for source in arguments["sources"]]
    states, questions = read_pairs(sources, arguments["layer"], arguments["seed"])
    same = {key: arguments[key] for key in ("output_dir", "seed", "previous", "trust_remote_code")}
    metrics = train_decoder(arguments["model_path"], states, questions, config, progress=report, **same)
    unseen, asked = read_pairs([PairSource(*arguments["held_out"])], arguments["layer"], arguments["seed"])
    decoder = load_decoder(
        arguments["output_dir"],
        arguments["model_path"],
        states.shape[1],
        config,
        trust_remote_code=arguments["trust_remote_code"],
    )
    decoded = decoder.decode(unseen, arguments["seed"])
    noise = calibrate_noise(decoder, unseen, decoded, arguments["seed"]) if config.noise is None else config.noise
    return metrics | fidelity(decoded, asked) | {"noise": noise}


def decode_states(
    *,
    folder: str,
    model_path: str,
    states: np.ndarray,
    sampled: np.ndarray,
    config: DecoderConfig,
    seed: int,
    trust_remote_code: bool,
    log_path: str | None,
    placement: Placement,
    faults: FaultsConfig,
) -> list[str]:
    """One question a state, shape (N, D), in a process of its own.

    Args:
        folder: of the decoder.
        sampled: which are sampled at ``config.temperature``, shape (N,); the others are decoded greedily.

    Raises:
        KA2LError: as the worker raised it.
        StageFailedError: the process died.
    """
    work = functools.partial(_decode, folder, model_path, states, sampled, config, seed, trust_remote_code)
    workers = Workers("decoder", 1, config.cpus_per_worker, config.gpus_per_worker, faults, placement)
    texts: list[str] = run_remote(work, "decoding", workers, log_path)
    return texts


def _decode(
    folder: str,
    model_path: str,
    states: np.ndarray,
    sampled: np.ndarray,
    config: DecoderConfig,
    seed: int,
    trust_remote_code: bool,
) -> list[str]:
    from ka2l.decoder.training import load_decoder

    set_num_threads(config.cpus_per_worker)
    decoder = load_decoder(folder, model_path, states.shape[1], config, trust_remote_code=trust_remote_code)
    texts = [""] * len(states)
    for rows, temperature in ((np.flatnonzero(sampled), config.temperature), (np.flatnonzero(~sampled), None)):
        for row, text in zip(rows, decoder.decode(states[rows], seed, temperature), strict=True):
            texts[row] = text
    return texts


def extract_states(
    make_host: Callable[[], Host],
    texts: Sequence[str],
    *,
    cpus: float,
    gpus: float,
    log_path: str | None,
    placement: Placement,
    faults: FaultsConfig,
) -> tuple[pa.Table, Stats]:
    """States of some texts, in a process of its own.

    Returns:
        A table of ``question`` and what ``hidden_states`` holds of it, without texts that cannot be forwarded, and what
        it took.

    Raises:
        KA2LError: as the worker raised it.
        StageFailedError: the process died.
    """
    work = functools.partial(_extract, make_host, list(texts))
    workers = Workers("extraction", 1, cpus, gpus, faults, placement)
    found: tuple[pa.Table, Stats] = run_remote(work, "forwarding decoded questions", workers, log_path)
    return found


def _extract(make_host: Callable[[], Host], texts: list[str]) -> tuple[pa.Table, Stats]:
    # The text is its own id here: it comes back beside its state.
    rows = pa.table({"question_id": texts, "question": texts, "split": ["decoded"] * len(texts)})
    table, stats = make_host().process({"questions": rows})
    return table.drop_columns(["split"]).rename_columns({"question_id": "question"}), stats
