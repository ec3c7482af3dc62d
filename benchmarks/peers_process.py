"""A peer that ``bench_peers.py`` asks, in the peers' own environment: ``python peers_process.py PEER DATA.json``.

PEER is ``uqlm`` or ``lm_polygraph``. Of its own this file only calls them and counts; nothing of ka2l is imported.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from sides import serve, timed

Verdicts = dict[str, dict[str, bool]]


class Peer:
    """What is asked of either.

    Args:
        data: ``texts`` (each answer after its question, by question), ``verdicts`` (name -> text -> text -> same),
            ``nli`` and ``causal_lm`` (model directories), ``prompts`` (for P(True)), ``batch_size``.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.texts: list[list[str]] = data["texts"]
        self.batch_size: int = data["batch_size"]

    def versions(self) -> dict[str, str]:
        """Of what decides the figures."""
        from importlib.metadata import version

        return {name: version(name) for name in ("uqlm", "lm-polygraph", "transformers", "torch", "numpy")}

    def answer(self, what: str, **options: Any) -> Any:
        """The method ``what``."""
        return getattr(self, what)(**options)


class Uqlm(Peer):
    """uqlm's ``SemanticEntropy``, as its documentation calls it, with the model or the verdicts put in its place."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        from uqlm.nli import NLI

        self.nli = NLI(device="cpu", nli_model_name=data["nli"], batch_size=self.batch_size)
        label = {index: name.lower() for index, name in self.nli.model.config.id2label.items()}
        assert [label[index] for index in range(3)] == self.nli.label_mapping, "uqlm takes labels by their position"

    def entropies(self, verdicts: str | None = None) -> dict[str, Any]:
        """Discrete semantic entropy and clusters (positions of answers) by question; seconds of the entropies."""
        from types import SimpleNamespace

        import uqlm.scorers.shortform.entropy as module
        from uqlm import SemanticEntropy
        from uqlm.nli import SemanticClusterer

        module.time = SimpleNamespace(sleep=lambda seconds: None)  # a pause of 0.1 s a call, for its progress bar
        nli = self.nli if verdicts is None else GivenNLI(self.data["verdicts"][verdicts])
        nli.probabilities = {}  # what it keeps of earlier calls
        counter = Counted(nli)
        scorer = SemanticEntropy(nli=counter, use_best=False, prompts_in_nli=False)
        first, rest = [row[0] for row in self.texts], [row[1:] for row in self.texts]
        result, seconds = timed(lambda: scorer.score(responses=first, sampled_responses=rest, show_progress_bars=False))
        num_pairs = counter.num_pairs
        clusterer = SemanticClusterer(nli=nli)
        clusters = [[list(map(int, one)) for one in clusterer.cluster_responses(row)[1]] for row in self.texts]
        values = list(map(float, result.data["discrete_entropy_values"]))
        return {"values": values, "clusters": clusters, "seconds": seconds, "num_pairs": num_pairs}


class GivenNLI:
    """Verdicts in place of uqlm's NLI model."""

    def __init__(self, verdicts: Verdicts) -> None:
        self.verdicts = verdicts
        self.probabilities: dict[Any, Any] = {}

    def get_nli_results_batch(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """As uqlm's own: one result a pair, entailment where either direction says so."""
        results = []
        for left, right in pairs:
            same = left == right or self.verdicts[left][right] or self.verdicts[right][left]
            results.append({"noncontradiction_score": float(same), "entailment": same, "entailment_score": float(same)})
        return results


class Counted:
    """Counts the ordered pairs of different texts that an NLI model is asked about."""

    def __init__(self, nli: Any) -> None:
        self.nli = nli
        self.num_pairs = 0
        self.asked: set[tuple[str, str]] = set()

    def get_nli_results_batch(self, pairs: list[tuple[str, str]]) -> Any:
        """Of the model, counted."""
        new = {pair for pair in pairs if pair[0] != pair[1]} - self.asked
        self.asked |= new | {(right, left) for left, right in new}
        self.num_pairs += 2 * len(new)
        return self.nli.get_nli_results_batch(pairs)


class LmPolygraph(Peer):
    """lm-polygraph's statistics and its ``SemanticEntropy`` with class frequencies, as its manager calls them."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        from lm_polygraph.utils.deberta import MultilingualDeberta
        from lm_polygraph.utils.model import WhiteboxModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.nli = MultilingualDeberta(deberta_path=data["nli"], batch_size=self.batch_size, device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(data["causal_lm"], padding_side="left")
        self.model = WhiteboxModel(AutoModelForCausalLM.from_pretrained(data["causal_lm"]).eval(), tokenizer)

    def entropies(self, verdicts: str | None = None) -> dict[str, Any]:
        """Discrete semantic entropy and clusters (positions of answers) by question; seconds of the entropies."""
        from lm_polygraph.estimators import SemanticEntropy
        from lm_polygraph.stat_calculators.semantic_classes import SemanticClassesCalculator
        from lm_polygraph.stat_calculators.semantic_matrix import SemanticMatrixCalculator

        def work() -> tuple[Any, Any]:
            stats: dict[str, Any] = {"sample_texts": self.texts}
            if verdicts is None:
                stats |= SemanticMatrixCalculator(self.nli)(stats, [], None)
            else:
                stats |= self._given_matrix(self.data["verdicts"][verdicts])
            stats |= SemanticClassesCalculator()(stats, [], None)
            estimator = SemanticEntropy(class_probability_estimation="frequency")
            return estimator(stats), stats["semantic_classes_entail"]["class_to_sample"]

        (values, classes), seconds = timed(work)
        clusters = [[list(map(int, one)) for one in classes[index]] for index in range(len(self.texts))]
        num_pairs = sum(len(set(row)) ** 2 for row in self.texts)
        return {"values": values.tolist(), "clusters": clusters, "seconds": seconds, "num_pairs": num_pairs}

    def _given_matrix(self, verdicts: Verdicts) -> dict[str, Any]:
        """Verdicts in place of its NLI model, for every pair of different texts, as its own calculator asks."""
        import numpy as np

        matrices = []
        for row in self.texts:
            unique, inverse = np.unique(row, return_inverse=True)
            same = [a == b or verdicts[a][b] for a, b in itertools.product(unique.tolist(), repeat=2)]
            matrix = np.array(same, dtype=int).reshape(len(unique), len(unique))
            matrices.append(matrix[inverse][:, inverse])
        return {"semantic_matrix_entail": None, "semantic_matrix_classes": np.stack(matrices), "entailment_id": 1}

    def p_true(self, option: str) -> dict[str, Any]:
        """log p of an option after each prompt, nats, and the seconds; its own prompt is replaced by ours."""
        from lm_polygraph.stat_calculators.prompt import PromptCalculator

        calculator = PromptCalculator()
        calculator.prompt, calculator.expected = "{q}", option
        prompts: list[str] = self.data["prompts"]

        def work() -> list[float]:
            found: list[float] = []
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                stats = {"input_texts": batch, "greedy_texts": [""] * len(batch)}
                found += calculator(stats, batch, self.model)["p_true"].tolist()
            return found

        values, seconds = timed(work)
        return {"values": values, "seconds": seconds}


if __name__ == "__main__":
    peer = {"uqlm": Uqlm, "lm_polygraph": LmPolygraph}[sys.argv[1]]
    serve(peer(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))).answer)
