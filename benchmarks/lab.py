"""A lab: one model and one pool, the base model observed once, adapters tuned and graded in this process.

What a benchmark of query strategies or of rounds repeats a hundred times is tuning; Ray, vLLM and the report around it
would take longer than the training itself. So the same functions that the engine's workers call are called here
directly, with the settings of `arms.WITHOUT_DECODER`. Whatever was observed or tuned is kept in the lab's folder, so
a benchmark that is stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arms import WITHOUT_DECODER
from scipy.special import logit
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config import load_config
from engine.inputs import cache_dir
from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.answers.grading import grade_answers
from ka2l.knowledge.evidence import combine
from ka2l.knowledge.hidden_states import Extracted, HiddenStateExtractor
from ka2l.knowledge.labels import Labels, label_questions, split_seed_questions
from ka2l.knowledge.probe import Probe, fit_probe
from ka2l.knowledge.semantic_entropy import (
    disagreement,
    discrete_semantic_entropy,
    mean_token_log_likelihood,
    predictive_entropy,
    weighted_semantic_entropy,
)
from ka2l.model.loading import ModelConfig, load_tokenizer
from ka2l.prompts import Prompter
from ka2l.sampling.sampler import Generation, Request, TransformersSampler
from ka2l.seeds import row_seed
from ka2l.testbed.build import cached_testbed
from ka2l.tuning.config import TuningConfig
from ka2l.tuning.sft import training_rows, tune


class Observed(NamedTuple):
    """What the base model said of one question."""

    answers: list[str]
    """Sampled at temperature 1, in the order drawn."""
    logprobs: list[float]
    """Of each sampled answer, nats."""
    greedy: str
    greedy_logprob: float
    """Mean over its tokens, nats."""
    correct: bool
    """Whether the greedy answer is right, by the pool's references."""


