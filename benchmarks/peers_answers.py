"""What ``bench_peers.py`` gives to all sides: answers, and verdicts on which of them mean the same; and a peer's
clusters made once more from its verdicts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ka2l.answers.equivalence import Equivalence, NLIEquivalence
from ka2l.evaluation.statistics import exact_match
from ka2l.prompts import PromptConfig, Prompter
from ka2l.sampling.sampler import Request, SamplerConfig, TransformersSampler
from ka2l.seeds import row_seed
from ka2l.testbed.build import Testbed

Verdicts = dict[str, dict[str, bool]]


class Answered(NamedTuple):
    """A question with its answers."""

    question: str
    references: list[str]
    sampled: list[str]
    greedy: str

    @property
    def texts(self) -> list[str]:
        """What an NLI model is shown of the sampled answers."""
        return [f"{self.question} {answer}" for answer in self.sampled]

    @property
    def is_right(self) -> bool:
        """Whether the greedy answer is."""
        return exact_match(self.greedy, self.references)


def draw(testbed: Testbed, num_questions: int, num_samples: int) -> tuple[list[Answered], list[Answered]]:
    """Seed questions with their answers, in random order, and further ones to take solved examples from."""
    rows = [json.loads(line) for line in testbed.pool.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "seed"]
    random.Random(0).shuffle(rows)
    config = SamplerConfig(kind="transformers", num_samples=num_samples, max_tokens=16)
    sampler = TransformersSampler(str(testbed.model), config, dtype="float32")
    prompter = Prompter(sampler.tokenizer, PromptConfig(template="plain", instruction="", num_shots=0))
    ids = [prompter.token_ids(row["question"]) for row in rows]
    seeds = [row_seed(0, 0, "observe", row["id"]) for row in rows]
    sampled = sampler.generate([Request(*one, num_samples, 1.0, seed) for *one, seed in zip(ids, seeds, strict=True)])
    greedy = sampler.generate([Request(one, 1, 0.0, 0) for one in ids])
    answered = [
        Answered(row["question"], row["answers"], [made.answer for made in many], one.answer)
        for row, many, (one,) in zip(rows, sampled, greedy, strict=True)
    ]
    return answered[:num_questions], answered[num_questions:]


# --- who says what means the same ------------------------------------------------------------------------------------


class Given:
    """An equivalence that looks verdicts up; both directions have to say so, as in `NLIEquivalence`."""

    def __init__(self, verdicts: Verdicts) -> None:
        self.verdicts = verdicts

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See `ka2l.answers.equivalence.Equivalence`."""
        pairs = [(f"{q} {a}", f"{q} {b}") for q, a, b in zip(questions, left, right, strict=True)]
        return [self.verdicts[a][b] and self.verdicts[b][a] for a, b in pairs]


def verdicts_of(equivalence: Equivalence, rows: Sequence[Answered]) -> Verdicts:
    """Verdicts on every ordered pair of different answers to the same question."""
    asked = [(row, *pair) for row in rows for pair in itertools.permutations(dict.fromkeys(row.sampled), 2)]
    same = equivalence.equivalent([row.question for row, *_ in asked], [a for _, a, _ in asked], [b for *_, b in asked])
    found: Verdicts = {text: {text: True} for row in rows for text in row.texts}
    for (row, a, b), verdict in zip(asked, same, strict=True):
        found[f"{row.question} {a}"][f"{row.question} {b}"] = verdict
    return found


def entailments(nli: NLIEquivalence, rows: Sequence[Answered]) -> Verdicts:
    """What the NLI model says of every ordered pair, of a text with itself, too."""
    pairs = [pair for row in rows for pair in itertools.product(dict.fromkeys(row.texts), repeat=2)]
    found: Verdicts = {}
    for (a, b), verdict in zip(pairs, nli._entails(pairs), strict=True):
        found.setdefault(a, {})[b] = verdict
    return found


# --- the same by what a peer's source says it does -------------------------------------------------------------------

Clusters = list[list[int]]


def clusters_by(texts: Sequence[str], same: Callable[[str, str], bool], *, join_all: bool) -> Clusters:
    """Greedy clustering by first answers; with ``join_all`` an answer joins every cluster it matches, not the first."""
    clusters: Clusters = []
    for index, text in enumerate(texts):
        matching = [cluster for cluster in clusters if same(texts[cluster[0]], text)]
        for cluster in matching if join_all else matching[:1]:
            cluster.append(index)
        if not matching:
            clusters.append([index])
    return clusters


def as_uqlm(texts: Sequence[str], verdicts: Verdicts) -> Clusters:
    """Either direction is enough, and an answer may stand in several clusters."""
    return clusters_by(texts, lambda a, b: a == b or verdicts[a][b] or verdicts[b][a], join_all=True)


def as_lm_polygraph(texts: Sequence[str], verdicts: Verdicts) -> Clusters:
    """Both directions, but the model is also asked whether a text entails itself."""
    return clusters_by(texts, lambda a, b: verdicts[a][b] and verdicts[b][a], join_all=False)


AS_PEER = {"uqlm": as_uqlm, "lm_polygraph": as_lm_polygraph}


def canonical(clusters: Clusters) -> list[list[int]]:
    """Clusters whatever their order."""
    return sorted(sorted(cluster) for cluster in clusters)


def from_ids(ids: Sequence[int]) -> Clusters:
    """Clusters as positions of their answers."""
    return [[place for place, other in enumerate(ids) if other == one] for one in sorted(set(ids))]
