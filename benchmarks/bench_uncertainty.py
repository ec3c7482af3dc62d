"""What tells best that a model does not know? Scores of uncertainty side by side, all on the same questions.

Targets, both of eval questions, on which nothing is fitted: ``wrong``, the greedy answer is wrong; ``unknown``, the
semantic entropy of ten further answers is above the threshold fitted on seed questions. Scores: log-likelihood of the
greedy answer, predictive entropy, P(True), semantic entropy (discrete and weighted by likelihood) of ten answers; and,
from one forward pass, a logistic probe on the entropy label (SEP), a logistic probe on whether the seed questions'
answers are right (which needs their references), and KA2L's probe. Then: the probe by layer, two principal components
of the states, the number of answers sampled, the number of seed questions, and probes that have not seen the question
set that they are asked about.

Worlds: ``people``, invented people, and ``mixed``, four question sets at once, from ``--data``. About 10 minutes a seed
and world on two cores, most of it for training the testbeds' models.

    python benchmarks/bench_uncertainty.py --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lab import Lab
from scipy.special import logit
from worlds import WORLDS, measure_worlds

from ka2l.evaluation.statistics import auroc, auroc_with_ci
from ka2l.knowledge.evidence import combine
from ka2l.knowledge.labels import split_seed_questions
from ka2l.knowledge.p_true import SolvedExample, p_true, p_true_prompt, split_examples
from ka2l.knowledge.perplexity import PerplexityScorer
from ka2l.knowledge.probe import Probe, fit_probe
from ka2l.knowledge.semantic_entropy import discrete_semantic_entropy
from ka2l.sampling.early_stop import FIRST, WAVE, expected_entropy, is_settled
from ka2l.schemas import NEXT_TOKEN
from ka2l.seeds import row_seed

#: Answers drawn a question: the first half scores, the second half labels.
NUM_DRAWN = 20
NUM_SAMPLES = 10
NUM_BRAINSTORMED = 3
NUM_SAMPLES_TRIED = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
NUM_SEEDS_TRIED = (50, 100, 200, 400, 800)
NUM_SEED_DRAWS = 5
#: Points of each kind in the picture of principal components.
NUM_POINTS = 150


def fit(
    lab: Lab,
    names: Sequence[str],
    labels: np.ndarray,
    kind: str,
    layers: Sequence[int] | None = None,
    num_samples: int | None = None,
    *,
    certain: bool = False,
) -> Probe:
    """A probe of some kind on seed questions with these labels.

    The engine's is trained for how far the samples disagree, so many where ``num_samples`` is given, and is
    ``certain``: it reads how sure the model is of the first answer token, too.
    """
    groups = [lab.rows[name].get("group") for name in names]
    states = lab.states(names)
    chosen = list(range(states.shape[1]) if layers is None else layers)
    return fit_probe(
        states[:, chosen],
        labels,
        split_seed_questions(names, groups, lab.config.labels, lab.seed),
        chosen,
        lab.config.probe.model_copy(update={"kind": kind}),
        row_seed(lab.seed, 0, "probe", kind),
        targets=None if num_samples is None else lab.disagreement(names, num_samples),
        next_token=lab.next_token(names) if certain else None,
    )


def score(lab: Lab, probe: Probe, names: Sequence[str]) -> np.ndarray:
    """The probe's log-odds of unknown, shape (n,)."""
    return probe.predict_logit(lab.states(names)[:, probe.layer], lab.next_token(names))


def unknown_later(lab: Lab, names: Sequence[str], threshold: float) -> np.ndarray:
    """Whether the entropy of the second half of the answers is above the threshold, shape (n,)."""
    answers = [lab.observed[name].answers[NUM_SAMPLES:] for name in names]
    ids = lab.grouped(names, answers)
    return np.array([discrete_semantic_entropy(found) for found in ids]) >= threshold


def doubt_by_p_true(lab: Lab, names: Sequence[str]) -> np.ndarray:
    """Minus P(True) of the greedy answers after two solved examples; few brainstormed answers, since a testbed's model
    reads 512 tokens."""
    seeds = lab.ids("seed")
    shown, _ = split_examples(lab.correct(seeds).tolist(), 2, lab.seed)
    examples = [
        SolvedExample(lab.rows[name]["question"], seen.greedy, seen.answers[:NUM_BRAINSTORMED], seen.correct)
        for name in (seeds[place] for place in shown)
        for seen in [lab.observed[name]]
    ]
    prompts = [
        p_true_prompt(lab.rows[name]["question"], seen.greedy, seen.answers[:NUM_BRAINSTORMED], examples)
        for name in names
        for seen in [lab.observed[name]]
    ]
    scorer = PerplexityScorer(str(lab.testbed.model), dtype="float32")
    found = p_true(scorer, lab.prompter.tokenizer, prompts, chat=False)
    print(f"P(True): {int(np.isnan(found).sum())} of {len(found)} prompts too long", flush=True)
    return -np.nan_to_num(found, nan=0.5)


