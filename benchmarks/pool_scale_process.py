"""The campaign that ``bench_pool_scale.py`` watches: ``python pool_scale_process.py SPEC.json``.

Real stages on a synthetic pool. In place of a model there is a host that derives hidden states from question ids, and
a table that says how sure such a model would be of the few thousand seed questions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

#: Values of a state, and layers that are kept.
WIDTH, LAYERS = 16, (1, 2)
NUM_SEED, NUM_EVAL = 2_000, 1_000
BUDGET = 500
_SUBJECTS = [f"subject {index}" for index in range(20)]


# -- the synthetic world -----------------------------------------------------------------------------------------------


def write_pool(path: Path, num_questions: int, rows_at_once: int = 100_000) -> None:
    """A Parquet file of so many different questions, written piece by piece."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "question", "answers", "subject")])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, num_questions, rows_at_once):
            numbers = np.arange(start, min(start + rows_at_once, num_questions))
            digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0")
            columns = [
                pc.binary_join_element_wise("q", digits, ""),
                pc.binary_join_element_wise("Which year was the bridge number", digits, "opened to the public?", " "),
                pc.binary_join_element_wise("the year", pa.array(1500 + numbers % 500).cast(pa.string()), " "),
                pa.array(_SUBJECTS).take(pa.array(numbers % len(_SUBJECTS))),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def numbers_of(ids: pa.ChunkedArray) -> np.ndarray:
    """The numbers in ids such as q000000017, shape (num_questions,)."""
    return pc.utf8_slice_codeunits(ids, 1).cast(pa.int64()).to_numpy()


def mixed(values: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) from 64-bit integers (the finaliser of splitmix64). Same shape."""
    values = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) / 2.0**64


def doubt_of(numbers: np.ndarray) -> np.ndarray:
    """How little the synthetic model knows of each question, in [0, 1), shape (num_questions,)."""
    return mixed(numbers * 1009 + 7)


def states_of(numbers: np.ndarray) -> np.ndarray:
    """Hidden states, shape (num_questions, num_layers * width): noise, and doubt in a few dimensions of layer 2."""
    num_values = len(LAYERS) * WIDTH
    cells = numbers[:, None].astype(np.uint64) * np.uint64(num_values) + np.arange(num_values, dtype=np.uint64)
    states = (mixed(cells) - 0.5) * 12**0.5
    states[:, WIDTH : WIDTH + 4] += 3.0 * (doubt_of(numbers)[:, None] - 0.5)
    return states.astype(np.float32)


class SyntheticHost:
    """Hidden states without a model. Notes which shards it began, in ``log``."""

    def __init__(self, log: str | None) -> None:
        self.log = log

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, dict[str, float]]:
        from ka2l.schemas import hidden_states_schema

        questions = tables["questions"]
        numbers = numbers_of(questions["question_id"])
        note(self.log, f"extract {numbers[0]}")
        flat = pa.array(states_of(numbers).reshape(-1))
        schema = hidden_states_schema(LAYERS, WIDTH)
        states = pa.FixedSizeListArray.from_arrays(flat, schema.field("states").type.list_size)
        columns = [questions["question_id"], questions["split"], states]
        return pa.table(columns, schema=schema), {"forward_passes": float(len(numbers))}


def note(path: str | None, line: str) -> None:
    """Append a line, whole, to a file that several processes write."""
    if path is not None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def clusters(campaign: Any) -> None:
    """What observing and clustering would have said of seed and eval questions."""
    from engine import stages
    from engine.stages.kind import Work
    from engine.store.shards import shard_name, write_shard
    from ka2l.schemas import CLUSTERS

    questions = campaign.stage("questions")

    def work(stage: Any) -> tuple[dict[str, Any], dict[str, float]]:
        table = questions.table(["question_id", "split"], pc.field("split") != "candidate")
        num = table.num_rows
        is_eval = pc.equal(table["split"], "eval")
        doubt = doubt_of(numbers_of(table["question_id"]))
        zeros = pa.array(np.zeros(num, np.float32))
        columns = {
            "question_id": table["question_id"],
            "purpose": pc.if_else(is_eval, "eval", "probe"),
            "semantic_ids": pa.array([[0]] * num, pa.list_(pa.int32())),
            "num_clusters": pa.array(np.ones(num, np.int32)),
            "semantic_entropy": pa.array((2.3 * doubt).astype(np.float32)),
            "weighted_semantic_entropy": zeros,
            "predictive_entropy": zeros,
            "disagreement": pa.array(doubt.astype(np.float32)),
            "top_answer": pa.array(["an answer"] * num),
            "correct": pc.if_else(is_eval, pa.array(doubt < 0.5), None),
            "exact_match": pc.if_else(is_eval, pa.array(doubt < 0.5), None),
            "token_f1": pc.if_else(is_eval, zeros, None),
        }
        write_shard(stage.url, shard_name(0), pa.table(columns).cast(CLUSTERS), {})
        return {"num_eval": NUM_EVAL}, {}

    campaign.make(replace(stages.cluster, plan=lambda *_: Work({}, [questions], work)), 0)


# -- the campaign ------------------------------------------------------------------------------------------------------


def config_of(spec: Mapping[str, Any], kind: str) -> Any:
    from engine.config import RunConfig

    return RunConfig.model_validate(
        {
            "name": "pool-scale",
            "rounds": 1,
            "shard_rows": spec["shard_rows"],
            "model": {"path": "synthetic"},
            "pool": {"path": spec["pool"], "num_seed": spec["num_seed"], "num_eval": spec["num_eval"]},
            "extraction": {"replicas": spec["workers"], "cpus_per_replica": 1},
            "probe": {"kind": "linear"},
            "selection": {"kind": kind, "budget": BUDGET},
            "tuning": {"rehearsal": 0},
            "ray": {"address": "local", "num_cpus": spec["workers"]},
        }
    )


def make_campaign(spec: Mapping[str, Any], kind: str = "probe") -> Any:
    from rich.console import Console

    from engine.execution.campaign import Campaign
    from engine.store.events import Events
    from engine.store.run_directory import RunDirectory

    config, run = config_of(spec, kind), RunDirectory(spec["run_dir"])
    Path(run.path).mkdir(exist_ok=True)
    return Campaign(config, run, Events(run, Console(quiet=True)), config.model, spec["pool"])


@contextlib.contextmanager
def timed(spec: Mapping[str, Any], name: str) -> Iterator[None]:
    """Write down when a stage began and ended; profile it where the spec says so."""
    started = time.time()
    note(spec["stages"], json.dumps({"stage": name, "started": started}))
    with contextlib.ExitStack() as ended:
        if spec.get("profile") == name:
            import cProfile

            profile = ended.enter_context(cProfile.Profile())
        yield
    if spec.get("profile") == name:
        profile.dump_stats(f"{spec['run_dir']}.{name}.prof")
    seconds = time.time() - started
    note(spec["stages"], json.dumps({"stage": name, "started": started, "seconds": seconds}))


def digest(campaign: Any, name: str) -> str:
    """Hash of what a stage selected or learnt: of its ids, or of its files where they hold nothing but results."""
    stage = campaign.stage(name, 0)
    if name == "select":
        content = json.dumps(stage.table(["question_id", "rank"]).to_pylist())
    else:
        content = json.dumps([entry.sha256 for entry in stage.require().files])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """All stages; those that are committed are skipped."""
    from engine import build, stages
    from engine.execution.cluster import RaySession
    from engine.report.build import write_report
    from engine.stages import knowing
    from engine.store.ledger import write_ledger

    build.extractor_host = lambda model, prompt, config, adapter: SyntheticHost(spec["log"])  # type: ignore[assignment]
    read_shard: Callable[..., pa.Table] = knowing.read_shard

    def noted(url: str, name: str, *others: Any) -> pa.Table:
        if url.endswith("/extract"):
            note(spec["log"], f"knowledge {name}")
        return read_shard(url, name, *others)

    campaign = make_campaign(spec)
    with RaySession(campaign.config.ray, f"{campaign.run.logs()}/driver.log"):
        with timed(spec, "pool"):
            stages.pool(campaign)
        clusters(campaign)
        stages.label(campaign, 0)
        with timed(spec, "extract"):
            stages.extract(campaign, 0)
    with timed(spec, "probe"):
        stages.probe(campaign, 0)
    knowing.read_shard = noted
    with timed(spec, "knowledge"):
        stages.knowledge(campaign, 0)
    results: dict[str, Any] = {"knowledge": digest(campaign, "knowledge")}
    for kind in ("probe", "probe_diverse"):
        campaign.stage("select", 0).remove()
        campaign = make_campaign(spec, kind)
        with timed(spec, f"select {kind}"):
            stages.select(campaign, 0)
        results[f"select {kind}"] = digest(campaign, "select")
    with timed(spec, "report"):
        write_ledger(campaign.run)
        write_report(campaign.run, "running")
    metrics = campaign.stage("probe", 0).require().metrics
    return {
        "digests": results,
        "counts": campaign.stage("questions").require().metrics,
        "auroc": metrics["auroc"],
        "driver_max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["write_pool"]:
        with timed(spec, "write"):
            write_pool(Path(spec["pool"]), spec["num_questions"])
        return
    Path(spec["result"]).write_text(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
