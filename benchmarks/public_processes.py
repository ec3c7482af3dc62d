"""The processes that ``bench_public.py`` times: ``python public_processes.py ours|public|observe SPEC.json``.

Each does all of its side's stages in one process and prints its seconds as the last line. ``observe`` times nothing: it
asks our samples, greedy answers and states of more questions, for the comparison of probes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ka2l.answers.clustering import ClusterResult, cluster_answers
from ka2l.answers.equivalence import NLIEquivalence, entail_each_other
from ka2l.answers.grading import grade_answers
from ka2l.answers.lexical import same_answer
from ka2l.sampling.sampler import SamplerConfig


class Clock:
    """Seconds by stage, and seconds of CPU, which other processes on the machine do not lengthen."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.cpu_seconds[name] = time.process_time() - cpu


class RuledCrossEncoder(NLIEquivalence):
    """A cross-encoder that is asked and paid for; what it says of a direction is the lexical rule's word.

    Its weights are random: they cost what trained ones cost, and say nothing.
    """

    num_directed = 0

    def _decide(self, triples: list[tuple[str, str, str]]) -> list[bool]:
        both_ways = [direction for q, a, b in triples for direction in ((q, a, b), (q, b, a))]
        asked = {(f"{q} {a}", f"{q} {b}"): (q, a, b) for q, a, b in both_ways}

        def entails(pairs: list[tuple[str, str]]) -> list[bool]:
            self.num_directed += len(pairs)
            self._entails(pairs)
            return [same_answer(*asked[pair]) for pair in pairs]

        return entail_each_other(triples, entails)


def sampler_config(spec: dict[str, Any]) -> SamplerConfig:
    return SamplerConfig(num_samples=spec["num_samples"], max_tokens=spec["max_tokens"], max_model_len=128)


def seeds(spec: dict[str, Any]) -> list[int]:
    from ka2l.seeds import row_seed

    return [row_seed(0, 0, "observe/probe", row["id"]) for row in spec["questions"]]


def prompts_of(spec: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Texts and tokens of the prompts: the testbed was trained without shots."""
    from ka2l.model.loading import ModelConfig, load_tokenizer
    from ka2l.prompts import PromptConfig, Prompter

    tokenizer = load_tokenizer(ModelConfig(path=spec["model"]))
    prompter = Prompter(tokenizer, PromptConfig(template="plain", instruction="", num_shots=0))
    questions = [row["question"] for row in spec["questions"]]
    return [prompter.text(q) for q in questions], [prompter.token_ids(q) for q in questions]


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """One vLLM session, a prefill-only forward, clusters by representatives, all layers' probes at once."""
    from actors.sampler import VLLMSampler
    from ka2l.knowledge.extraction_config import ExtractionConfig
    from ka2l.knowledge.hidden_states import HiddenStateExtractor
    from ka2l.knowledge.labels import LabelsConfig, label_questions, split_seed_questions
    from ka2l.knowledge.probe import ProbeConfig, fit_probe
    from ka2l.knowledge.semantic_entropy import disagreement, discrete_semantic_entropy
    from ka2l.sampling.sampler import Request

    clock, out = Clock(), Path(spec["out"])
    ids = [row["id"] for row in spec["questions"]]
    questions = [row["question"] for row in spec["questions"]]
    with clock.stage("imports"):
        import torch
        import transformers  # noqa: F401
    torch.set_num_threads(spec["threads"])
    with clock.stage("engine_start"):
        sampler = VLLMSampler(spec["model"], sampler_config(spec), dtype="float32")
    with clock.stage("sample"):
        prompts = prompts_of(spec)[1]
        wanted = [Request(p, spec["num_samples"], 1.0, s) for p, s in zip(prompts, seeds(spec), strict=True)]
        drawn = sampler.generate(wanted)
        samples = [[made.answer for made in row] for row in drawn]
    with clock.stage("low_temperature"):
        greedy = [row[0].answer for row in sampler.generate([Request(prompt, 1, 0.0, 0) for prompt in prompts])]
    with clock.stage("states_start"):
        extractor = HiddenStateExtractor(spec["model"], ExtractionConfig(batch_size=128), dtype="float32")
    with clock.stage("states"):
        states, next_token = extractor.extract(prompts)
    with clock.stage("cluster_start"):
        judge = RuledCrossEncoder(spec["cross_encoder"])
    with clock.stage("cluster"):
        clusters: ClusterResult = cluster_answers(questions, samples, judge)
    with clock.stage("label"):
        entropies = np.array([discrete_semantic_entropy(row) for row in clusters.ids])
        splits = split_seed_questions(ids, [row["group"] for row in spec["questions"]], LabelsConfig(), 0)
        labels = label_questions(ids, entropies, splits)
    with clock.stage("probe"):
        logprobs = [[made.logprob for made in row] for row in drawn]
        targets = np.array(list(map(disagreement, clusters.ids, logprobs, samples)))
        probe = fit_probe(
            states,
            labels.unknown,
            splits,
            extractor.layers,
            ProbeConfig(),
            0,
            targets=targets,
            next_token=next_token,
        )
    np.savez(out, states=states, entropies=entropies)
    made = {"samples": samples, "greedy": greedy, "clusters": clusters.ids}
    out.with_suffix(".json").write_text(json.dumps(made, ensure_ascii=False))
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "peak_mib": peak_mib(),
        "num_comparisons": judge.num_directed,
        "threshold": labels.threshold,
        "unknown_share": float(labels.unknown.mean()),
        "auroc": probe.metrics["auroc"],
    }