def figures(lab: Lab) -> dict[str, Any]:
    """All AUROCs of one lab."""
    seeds, names = lab.ids("seed"), lab.ids("eval")
    labels = lab.labels(NUM_SAMPLES)
    targets = {"wrong": ~lab.correct(names), "unknown": unknown_later(lab, names, labels.threshold)}
    ours = fit(lab, seeds, labels.unknown, "mlp", num_samples=NUM_SAMPLES, certain=True)
    of_states = fit(lab, seeds, labels.unknown, "mlp", num_samples=NUM_SAMPLES)
    first_token = dict(zip(NEXT_TOKEN, lab.next_token(names).T, strict=True))
    scores = lab.uncertainty(names, NUM_SAMPLES) | {
        "p_true": doubt_by_p_true(lab, names),
        "sep": score(lab, fit(lab, seeds, labels.unknown, "linear"), names),
        "accuracy_probe": score(lab, fit(lab, seeds, ~lab.correct(seeds), "linear"), names),
        "first_token_entropy": first_token["entropy"],
        "first_token": -first_token["max_logprob"],
        "probe_on_labels": score(lab, fit(lab, seeds, labels.unknown, "mlp"), names),
        "probe_of_states": score(lab, of_states, names),
        "probe": score(lab, ours, names),
        "evidence": combine(score(lab, ours, names), own_doubt=logit(lab.disagreement(names, NUM_SAMPLES))),
    }
    return {
        "num_eval": len(names),
        "num_seed": len(seeds),
        "share": {target: truth.mean() for target, truth in targets.items()},
        "auroc": {
            target: {name: list(auroc_with_ci(truth, values, lab.seed)) for name, values in scores.items()}
            for target, truth in targets.items()
        },
        "probe_minus_semantic_entropy": {
            target: difference(truth, scores["probe"], scores["semantic_entropy"], lab.seed)
            for target, truth in targets.items()
        },
        "by_layer": by_layer(lab, of_states, targets["wrong"]),
        "components": components(lab, ours, names, targets["unknown"]),
        "by_num_samples": by_num_samples(lab, targets["wrong"]),
        "stop_early": [stop_early(lab, names, targets["wrong"], most) for most in (NUM_SAMPLES, NUM_DRAWN)],
        "by_num_seed": by_num_seed(lab, labels.unknown, targets["wrong"]),
    } | ({"leave_one_out": leave_one_out(lab)} if len(sources(lab)) > 1 else {})


def difference(truth: np.ndarray, one: np.ndarray, other: np.ndarray, seed: int) -> list[float]:
    """AUROC of one score less that of another, with the interval of a paired bootstrap over questions."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(truth), size=len(truth)) for _ in range(500))
    differences = [auroc(truth[rows], one[rows]) - auroc(truth[rows], other[rows]) for rows in drawn]
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return [auroc(truth, one) - auroc(truth, other), float(low), float(high)]


def by_layer(lab: Lab, probe: Probe, wrong: np.ndarray) -> list[dict[str, Any]]:
    """A probe of each layer's states: AUROC for unknown on its own test split, for wrong answers on eval questions."""
    seeds, names = lab.ids("seed"), lab.ids("eval")
    rows = []
    for row in probe.metrics["by_layer"]:
        alone = fit(lab, seeds, lab.labels(NUM_SAMPLES).unknown, "mlp", [row["layer"]], NUM_SAMPLES)
        wrong_here = auroc_with_ci(wrong, score(lab, alone, names), lab.seed)
        unknown = [row["test_auroc"], *row["test_auroc_ci"]]
        rows.append({"layer": row["layer"], "unknown": unknown, "wrong": list(wrong_here)})
    return rows


def components(lab: Lab, probe: Probe, names: Sequence[str], unknown: np.ndarray) -> dict[str, Any]:
    """Two principal components of eval questions' states, of some known and some unknown ones."""
    points = probe.pca(lab.states(names)[:, probe.layer])
    kinds = {"known": points[~unknown][:NUM_POINTS], "unknown": points[unknown][:NUM_POINTS]}
    return {kind: np.round(rows, 2) for kind, rows in kinds.items()}