class Lab:
    """A testbed, its base model, and what tuning makes of it.

    Args:
        folder: holds all that is made; another lab with the same settings and folder makes nothing anew.
        settings: beside `arms.WITHOUT_DECODER`, as ``a.b=c``.
        seed: of the testbed and of everything drawn here.
        num_samples: answers drawn a question.
        splits: whose questions are sampled beside being answered greedily.
    """

    def __init__(
        self,
        folder: Path,
        settings: Sequence[str],
        seed: int,
        num_samples: int = 10,
        splits: Sequence[str] = ("seed", "candidate"),
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.num_samples = num_samples
        self.splits = splits
        given = [f"seed={seed}", f"testbed.seed={seed}", *WITHOUT_DECODER, *settings]
        self.config = load_config("quickstart", given)
        self.testbed = cached_testbed(self.config.testbed, cache_dir() / "testbeds")
        lines = self.testbed.pool.read_text(encoding="utf-8").splitlines()
        self.rows: dict[str, dict[str, Any]] = {row["id"]: row for row in map(json.loads, lines)}
        folder.mkdir(parents=True, exist_ok=True)
        model = ModelConfig(path=str(self.testbed.model), dtype="float32")
        self.prompter = Prompter(load_tokenizer(model), self.config.prompt)

    def ids(self, split: str) -> list[str]:
        """Questions of ``seed``, ``candidate`` or ``eval``, in the pool's order."""
        return [name for name, row in self.rows.items() if row["split"] == split]

    # --- the base model ----------------------------------------------------------------------------------------------

    @cached_property
    def observed(self) -> dict[str, Observed]:
        """The base model's answers to every question."""
        file = self.folder / f"observed-{self.num_samples}-{'-'.join(self.splits)}.json"
        if not file.exists():
            sampled = [name for name in self.rows if self.rows[name]["split"] in self.splits]
            greedy = self.greedy(list(self.rows))
            drawn = dict(zip(sampled, self.sample(sampled), strict=True))
            table = {
                name: Observed(
                    [made.answer for made in drawn.get(name, [])],
                    [made.logprob for made in drawn.get(name, [])],
                    answer,
                    mean_token_log_likelihood(logprob, num_tokens),
                    correct,
                )
                for name, (answer, logprob, num_tokens, correct) in greedy.items()
            }
            file.write_text(json.dumps(table), encoding="utf-8")
        return {name: Observed(*row) for name, row in json.loads(file.read_text(encoding="utf-8")).items()}

    def sample(self, names: Sequence[str], adapter: Path | None = None) -> list[list[Generation]]:
        """``num_samples`` answers a question, of the base model or of a tuned one."""
        requests = [
            Request(
                self.prompter.token_ids(self.rows[name]["question"]),
                self.num_samples,
                1.0,
                row_seed(self.seed, 0, "lab", name),
            )
            for name in names
        ]
        return self._sampler(adapter).generate(requests)

    def _sampler(self, adapter: Path | None = None) -> TransformersSampler:
        path = None if adapter is None else str(adapter)
        return TransformersSampler(str(self.testbed.model), self.config.sampler, dtype="float32", adapter=path)

    def greedy(self, names: Sequence[str], adapter: Path | None = None) -> dict[str, tuple[str, float, int, bool]]:
        """Answer, its log-probability (nats), tokens, and whether it is right, by question."""
        requests = [Request(self.prompter.token_ids(self.rows[name]["question"]), 1, 0.0, 0) for name in names]
        made = [row[0] for row in self._sampler(adapter).generate(requests)]
        grades = grade_answers(
            [self.rows[name]["question"] for name in names],
            [answer.answer for answer in made],
            [self.rows[name]["answers"] for name in names],
            LexicalEquivalence(),
        )
        return {
            name: (answer.answer, answer.logprob, len(answer.token_ids), grade.correct)
            for name, answer, grade in zip(names, made, grades, strict=True)
        }

    def clusters(self, names: Sequence[str], num_samples: int | None = None) -> list[list[int]]:
        """Clusters of the first ``num_samples`` sampled answers of each question."""
        most = num_samples or self.num_samples
        answers = [self.observed[name].answers[:most] for name in names]
        return self.grouped(names, answers)

    def grouped(self, names: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Clusters of any answers to questions."""
        return cluster_answers([self.rows[name]["question"] for name in names], answers, LexicalEquivalence()).ids

    def uncertainty(self, names: Sequence[str], num_samples: int | None = None) -> dict[str, np.ndarray]:
        """Scores that rise with doubt, each (n,): semantic_entropy, weighted_semantic_entropy, predictive_entropy,
        all nats of the first ``num_samples`` answers, and log_likelihood, minus the greedy answer's nats a token."""
        most = num_samples or self.num_samples
        rows = [self.observed[name] for name in names]
        ids = self.clusters(names, most)
        return {
            "log_likelihood": np.array([-row.greedy_logprob for row in rows]),
            "predictive_entropy": np.array([predictive_entropy(row.logprobs[:most]) for row in rows]),
            "semantic_entropy": np.array([discrete_semantic_entropy(found) for found in ids]),
            "weighted_semantic_entropy": np.array(
                [
                    weighted_semantic_entropy(found, row.logprobs[:most], row.answers[:most])
                    for found, row in zip(ids, rows, strict=True)
                ]
            ),
        }

    def correct(self, names: Sequence[str]) -> np.ndarray:
        """Whether the base model's greedy answer is right, shape (n,)."""
        return np.array([self.observed[name].correct for name in names])

    @cached_property
    def _extracted(self) -> Extracted:
        files = [self.folder / f"{name}.npy" for name in Extracted._fields]
        if not all(file.exists() for file in files):
            for file, values in zip(files, self.extract(list(self.rows)), strict=True):
                np.save(file, values)
        return Extracted(*map(np.load, files))

    def extract(self, names: Sequence[str], adapter: Path | None = None) -> Extracted:
        """What a forward pass tells of questions: states, shape (n, L, D), and certainty of the next token, (n, 3)."""
        path = None if adapter is None else str(adapter)
        extractor = HiddenStateExtractor(str(self.testbed.model), self.config.extraction, dtype="float32", adapter=path)
        self.layers = extractor.layers
        return extractor.extract([self.prompter.token_ids(self.rows[name]["question"]) for name in names])

    def states(self, names: Sequence[str]) -> np.ndarray:
        """The base model's hidden states, shape (n, L, D)."""
        return self._extracted.states[self._rows_of(names)]

    def next_token(self, names: Sequence[str]) -> np.ndarray:
        """The base model's certainty of the first answer token, shape (n, 3)."""
        return self._extracted.next_token[self._rows_of(names)]

    def _rows_of(self, names: Sequence[str]) -> list[int]:
        row_of = {name: row for row, name in enumerate(self.rows)}
        return [row_of[name] for name in names]

    def log_odds(self, names: Sequence[str]) -> np.ndarray:
        """The base model's probe on questions: calibrated log-odds of unknown, shape (n,)."""
        return self.probe.predict_logit(self.states(names), self.next_token(names))

    @cached_property
    def probe_splits(self) -> dict[str, str]:
        """Train, validation or test for each seed question."""
        ids = self.ids("seed")
        groups = [self.rows[name].get("group") for name in ids]
        return dict(zip(ids, split_seed_questions(ids, groups, self.config.labels, self.seed), strict=True))

    def labels(self, num_samples: int | None = None) -> Labels:
        """Known or unknown for each seed question."""
        ids = self.ids("seed")
        entropies = self.uncertainty(ids, num_samples)["semantic_entropy"]
        return label_questions(ids, entropies, [self.probe_splits[name] for name in ids])

    @cached_property
    def probe(self) -> Probe:
        """Fitted on the seed questions as the engine does in round 0."""
        ids = self.ids("seed")
        states = self.states(ids)
        return fit_probe(
            states,
            self.labels().unknown,
            [self.probe_splits[name] for name in ids],
            range(states.shape[1]),
            self.config.probe,
            row_seed(self.seed, 0, "probe", ""),
            targets=self.disagreement(ids),
            next_token=self.next_token(ids),
        )

    def disagreement(self, names: Sequence[str], num_samples: int | None = None) -> np.ndarray:
        """Probability that the base model disagrees with itself, by its first ``num_samples`` answers, shape (n,)."""
        most = num_samples or self.num_samples
        drawn = zip(self.clusters(names, most), (self.observed[name] for name in names), strict=True)
        return np.array([disagreement(ids, seen.logprobs[:most], seen.answers[:most]) for ids, seen in drawn])

    def evidence(self, names: Sequence[str]) -> np.ndarray:
        """What the engine ranks candidates by in its first round, shape (n,): the probe, and the disagreement of the
        samples that are drawn for rehearsal. Log-odds of unknown."""
        return combine(self.log_odds(names), own_doubt=logit(self.disagreement(names)))

    # --- tuned models ------------------------------------------------------------------------------------------------

    def tuned(
        self,
        annotated: Sequence[str],
        rehearsal: Mapping[str, Sequence[str]],
        *,
        keep: bool = False,
        **settings: Any,
    ) -> tuple[np.ndarray, Path]:
        """Tune on references of ``annotated`` and on own answers, and grade the eval questions.

        Args:
            rehearsal: own answers by question; annotated ones are dropped.
            keep: leave the adapter in its folder, for more than grading.
            settings: of the section ``tuning``, where others than the preset's.

        Returns:
            Whether each eval question is answered rightly, shape (num_eval,), and the adapter's folder.
        """
        config = TuningConfig.model_validate(self.config.tuning.model_dump(by_alias=True) | settings)
        marks = [
            sorted(annotated),
            sorted((name, list(own)) for name, own in rehearsal.items()),
            config.result_fields(),
        ]
        digest = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
        folder = self.folder / "tuned" / digest
        graded = folder / "correct.json"
        if not graded.exists() or (keep and not (folder / "adapter").exists()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            text_of = {name: self.prompter.text(row["question"]) for name, row in self.rows.items()}
            rows = training_rows(
                [(name, text_of[name], self.rows[name]["answers"][0]) for name in annotated],
                [(name, text_of[name], list(own)) for name, own in rehearsal.items()],
                config,
                self.seed,
                chat=self.prompter.is_chat,
            )
            seed = row_seed(self.seed, 0, "tune", "")
            model = str(self.testbed.model)
            # On a CPU the backward pass of the fused attention in bfloat16 takes four times as long as the plain one.
            with sdpa_kernel(SDPBackend.MATH):
                result = tune(model, rows, config, str(folder / "adapter"), seed, chat=self.prompter.is_chat)
            found = self.greedy(self.ids("eval"), folder / "adapter")
            if not keep:
                shutil.rmtree(folder / "adapter")
            figures = {"correct": [int(row[3]) for row in found.values()], "num_steps": result.metrics["num_steps"]}
            graded.write_text(json.dumps(figures), encoding="utf-8")
        return np.array(json.loads(graded.read_text())["correct"], dtype=bool), folder / "adapter"

    def own_answers(self, kind: str = "samples") -> dict[str, list[str]]:
        """The base model's answers to candidates and seed questions: its ``samples``, its ``greedy`` answer, or, of the
        samples, one of the largest cluster (``majority``)."""
        names = [*self.ids("candidate"), *self.ids("seed")]
        if kind == "greedy":
            return {name: [self.observed[name].greedy] for name in names}
        if kind == "samples":
            return {name: self.observed[name].answers for name in names}
        found = zip(names, self.clusters(names), strict=True)
        return {name: [self.observed[name].answers[ids.index(max(ids, key=ids.count))]] for name, ids in found}
