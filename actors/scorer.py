"""Hosts clustering and grading with an equivalence (lexical, NLI, embedding, judge)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from actors.host import Stats
from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import Equivalence
from ka2l.answers.grading import grade_answers
from ka2l.knowledge.semantic_entropy import (
    disagreement,
    discrete_semantic_entropy,
    predictive_entropy,
    weighted_semantic_entropy,
)
from ka2l.prompts import encode_messages
from ka2l.sampling.early_stop import expected_entropy
from ka2l.sampling.sampler import Request, Sampler
from ka2l.schemas import CLUSTERS


class ScorerHost:
    """One equivalence; one shard a call.

    Args:
        equivalence: decides which answers mean the same.
        purposes: purposes of the samples to group.
        answers: accepted answers by question id, for grading; None takes the shard's ``references``.
        stopped_early: the samples of seed questions were drawn until their entropy was settled.
    """

    def __init__(
        self,
        equivalence: Equivalence,
        purposes: Sequence[str] = ("probe", "eval", "agreement"),
        answers: Mapping[str, list[str]] | None = None,
        *,
        stopped_early: bool = False,
    ) -> None:
        self.equivalence = equivalence
        self.purposes = purposes
        self.answers = answers
        self.stopped_early = stopped_early

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """From ``samples``, ``questions`` and ``references`` to ``clusters`` (schemas.CLUSTERS).

        Where ``clusters`` are given in place of ``samples``, they stay as they are and only new references are graded
        against. What is graded is the largest cluster's answer; a greedy answer is alone in its cluster. Sampled
        answers marked ``rejected`` are left out, a rejected greedy answer counts as wrong.
        """
        start = time.perf_counter()
        questions = {row["question_id"]: row["question"] for row in tables["questions"].to_pylist()}
        references = self.answers
        if references is None:
            references = {row["question_id"]: row["answers"] for row in tables["references"].to_pylist()}
        stats: Stats = {}
        if "clusters" in tables:
            rows = {(row["question_id"], row["purpose"]): row for row in tables["clusters"].to_pylist()}
        else:
            rows, stats = self._cluster(tables["samples"], questions)
        graded = [
            key
            for key, row in rows.items()
            if key[0] in references and key[1] != "agreement" and row.get("correct") is None
        ]
        grades = grade_answers(
            [questions[question_id] for question_id, _ in graded],
            [rows[key]["top_answer"] for key in graded],
            [references[question_id] for question_id, _ in graded],
            self.equivalence,
        )
        for key, grade in zip(graded, grades, strict=True):
            rows[key] |= grade._asdict()
        table = [{"question_id": key[0], "purpose": key[1]} | row for key, row in rows.items()]
        return pa.Table.from_pylist(table, schema=CLUSTERS), {"score_seconds": time.perf_counter() - start} | stats

    def _cluster(
        self, table: pa.Table, questions: Mapping[str, str]
    ) -> tuple[dict[tuple[str, str], dict[str, Any]], Stats]:
        """Answers by (question id, purpose), grouped by meaning; not graded yet."""
        samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            usable = row["finish_reason"] != "rejected" or row["purpose"] == "eval"
            if row["purpose"] in self.purposes and usable:
                samples.setdefault((row["question_id"], row["purpose"]), []).append(row)
        keys = sorted(samples)
        result = cluster_answers(
            [questions[question_id] for question_id, _ in keys],
            [[row["answer"] for row in samples[key]] for key in keys],
            self.equivalence,
        )
        rows = {
            key: _uncertainty(samples[key], ids, stopped_early=self.stopped_early and key[1] == "probe")
            for key, ids in zip(keys, result.ids, strict=True)
        }
        return rows, {
            "num_pairs_asked": float(result.num_pairs_asked),
            "num_pairs_full": float(result.num_pairs_full),
        }


def _uncertainty(samples: Sequence[Mapping[str, Any]], ids: Sequence[int], *, stopped_early: bool) -> dict[str, Any]:
    answers = [row["answer"] for row in samples]
    logprobs = [row["logprob"] for row in samples]
    largest = max(sorted(set(ids)), key=list(ids).count)
    return {
        "semantic_ids": list(ids),
        "num_clusters": len(set(ids)),
        "semantic_entropy": (
            expected_entropy(ids, logprobs, answers) if stopped_early else discrete_semantic_entropy(ids)
        ),
        "weighted_semantic_entropy": weighted_semantic_entropy(ids, logprobs, answers),
        "predictive_entropy": predictive_entropy(logprobs),
        "disagreement": disagreement(ids, logprobs, answers),
        "top_answer": answers[list(ids).index(largest)],
    }


class SamplerJudge:
    """Puts judge prompts to a local model through a sampler."""

    def __init__(self, sampler: Sampler, tokenizer: Any) -> None:
        self.sampler = sampler
        self.tokenizer = tokenizer

    def __call__(self, prompts: list[str]) -> list[str]:
        """One greedy answer a prompt."""
        requests = []
        for prompt in prompts:
            ids = encode_messages(self.tokenizer, [{"role": "user", "content": prompt}])
            requests.append(Request(ids, 1, 0.0, 0))
        return [made[0].answer for made in self.sampler.generate(requests)]


class EndpointJudge:
    """Puts judge prompts to an OpenAI-compatible endpoint."""

    def __init__(self, base_url: str, model: str, api_key: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=base_url, api_key=api_key)
        self.model = model

    def __call__(self, prompts: list[str]) -> list[str]:
        """One answer a prompt, at temperature 0."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=16) as workers:
            return list(workers.map(self._ask, prompts))

    def _ask(self, prompt: str) -> str:
        answer = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0.0, max_tokens=4
        )
        return answer.choices[0].message.content or ""
