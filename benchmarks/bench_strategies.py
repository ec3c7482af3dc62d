"""Which query strategy learns most from an annotation? All of them, at the same budgets, with the same tuner.

Every seed of every world has a testbed of its own: a model taught three quarters of its facts, well or a little. Each
strategy ranks the same candidates by what the base model shows, once for each budget; references of the chosen are
tuned on, with the model's own answers to the rest, and unseen paraphrases of all candidates' facts are graded. As in
the engine, ``probe`` and what builds on it count the disagreement of the samples that are drawn for rehearsal. Arms
beside the strategies: ``probe_alone`` (without that), ``first_token`` (least confidence: the lower the probability of
the likeliest first token, the sooner; what the probe has to be worth its seed questions against), ``random_alone``
(random, without rehearsal) and ``all`` (every candidate annotated). Compared is the area under the learning curve, from
no annotation to half of the candidates, paired over seeds (t-test).

Worlds: invented people; EntityQuestions; PopQA, where page views say how well a fact is known. The latter two need the
question files in ``--data``. A seed that stands in the newest result already is not run again. About 25 minutes a seed
and world on two cores.

    python benchmarks/bench_strategies.py --worlds people entity_questions popqa --seeds 0 1 2 3 4
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lab import Lab
from scipy.special import expit
from scipy.stats import ttest_rel
from worlds import measure_worlds

from ka2l.evaluation.statistics import auroc, proportion_with_ci
from ka2l.knowledge.perplexity import PerplexityScorer, question_tokens
from ka2l.seeds import row_seed
from ka2l.selection.candidates import Candidates
from ka2l.selection.strategies import STRATEGIES, SelectionConfig, select

#: Shares of the candidates that are annotated.
BUDGETS = (0.125, 0.25, 0.5)
#: What is compared with all others: what the default, ``two_axis``, is in a single round.
DEFAULT = "probe"
#: What ``two_axis`` would draw from what looks known if rounds were to come, with budget to spare.
EXPLORE = 0.1
#: Arms that rank by a score of their own.
BY_SCORE = ("probe_alone", "first_token")
ARMS = (*sorted(STRATEGIES), *BY_SCORE, "random_alone")


def candidates_of(lab: Lab) -> Candidates:
    """All that any strategy looks at."""
    ids = lab.ids("candidate")
    states = lab.states(ids)[:, lab.probe.layers.index(lab.probe.layer)]
    doubts = lab.uncertainty(ids)
    scorer = PerplexityScorer(str(lab.testbed.model), dtype="float32")
    texts = [question_tokens(lab.prompter, lab.rows[name]["question"]) for name in ids]
    return Candidates(
        question_ids=ids,
        score=lab.evidence(ids),
        p_unknown=expit(lab.log_odds(ids)),
        entropy=doubts["semantic_entropy"],
        states=states,
        predictive_entropy=doubts["predictive_entropy"],
        perplexity=np.log(scorer.perplexities(texts)),
    )


def curves(lab: Lab) -> dict[str, Any]:
    """Accuracy of each arm at each budget, and what the candidates' scores are worth."""
    candidates = candidates_of(lab)
    ids = candidates.question_ids
    scores = dict(zip(BY_SCORE, (candidates.p_unknown, -lab.next_token(ids)[:, 1]), strict=True))
    own = lab.own_answers()
    seed = row_seed(lab.seed, 0, "select", "")
    base = lab.correct(lab.ids("eval"))
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        seen = candidates._replace(score=scores.get(arm, candidates.score))
        kind = "probe" if arm in BY_SCORE else arm.removesuffix("_alone")
        for share in BUDGETS:
            config = SelectionConfig(kind=kind, budget=round(share * len(ids)), explore=EXPLORE)
            chosen = select(seen, config, seed)
            names = [ids[row] for row in chosen.indices]
            point = {"num_annotated": len(names), "num_wrong": int((~lab.correct(names)).sum())}
            found.setdefault(arm, []).append(point | graded(lab, names, {} if arm == "random_alone" else own))
            print(lab.folder.name, arm, len(names), found[arm][-1]["accuracy"], flush=True)
    wrong = ~lab.correct(ids)
    return {
        "num_candidates": len(ids),
        "base": {"accuracy": base.mean(), "num_eval": len(base)},
        "all": graded(lab, ids, own),
        "unknown_share": wrong.mean(),
        "auroc_wrong": {"probe": auroc(wrong, candidates.score), "semantic_entropy": auroc(wrong, candidates.entropy)},
        "curves": found,
    }


def graded(lab: Lab, names: list[str], own: dict[str, list[str]]) -> dict[str, Any]:
    """Accuracy after tuning on these annotations, and what share of the base model's right answers is kept."""
    correct, _ = lab.tuned(names, own)
    base = lab.correct(lab.ids("eval"))
    share = proportion_with_ci(correct)
    return {"accuracy": share.value, "ci": [share.low, share.high], "kept": correct[base].mean()}


def area(run: dict[str, Any], arm: str) -> float:
    """Mean accuracy over the budgets from 0 to the largest, by trapezoids: area over width."""
    shares = [0.0, *BUDGETS]
    heights = [run["base"]["accuracy"], *(point["accuracy"] for point in run["curves"][arm])]
    return float(np.trapezoid(heights, shares) / shares[-1])


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Areas of every arm over the seeds of one world, and the default's paired differences."""
    arms = sorted(set.intersection(*(set(run["curves"]) for run in runs.values())))
    areas = {arm: np.array([area(run, arm) for run in runs.values()]) for arm in arms}
    table: dict[str, Any] = {}
    for arm in arms:
        difference = areas[DEFAULT] - areas[arm]
        p_value = None
        if arm != DEFAULT and len(runs) > 1 and difference.any():
            p_value = float(ttest_rel(areas[DEFAULT], areas[arm]).pvalue)
        table[arm] = {"area": areas[arm].mean(), "by_seed": areas[arm], "ahead": difference.mean(), "p": p_value}
    half = [(run["curves"][DEFAULT][-1], run["all"]) for run in runs.values()]
    return {
        "areas": table,
        "half_budget": {
            "default": np.mean([point["accuracy"] for point, _ in half]),
            "all": np.mean([everything["accuracy"] for _, everything in half]),
            "seeds_within_ci_of_all": sum(point["accuracy"] >= full["ci"][0] for point, full in half),
            "unknown_share": np.mean([run["unknown_share"] for run in runs.values()]),
        },
    }


if __name__ == "__main__":
    measured = {"budgets": BUDGETS, "arms": ARMS}
    measure_worlds(__doc__, "strategies", measured, curves, compare)