def run_public(spec: dict[str, Any]) -> dict[str, Any]:
    """Ten passes, generate with states, every pair both ways, one layer's probe after the other."""
    import public_procedure as public

    from actors.sampler import engine_arguments, prepare_environment
    from ka2l.knowledge.semantic_entropy import discrete_semantic_entropy

    clock, out = Clock(), Path(spec["out"])
    ids = [row["id"] for row in spec["questions"]]
    questions = [row["question"] for row in spec["questions"]]
    config = sampler_config(spec)
    with clock.stage("imports"):
        import torch
        import transformers
    torch.set_num_threads(spec["threads"])
    with clock.stage("states_start"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
        model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    texts, tokens = prompts_of(spec)
    torch.manual_seed(0)
    with clock.stage("states"):
        low, states = public.generate_with_states(model, tokenizer, texts, spec["max_tokens"], greedy=False)
    with clock.stage("engine_start"):
        prepare_environment(config)
        from vllm import LLM, SamplingParams

        engine = LLM(spec["model"], **engine_arguments(spec["model"], config, "float32"))

    def plain(row: int, index: int) -> Any:
        return SamplingParams(temperature=1.0, max_tokens=spec["max_tokens"], stop=list(public.STOPS), logprobs=0)

    with clock.stage("sample"):
        public.sample_in_passes(engine, ids, texts, spec["num_samples"], plain)
    # Once more with the seeds of our samples, not timed: then both sides cluster the same answers.
    first = seeds(spec)

    def seeded(row: int, index: int) -> Any:
        return SamplingParams(
            temperature=1.0, max_tokens=spec["max_tokens"], stop=["\n"], logprobs=0, seed=first[row] + index
        )

    again = public.sample_in_passes(engine, ids, texts, spec["num_samples"], seeded)
    samples = [again[question_id] for question_id in ids]
    with clock.stage("cluster_start"):
        judge = RuledCrossEncoder(spec["cross_encoder"], batch_size=public.CLUSTER_BATCH)
    with clock.stage("cluster"):
        clusters, num_asked = public.cluster_pairwise(questions, samples, lambda asked: paid_verdicts(judge, asked))
    with clock.stage("label"):
        entropies = np.array([discrete_semantic_entropy(row) for row in clusters])
        threshold = public.grid_threshold(entropies)
        unknown = entropies > threshold
    rows, test = public.random_rows(len(ids), 0)
    with clock.stage("probe"):
        aurocs = public_probes(states, unknown, rows, test, spec["swiglu_hidden"])
    with clock.stage("probe_in_proportion"):  # 14336 is 3.5 times the width of the models that it was chosen for
        public_probes(states, unknown, rows, test, round(3.5 * states.shape[2]))
    result: dict[str, Any] = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "peak_mib": peak_mib(),
        "num_comparisons": num_asked,
        "threshold": threshold,
        "unknown_share": float(unknown.mean()),
        "aurocs": aurocs,
    }
    if spec["agreement"]:
        greedy, _ = public.generate_with_states(model, tokenizer, texts, spec["max_tokens"], greedy=True)
        made = {"samples": samples, "greedy": greedy, "low": low, "clusters": clusters}
        out.with_suffix(".json").write_text(json.dumps(made, ensure_ascii=False))
        np.savez(out, states=states)
        width = [len(engine.get_tokenizer()(text)["input_ids"]) for text in texts]
        result["same_prompt_lengths"] = width == [len(prompt) for prompt in tokens]
    return result


