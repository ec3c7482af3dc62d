"""The process that ``bench_costs.py`` starts for one stage and model: ``python costs_process.py SPEC.json``.

Stages run as the engine's hosts and functions do, in one process, without Ray: tables are read from and written to
Parquet. It prints its measurements as the last line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ka2l.schemas import KNOWLEDGE, hidden_states_schema, stored_states

#: Repeats of what takes less than this, seconds; the median counts.
SHORT_S = 5.0
NUM_REPEATS = 3
MAX_TOKENS = 16


_warm: list[None] = []


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What ``work`` returns; its seconds, the median of three where it is short; and how far memory rose, MiB.

    Memory is the highest resident set during the work less the one before it, the largest over the repeats; freed
    memory is given back to the system first, so that it counts again. The first work of a process is done once before.
    """
    seconds, peaks, result = [], [], None
    if not _warm:  # what a process does first, imports for one, is not the stage
        _warm.append(work())
        _warm[0] = None
    while len(seconds) < NUM_REPEATS and (not seconds or seconds[0] < SHORT_S):
        result = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pa.default_memory_pool().release_unused()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before, start = _status_mib("VmRSS"), time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
        peaks.append(_status_mib("VmHWM") - before)
    return result, {"seconds": statistics.median(seconds), "runs": seconds, "peak_mib": max(peaks)}


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def size_of(*files: Path) -> int:
    return sum(file.stat().st_size for file in files)


def prompter_of(model: str) -> Any:
    from ka2l.model.loading import ModelConfig, load_tokenizer
    from ka2l.prompts import PromptConfig, Prompter

    tokenizer = load_tokenizer(ModelConfig(path=model))
    return Prompter(tokenizer, PromptConfig(template="plain", instruction="", num_shots=0))


def subset(source: Path, target: Path, num_questions: int, num_samples: int | None = None) -> Path:
    """The rows of the first questions, and of their first samples."""
    table = pq.read_table(source)
    ids = pa.array(_ids(num_questions))
    keep = pc.is_in(table["question_id"], ids)
    if num_samples is not None:
        keep = pc.and_(keep, pc.less(table["sample_index"], num_samples))
    pq.write_table(table.filter(keep), target)
    return target


def _ids(num_questions: int) -> list[str]:
    return [f"q{index:06d}" for index in range(num_questions)]


# --- stages ----------------------------------------------------------------------------------------------------------