def by_num_samples(lab: Lab, wrong: np.ndarray) -> list[dict[str, Any]]:
    """Semantic entropy of the first n answers, and a probe on labels of n answers, for wrong answers."""
    seeds, names = lab.ids("seed"), lab.ids("eval")
    rows = []
    for count in NUM_SAMPLES_TRIED:
        entropy = lab.uncertainty(names, count)["semantic_entropy"]
        probe = fit(lab, seeds, lab.labels(count).unknown, "mlp", num_samples=count, certain=True)
        found = {"semantic_entropy": entropy, "probe": score(lab, probe, names)}
        rows.append({"num_samples": count} | {name: auroc(wrong, values) for name, values in found.items()})
    return rows


def stop_early(lab: Lab, names: Sequence[str], wrong: np.ndarray, most: int) -> dict[str, Any]:
    """`sampler.stop_early` against all ``most`` answers, and against the same number of answers for every question.

    The answers of a question are the first of those that were drawn, as the engine's are.
    """
    ids = lab.clusters(names, most)
    counts = []
    for name in names:
        answers = lab.observed[name].answers[:most]
        count = min(FIRST, most)
        while count < most and not is_settled(answers[:count]):
            count = min(most, count + WAVE)
        counts.append(count)
    whole = lab.uncertainty(names, most)["semantic_entropy"]

    def of_first(nums: Sequence[int]) -> np.ndarray:
        rows = zip(ids, (lab.observed[name] for name in names), nums, strict=True)
        return np.array(
            [expected_entropy(own[:num], seen.logprobs[:num], seen.answers[:num]) for own, seen, num in rows]
        )

    stopped, as_many = of_first(counts), of_first([round(float(np.mean(counts)))] * len(names))
    return {
        "num_samples": most,
        "share_drawn": np.mean(counts) / most,
        "auroc": auroc(wrong, stopped),
        "auroc_all": auroc(wrong, whole),
        "auroc_as_many_each": auroc(wrong, as_many),
        "difference": difference(wrong, stopped, whole, lab.seed),
    }


def by_num_seed(lab: Lab, unknown: np.ndarray, wrong: np.ndarray) -> list[dict[str, Any]]:
    """A probe on fewer seed questions, for wrong answers: mean over draws of them."""
    seeds, names = lab.ids("seed"), lab.ids("eval")
    rng = np.random.default_rng(lab.seed)
    rows = []
    for count in [*(count for count in NUM_SEEDS_TRIED if count < len(seeds)), len(seeds)]:
        found = []
        for _ in range(NUM_SEED_DRAWS):
            chosen = sorted(rng.permutation(len(seeds))[:count].tolist())
            names_here = [seeds[row] for row in chosen]
            probe = fit(lab, names_here, unknown[chosen], "mlp", num_samples=NUM_SAMPLES, certain=True)
            found.append(auroc(wrong, score(lab, probe, names)))
        rows.append({"num_seed": count, "probe": np.mean(found)})
    return rows


def sources(lab: Lab) -> set[str]:
    """The question sets that the world is made of."""
    return {row["relation"] for row in lab.rows.values()} & {name.partition(".")[0] for name in WORLDS["mixed"].files}


def leave_one_out(lab: Lab) -> dict[str, dict[str, Any]]:
    """For each question set: the probe fitted on it, on all others, on all; beside its own semantic entropy."""
    seeds, names = lab.ids("seed"), lab.ids("eval")
    unknown = lab.labels(NUM_SAMPLES).unknown
    source, asked = (np.array([lab.rows[name]["relation"] for name in ids]) for ids in (seeds, names))
    rows: dict[str, dict[str, Any]] = {}
    for part in sorted(set(source.tolist())):
        mine = [name for name, of in zip(names, asked, strict=True) if of == part]
        wrong = ~lab.correct(mine)
        chosen = {"own": source == part, "others": source != part, "all": np.ones(len(seeds), bool)}
        found: dict[str, np.ndarray] = {}
        for name, mask in chosen.items():
            fitted_on = [seeds[row] for row in np.flatnonzero(mask)]
            for kind, certain in (("probe", True), ("states", False)):
                probe = fit(lab, fitted_on, unknown[mask], "mlp", num_samples=NUM_SAMPLES, certain=certain)
                found[f"{kind}_{name}"] = score(lab, probe, mine)
        found["semantic_entropy"] = lab.uncertainty(mine, NUM_SAMPLES)["semantic_entropy"]
        rows[part] = {"num_eval": len(mine), "share_wrong": wrong.mean()} | {
            name: list(auroc_with_ci(wrong, values, lab.seed)) for name, values in found.items()
        }
    return rows


if __name__ == "__main__":
    measured = {"num_samples": NUM_SAMPLES, "num_drawn": NUM_DRAWN}
    measure_worlds(__doc__, "uncertainty", measured, figures, num_samples=NUM_DRAWN, splits=("seed", "eval"))