def paid_verdicts(judge: RuledCrossEncoder, asked: list[tuple[str, str, str]]) -> list[bool]:
    """One forward pass a directed pair, in the order given; the verdict of a direction is the lexical rule's."""
    import torch

    for start in range(0, len(asked), judge._batch_size):
        part = asked[start : start + judge._batch_size]
        left, right = [f"{q} {a}" for q, a, _ in part], [f"{q} {b}" for q, _, b in part]
        batch = judge._tokenizer(left, right, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            judge._model(**batch).logits.softmax(-1).argmax(-1).tolist()
    return [same_answer(q, a, b) for q, a, b in asked]


def public_probes(states: np.ndarray, unknown: np.ndarray, rows: Any, test: np.ndarray, hidden: int) -> list[float]:
    """A SwiGLU probe for every layer but the embeddings, each with its AUROC and a bootstrap interval of 1000."""
    import public_procedure as public
    from scipy.stats import bootstrap
    from sklearn.metrics import auc, roc_curve

    def area(truth: Sequence[bool], scores: Sequence[float]) -> float:
        false_positive, true_positive, _ = roc_curve(truth, scores)
        return float(auc(false_positive, true_positive))

    found = []
    for layer in range(1, states.shape[1]):
        settings = public.SwiGLUSettings(hidden=hidden)
        model = public.train_swiglu(states[:, layer], unknown, rows, settings, 0)
        scores = public.swiglu_scores(model, states[test, layer])
        found.append(area(unknown[test], scores))
        with np.errstate(all="ignore"):
            bootstrap(
                (unknown[test], scores), area, paired=True, vectorized=False, n_resamples=1000, confidence_level=0.9
            )
    return found


def run_observe(spec: dict[str, Any]) -> dict[str, Any]:
    """Semantic entropy, correctness of the greedy answer and states of all questions, by the lexical rule."""
    import torch

    from actors.sampler import VLLMSampler
    from ka2l.answers.equivalence import LexicalEquivalence
    from ka2l.knowledge.extraction_config import ExtractionConfig
    from ka2l.knowledge.hidden_states import HiddenStateExtractor
    from ka2l.knowledge.semantic_entropy import discrete_semantic_entropy
    from ka2l.sampling.sampler import Request

    torch.set_num_threads(spec["threads"])
    prompts = prompts_of(spec)[1]
    questions = [row["question"] for row in spec["questions"]]
    sampler = VLLMSampler(spec["model"], sampler_config(spec), dtype="float32")
    wanted = [Request(p, spec["num_samples"], 1.0, s) for p, s in zip(prompts, seeds(spec), strict=True)]
    samples = [[made.answer for made in row] for row in sampler.generate(wanted)]
    greedy = [row[0].answer for row in sampler.generate([Request(prompt, 1, 0.0, 0) for prompt in prompts])]
    extractor = HiddenStateExtractor(spec["model"], ExtractionConfig(batch_size=128), dtype="float32")
    states = extractor.extract(prompts).states
    same = LexicalEquivalence()
    entropies = [discrete_semantic_entropy(row) for row in cluster_answers(questions, samples, same).ids]
    grades = grade_answers(questions, greedy, [row["answers"] for row in spec["questions"]], same)
    np.savez(
        spec["out"],
        states=states,
        entropies=np.array(entropies),
        wrong=np.array([not grade.correct for grade in grades]),
        groups=np.array([row["group"] for row in spec["questions"]]),
    )
    return {}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


RUNS = {"ours": run_ours, "public": run_public, "observe": run_observe}

if __name__ == "__main__":
    side, path = sys.argv[1:]
    print(json.dumps(RUNS[side](json.loads(Path(path).read_text()))), flush=True)