def sample(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`SamplerHost` on vLLM. Floor: the tokens generated at the pace of a large batch of long answers."""
    from actors.sampler import ObservePlan, SamplerHost, VLLMSampler
    from ka2l.sampling.sampler import SamplerConfig

    def config(num_samples: int) -> SamplerConfig:
        return SamplerConfig(num_samples=num_samples, max_tokens=MAX_TOKENS, max_model_len=128)

    sampler = VLLMSampler(spec["model"], config(10), dtype="float32")
    prompter, plan = prompter_of(spec["model"]), ObservePlan(0, 0, 0, 0.0, False, False)
    peak = _peak_tokens_per_s(sampler, prompter.token_ids("Where?"))
    found = []
    for point in spec["points"]:
        host = SamplerHost(sampler, prompter, config(point["num_samples"]), plan)
        questions = subset(Path(spec["questions"]), folder / "questions.parquet", point["num_questions"])
        target = Path(spec["work"]) / f"samples-{point['num_questions']}-{point['num_samples']}.parquet"

        def work(host: Any = host, questions: Path = questions, target: Path = target) -> dict[str, float]:
            sampler.engine.reset_prefix_cache()
            table, stats = host.process({"questions": pq.read_table(questions)})
            pq.write_table(table, target if spec["keep"] else folder / "samples.parquet")
            return dict(stats)

        stats, cost = measured(work)
        found.append(point | cost | {"floor_s": stats["tokens_generated"] / peak, "tokens_per_s": peak})
    return found


def _peak_tokens_per_s(sampler: Any, prompt: list[int]) -> float:
    """256 answers of 96 tokens at once, the second time."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=1.0, max_tokens=96, ignore_eos=True)
    for _ in range(2):
        start = time.perf_counter()
        made = sampler.engine.generate([{"prompt_token_ids": prompt}] * 256, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
    return sum(len(answer.token_ids) for row in made for answer in row.outputs) / seconds


def cluster(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`ScorerHost` with the lexical rule. Floor: its tables' bytes at the disk's pace."""
    found = []
    for point in spec["points"]:
        files = _cluster_inputs(spec, folder, point)
        _, cost = measured(lambda files=files: _cluster_work(files))
        num_bytes = size_of(*files.values(), files["samples"].with_name("clusters.parquet"))
        found.append(point | cost | {"floor_s": num_bytes / spec["bytes_per_s"]})
    return found


def _cluster_inputs(spec: dict[str, Any], folder: Path, point: dict[str, Any]) -> dict[str, Path]:
    n, k = point["num_questions"], point["num_samples"]
    made = {path: [int(part) for part in path.stem.split("-")[1:]] for path in Path(spec["work"]).glob("samples-*")}
    source = min((path for path, (rows, each) in made.items() if rows >= n and each >= k), key=lambda path: made[path])
    return {
        "samples": subset(source, folder / "samples.parquet", n, k),
        "questions": subset(Path(spec["questions"]), folder / "questions.parquet", n),
    }


def _cluster_work(files: dict[str, Path]) -> None:
    from actors.scorer import ScorerHost
    from ka2l.answers.equivalence import LexicalEquivalence

    host = ScorerHost(LexicalEquivalence(), answers={})
    table, _ = host.process({name: pq.read_table(file) for name, file in files.items()})
    pq.write_table(table, files["samples"].with_name("clusters.parquet"))


def extract(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`ExtractorHost`. Floor: 2 x weights of the layers x tokens, and of the head x questions, at the measured
    pace of matrix products."""
    found = []
    for point in spec["points"]:
        host, layer_weights, head_weights = _extractor(spec["model"], point["num_layers"])
        questions = subset(Path(spec["questions"]), folder / "questions.parquet", point["num_questions"])
        keep = spec["keep"] and point["num_questions"] == spec["largest"]
        target = Path(spec["work"]) / "states.parquet" if keep else folder / "states.parquet"
        stats, cost = measured(lambda h=host, q=questions, t=target: _extract_work(h, q, t))
        flops = 2 * (layer_weights * stats["tokens_prompt"] + head_weights * stats["forward_passes"])
        found.append(point | cost | {"floor_s": flops / spec["flop_per_s"]})
    return found


def _extractor(model: str, num_layers: int) -> tuple[Any, int, int]:
    """The host, and weights of its layers and of its language-model head, which reads one token a question."""
    from actors.extractor import ExtractorHost
    from ka2l.knowledge.extraction_config import ExtractionConfig
    from ka2l.knowledge.hidden_states import HiddenStateExtractor

    config = ExtractionConfig(layers=list(range(-num_layers, 0)), batch_size=128)
    extractor = HiddenStateExtractor(model, config, dtype="float32")
    weights = sum(p.numel() for name, p in extractor.decoder.named_parameters() if "embed" not in name)
    head = extractor.decoder.config.vocab_size * extractor.width
    return ExtractorHost(extractor, prompter_of(model), config), weights, head


def _extract_work(host: Any, questions: Path, target: Path) -> dict[str, float]:
    table, stats = host.process({"questions": pq.read_table(questions)})
    pq.write_table(table, target)
    return dict(stats)


def label(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Split, threshold and labels of seed questions. Floor: bytes at the disk's pace."""
    from ka2l.knowledge.labels import LabelsConfig, label_questions, split_seed_questions

    found = []
    for point in spec["points"]:
        ids = _ids(point["num_questions"])
        source, target = folder / "entropies.parquet", folder / "labels.parquet"
        groups = [f"g{index // 5}" for index in range(len(ids))]
        entropies = np.random.default_rng(0).choice(np.linspace(0, 2.3, 40), len(ids))
        pq.write_table(pa.table({"question_id": ids, "group": groups, "semantic_entropy": entropies}), source)

        def work(source: Path = source, target: Path = target) -> None:
            table = pq.read_table(source)
            ids, values = table["question_id"].to_pylist(), table["semantic_entropy"].to_numpy()
            splits = split_seed_questions(ids, table["group"].to_pylist(), LabelsConfig(), 0)
            made = label_questions(ids, values, splits)
            pq.write_table(pa.table({"question_id": ids, "probe_split": splits, "unknown": made.unknown}), target)

        _, cost = measured(work)
        found.append(point | cost | {"floor_s": size_of(source, target) / spec["bytes_per_s"]})
    return found


def _states(spec: dict[str, Any], point: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """States of the testbed's questions or, of another width, random ones; and labels that they can be told by."""
    n, num_layers, width = point["num_questions"], point["num_layers"], point["width"]
    stored = pq.read_table(Path(spec["work"]) / "states.parquet")
    states = stored_states(stored, stored.schema.field("states").metadata[b"layers"].count(b",") + 1)
    if states.shape[2] == width and len(states) >= n:
        states = np.ascontiguousarray(states[:n, -num_layers:])
    else:
        states = np.random.default_rng(0).normal(size=(n, num_layers, width)).astype(np.float32)
    top = states[:, -1].astype(np.float64)
    direction = np.random.default_rng(1).normal(size=width)
    scores = (top - top.mean(0)) @ direction
    return states, scores + np.random.default_rng(2).normal(size=n) * scores.std() > 0


def probe(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`fit_probe`, 20 epochs without early stopping. Floor: 6 x weights x rows x epochs at the pace of products."""
    from ka2l.knowledge.probe import ProbeConfig, fit_probe

    config = ProbeConfig(num_epochs=20, patience=20)
    found = []
    for point in spec["points"]:
        states, unknown = _states(spec, point)
        split = np.array(["train", "train", "train", "validation", "test"])[np.arange(len(states)) % 5]
        layers = list(range(point["num_layers"]))
        _, cost = measured(lambda s=states, u=unknown, p=split, n=layers: fit_probe(s, u, p, n, config, 0))
        weights = point["num_layers"] * (point["width"] + 2) * config.hidden
        flops = 6 * weights * int((split == "train").sum()) * config.num_epochs
        found.append(point | cost | {"floor_s": flops / spec["flop_per_s"]})
    return found


def knowledge(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """States read, P(unknown) and principal components written. Floor: bytes at the disk's pace."""
    from scipy.special import expit

    from ka2l.knowledge.probe import ProbeConfig, fit_probe

    found = []
    for point in spec["points"]:
        states, unknown = _states(spec, point)
        n, num_layers = len(states), point["num_layers"]
        split = np.array(["train", "train", "train", "validation", "test"])[np.arange(n) % 5]
        config = ProbeConfig(num_epochs=2, patience=2, num_bootstrap=10)
        fitted = fit_probe(states, unknown, split, list(range(num_layers)), config, 0)
        schema = hidden_states_schema(range(num_layers), point["width"])
        flat = pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), num_layers * point["width"])
        source, target = folder / "states.parquet", folder / "knowledge.parquet"
        columns = {"question_id": _ids(n), "split": ["candidate"] * n, "states": flat}
        pq.write_table(pa.table(columns, schema=schema), source)
        del states, flat, columns

        def work(fitted: Any = fitted, num_layers: int = num_layers, source: Path = source) -> None:
            table = pq.read_table(source)
            read = stored_states(table, num_layers)
            logits, components = fitted.predict_logit(read), fitted.pca(read)
            nothing = [None] * len(logits)
            made = {
                "question_id": table["question_id"], "split": table["split"], "p_unknown": expit(logits),
                "logit": logits, "score": logits, "p_wrong": nothing, "quadrant": nothing,
                "pca_0": components[:, 0], "pca_1": components[:, 1],
            }  # fmt: skip
            fields = [pa.array(v, f.type) if not isinstance(v, pa.ChunkedArray) else v
                      for f, v in zip(KNOWLEDGE, made.values(), strict=True)]  # fmt: skip
            pq.write_table(pa.table(fields, schema=KNOWLEDGE), folder / "knowledge.parquet")

        _, cost = measured(work)
        found.append(point | cost | {"floor_s": size_of(source, target) / spec["bytes_per_s"]})
    return found


def select(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The strategy ``probe``, an eighth of the pool. Floor: bytes at the disk's pace."""
    from ka2l.selection.strategies import Candidates, SelectionConfig, Shortlist
    from ka2l.selection.strategies import select as choose

    found = []
    for point in spec["points"]:
        n = point["num_questions"]
        source, target = folder / "knowledge.parquet", folder / "selection.parquet"
        scores = np.random.default_rng(0).normal(size=n).astype(np.float32)
        columns = {"question_id": _ids(n), "score": scores, "p_unknown": 1 / (1 + np.exp(-scores))}
        pq.write_table(pa.table(columns), source)
        config = SelectionConfig(kind="probe", budget=n // 8)

        def work(source: Path = source, target: Path = target, config: SelectionConfig = config) -> None:
            table = pq.read_table(source)
            shortlist = Shortlist(config, 0)
            values = [table[name].to_numpy() for name in ("score", "p_unknown")]
            shortlist.add(Candidates(table["question_id"].to_pylist(), *values))
            candidates = shortlist.candidates()
            chosen = choose(candidates, config, 0)
            ids = [candidates.question_ids[row] for row in chosen.indices]
            pq.write_table(pa.table({"question_id": ids, "score": chosen.scores}), target)

        _, cost = measured(work)
        found.append(point | cost | {"floor_s": size_of(source, target) / spec["bytes_per_s"]})
    return found


def tune(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`ka2l.tuning.sft.tune`, LoRA of rank 16, one row a question, one epoch, float32.

    Floor: 4 x weights x tokens at the pace of products: the frozen weights need no gradient of their own. Weights here
    are the layers' and the output layer's.
    """
    from ka2l.model.adapter import AdapterConfig, load_model
    from ka2l.tuning.sft import TuningConfig, training_rows
    from ka2l.tuning.sft import tune as train

    config = TuningConfig(
        adapter=AdapterConfig(r=16),
        num_epochs=1,
        dtype="float32",
        max_length=64,
        learning_rate=1e-3,
        checkpoint_steps=0,
    )
    prompter = prompter_of(spec["model"])
    rows = pq.read_table(spec["questions"]).to_pylist()
    num_parameters = sum(weight.numel() for weight in load_model(spec["model"]).parameters())
    found = []
    for point in spec["points"]:
        taken = rows[: point["num_questions"]]
        given = [(row["question_id"], prompter.text(row["question"]), "a short answer") for row in taken]
        rows_of = training_rows(given, [], config, 0, chat=False)

        def work(rows_of: Any = rows_of) -> Any:
            return train(spec["model"], rows_of, config, str(folder / "adapter"), 0, chat=False).metrics

        metrics, cost = measured(work)
        flops = 4 * num_parameters * metrics["num_tokens"]
        found.append(point | cost | {"floor_s": flops / spec["flop_per_s"]})
    return found


# --- workers ---------------------------------------------------------------------------------------------------------


def _worker(stage: str, spec: dict[str, Any], part: Path, barrier: Any, seconds: Any) -> None:
    import torch

    torch.set_num_threads(1)
    if stage == "extract":
        host, *_ = _extractor(spec["model"], 5)
        _extract_work(host, part / "questions.parquet", part / "states.parquet")  # so that nothing is first

        def work() -> None:
            _extract_work(host, part / "questions.parquet", part / "states.parquet")

    else:

        def work() -> None:
            _cluster_work({name: part / f"{name}.parquet" for name in ("samples", "questions")})

        work()
    barrier.wait()
    start = time.perf_counter()
    work()
    barrier.wait()
    seconds.put(time.perf_counter() - start)


def workers(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The same questions by one process of one thread, and shared by two; loading not counted."""
    context = multiprocessing.get_context("spawn")
    found = []
    for stage in ("extract", "cluster"):
        for point in spec["points"]:
            num_workers, n = point["workers"], point["num_questions"]
            files = _cluster_inputs(spec, folder, {"num_questions": n, "num_samples": 10})
            parts = [folder / f"part-{index}" for index in range(num_workers)]
            for index, part in enumerate(parts):
                part.mkdir(exist_ok=True)
                ids = pa.array(_ids(n)[index::num_workers])
                for name, file in files.items():
                    table = pq.read_table(file)
                    pq.write_table(table.filter(pc.is_in(table["question_id"], ids)), part / f"{name}.parquet")
            runs = []
            for _ in range(2):  # each loads everything anew
                barrier, seconds = context.Barrier(num_workers), context.Queue()
                processes = [
                    context.Process(target=_worker, args=(stage, spec, part, barrier, seconds)) for part in parts
                ]
                for process in processes:
                    process.start()
                runs.append(max(seconds.get(timeout=300) for _ in processes))
                for process in processes:
                    process.join()
            found.append(point | {"stage": stage, "seconds": statistics.median(runs), "runs": runs})
    return found


STAGES: dict[str, Callable[[dict[str, Any], Path], list[dict[str, Any]]]] = {
    "sample": sample,
    "cluster": cluster,
    "extract": extract,
    "label": label,
    "probe": probe,
    "knowledge": knowledge,
    "select": select,
    "tune": tune,
    "workers": workers,
}

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given["stage"] in ("extract", "probe", "knowledge", "tune"):
        import torch

        torch.set_num_threads(given["threads"])
    with tempfile.TemporaryDirectory(prefix="ka2l-costs-", dir=given["work"]) as name:
        outcome = STAGES[given["stage"]](given, Path(name))
    print(json.dumps(outcome), flush=True)
