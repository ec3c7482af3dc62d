"""Do several rounds win over one, and what makes them? Evidence, feedback and states, at the same budget.

On labs (see ``lab.py``): a quarter of the candidates annotated, a half where some were learnt wrongly, at once or in
three rounds, always tuned from the base model with all annotations and with its own samples of the rest as rehearsal.
Arms:

    one_round           by the base model's probe and by how far its samples, drawn for rehearsal, disagree
    one_round_probe     by the probe alone
    current_state       three rounds, each by a probe of the state tuned last alone
    all_states          by the probes of all states so far
    feedback_probe      by the base model's probe, fitted again with what annotation said of right and wrong
    feedback            the same and the samples' disagreement
    later               the same and all later states' probes: what ``ka2l run`` does by ``selection.kind probe``
    two_axis_0.1        by how likely the base model is wrong; up to a tenth of all rounds but the last explored
    two_axis            the same, up to a fifth explored: what ``ka2l run`` does unless told otherwise

For each: wrong answers of the base model among what was annotated, and accuracy on unseen paraphrases. Then stopping:
rounds of a tenth, by ``two_axis``, with the accuracy after each and the share of the rest that is predicted
unknown and wrong, and where four rules would have stopped. About 20 minutes a seed and world on two cores.

The weight of the samples' disagreement (`ka2l.knowledge.evidence`) was chosen on seeds 0 and 1, by AUROC for wrong
answers.

    python benchmarks/bench_rounds.py --worlds people_misled sets_misled people entity_questions --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lab import Lab
from scipy.special import expit, logit
from worlds import measure_worlds

from ka2l.evaluation.statistics import auroc, mean_with_ci, proportion_with_ci
from ka2l.knowledge.evidence import combine
from ka2l.knowledge.labels import label_questions
from ka2l.knowledge.probe import fit_probe
from ka2l.knowledge.semantic_entropy import disagreement, discrete_semantic_entropy
from ka2l.knowledge.wrongness import fit_correctness
from ka2l.seeds import row_seed
from ka2l.selection.candidates import Candidates
from ka2l.selection.strategies import SelectionConfig, explored_share, num_likely, select

#: Shares of the candidates: what is answered wrongly in doubt, roughly, and all that is answered wrongly.
BUDGET, BUDGET_MISLED = 0.25, 0.5
NUM_ROUNDS = 3
#: What a run does unless told otherwise.
DEFAULT = "two_axis"
#: Rounds of a tenth each, for the rules that stop.
NUM_STEPS = 7
#: Rules: the share of the rest that is predicted unknown, and points of accuracy gained by a round.
UNKNOWN_SHARE, GAIN = 0.05, 0.01


class Arm(NamedTuple):
    """What ranks the candidates that are left."""

    num_rounds: int = NUM_ROUNDS
    base: bool = True
    """The base model's probe."""
    feedback: bool = False
    """It is fitted again with the annotated questions."""
    doubt: bool = True
    """The disagreement of its samples of the candidates."""
    later: bool = False
    """Probes of the states tuned since."""
    explore: float | None = None
    """Ranked by how likely the base model is wrong, up to this share of all rounds but the last explored."""


class Round(NamedTuple):
    """What is annotated in a round, and what that was chosen by."""

    names: list[str]
    left: list[str]
    """Candidates that had not been annotated, n of them."""
    score: np.ndarray
    """Their evidence for unknown, shape (n,)."""
    ranked_by: np.ndarray
    """What they were ranked by, shape (n,): that, or how likely the base model is wrong."""


ARMS = {
    "one_round": Arm(num_rounds=1),
    "one_round_probe": Arm(num_rounds=1, doubt=False),
    "current_state": Arm(base=False, doubt=False, later=True),
    "all_states": Arm(doubt=False, later=True),
    "feedback_probe": Arm(feedback=True, doubt=False),
    "feedback": Arm(feedback=True),
    "later": Arm(feedback=True, later=True),
    "two_axis_0.1": Arm(feedback=True, explore=0.1),
    "two_axis": Arm(feedback=True, explore=0.2),
}


def run(lab: Lab, arm: Arm) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of each round of one arm, and whether each eval question is answered rightly, shape (num_eval,)."""
    ids, own = lab.ids("candidate"), lab.own_answers()
    share = BUDGET_MISLED if lab.config.testbed.wrong_share else BUDGET
    per_round = round(share * len(ids)) // arm.num_rounds
    asked: list[str] = []
    later: list[np.ndarray] = []
    aurocs = []
    for index in range(arm.num_rounds):
        chosen = one_round(lab, arm, asked, later, arm.num_rounds - index, per_round)
        aurocs.append(auroc(~lab.correct(chosen.left), chosen.ranked_by))
        asked += chosen.names
        if arm.later and index < arm.num_rounds - 1:
            later.append(state_logits(lab, lab.tuned(asked, own, keep=True)[1]))
    correct, _ = lab.tuned(asked, own)
    right = proportion_with_ci(correct)
    return {
        "num_annotated": len(asked),
        "num_wrong_found": int((~lab.correct(asked)).sum()),
        "num_wrong": int((~lab.correct(ids)).sum()),
        "auroc_wrong_of_the_rest": aurocs,
        "num_eval": len(correct),
        "accuracy": right.value,
        "ci": [right.low, right.high],
    }, correct


def one_round(
    lab: Lab, arm: Arm, asked: Sequence[str], later: Sequence[np.ndarray], num_rounds_left: int, budget: int
) -> Round:
    """What a round of an arm would annotate beside what was ``asked``, with ``num_rounds_left`` of them to go."""
    gone, ids = set(asked), lab.ids("candidate")
    rows = [row for row, name in enumerate(ids) if name not in gone]
    left = [ids[row] for row in rows]
    score = evidence(lab, arm, asked, later)[rows]
    p_wrong = None if arm.explore is None or not asked else wrongness(lab, asked)[rows]
    candidates = Candidates(question_ids=left, score=score, p_unknown=expit(score), p_wrong=p_wrong)
    kind = "probe" if arm.explore is None else "two_axis"
    config = SelectionConfig(kind=kind, budget=budget, explore=arm.explore or 0.0)
    explore = explored_share(config, budget * num_rounds_left, num_likely(candidates)) if num_rounds_left > 1 else 0.0
    seed = row_seed(lab.seed, len(asked), "select", "")
    chosen = select(candidates, config.model_copy(update={"explore": explore}), seed)
    return Round([left[row] for row in chosen.indices], left, score, score if p_wrong is None else p_wrong)


def evidence(lab: Lab, arm: Arm, asked: Sequence[str], later: Sequence[np.ndarray]) -> np.ndarray:
    """Log-odds of unknown of every candidate, shape (n,)."""
    ids = lab.ids("candidate")
    if not arm.base and later:
        return later[-1]
    base = base_logits(lab, asked if arm.feedback else [])
    return combine(base, list(later), logit(lab.disagreement(ids)) if arm.doubt else None)


def base_logits(lab: Lab, asked: Sequence[str]) -> np.ndarray:
    """The base model's probe on every candidate, with ``asked`` as further training rows where there are any."""
    ids, seeds, layer = lab.ids("candidate"), lab.ids("seed"), lab.probe.layer
    if not asked:
        return lab.log_odds(ids)
    fitted = fit_probe(
        lab.states([*seeds, *asked])[:, [layer]],
        np.concatenate([lab.labels().unknown, ~lab.correct(asked)]),
        [*(lab.probe_splits[name] for name in seeds), *["train"] * len(asked)],
        [layer],
        lab.config.probe,
        row_seed(lab.seed, 1, "feedback", ""),
        targets=np.concatenate([lab.disagreement(seeds), ~lab.correct(asked)]),
        next_token=lab.next_token([*seeds, *asked]),
    )
    return fitted.predict_logit(lab.states(ids)[:, layer], lab.next_token(ids))


def wrongness(lab: Lab, asked: Sequence[str]) -> np.ndarray:
    """How likely the base model answers each candidate wrongly, as annotation has shown so far, shape (n,)."""
    ids, layer = lab.ids("candidate"), lab.probe.layer
    evidence_of = lab.evidence(asked)
    seed = row_seed(lab.seed, len(asked), "correctness", "")
    head = fit_correctness(lab.states(asked)[:, layer], evidence_of, ~lab.correct(asked), seed)
    return head.predict(lab.states(ids)[:, layer], lab.evidence(ids))


def state_logits(lab: Lab, adapter: Path) -> np.ndarray:
    """A probe of a tuned state, fitted on its own samples of the seed questions, on every candidate."""
    ids, seeds = lab.ids("candidate"), lab.ids("seed")
    file = adapter.parent / "logits.npy"
    if not file.exists():
        drawn = lab.sample(seeds, adapter)
        answers = [[made.answer for made in row] for row in drawn]
        clusters = lab.grouped(seeds, answers)
        splits = [lab.probe_splits[name] for name in seeds]
        labels = label_questions(seeds, np.array([discrete_semantic_entropy(found) for found in clusters]), splits)
        states, next_token = lab.extract([*seeds, *ids], adapter)
        layers, num = range(states.shape[1]), len(seeds)
        seed = row_seed(lab.seed, 1, "probe", "")
        logprobs = [[made.logprob for made in row] for row in drawn]
        targets = np.array(list(map(disagreement, clusters, logprobs, answers)))
        fitted = fit_probe(
            states[:num],
            labels.unknown,
            splits,
            layers,
            lab.config.probe,
            seed,
            targets=targets,
            next_token=next_token[:num],
        )
        np.save(file, fitted.predict_logit(states[num:], next_token[num:]))
    return np.load(file)


def stopping(lab: Lab) -> dict[str, Any]:
    """Rounds of a tenth, with what a rule could see after each."""
    ids, own = lab.ids("candidate"), lab.own_answers()
    arm, budget = ARMS[DEFAULT], len(ids) // 10
    base = lab.correct(lab.ids("eval")).mean()
    rows: list[dict[str, Any]] = [{"num_annotated": 0, "accuracy": base, "predicted_unknown": None}]
    asked: list[str] = []
    for index in range(NUM_STEPS):
        chosen = one_round(lab, arm, asked, [], NUM_STEPS - index, budget)
        rows[-1] |= {
            "predicted_unknown": expit(chosen.score).mean(),
            "predicted_wrong": chosen.ranked_by.mean() if asked else None,
            "wrong_of_the_rest": (~lab.correct(chosen.left)).mean(),
        }
        asked += chosen.names
        rows.append({"num_annotated": len(asked), "accuracy": lab.tuned(asked, own)[0].mean()})
    return {"num_candidates": len(ids), "rounds": rows, "rules": rules(rows)}


def rules(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where each rule stops: the first state after which it would not go on; the last where it never stops."""
    last = len(rows) - 1

    def below(*measures: str) -> int:
        """The first state in which all of these are small; None is not."""
        shares = ([row.get(name) for name in measures] for row in rows)
        return next((i for i, given in enumerate(shares) if all((x or 1.0) < UNKNOWN_SHARE for x in given)), last)

    slope = (i for i in range(1, len(rows)) if rows[i]["accuracy"] - rows[i - 1]["accuracy"] < GAIN)
    places = {
        "predicted unknown": below("predicted_unknown"),
        "predicted unknown or wrong": below("predicted_unknown", "predicted_wrong"),
        "slope of the curve": next(slope, last),
        "budget": last,
    }
    return {name: {key: rows[place][key] for key in ("num_annotated", "accuracy")} for name, place in places.items()}


def compare(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Every arm less one round, paired over eval questions (a bootstrap over all testbeds' questions), and by seed."""
    table: dict[str, Any] = {}
    for name in ARMS:
        found = [made["arms"][name] for made in runs.values()]
        pairs = [paired(arm) for arm in found]
        estimate = mean_with_ci(np.concatenate(pairs), 0)
        table[name] = {
            "accuracy": np.mean([arm["accuracy"] for arm in found]),
            "ahead_of_one_round": estimate.value,
            "ci": [estimate.low, estimate.high],
            "by_seed": [pair.mean() for pair in pairs],
        }
    return table


def paired(arm: Mapping[str, Any]) -> np.ndarray:
    """1 for each eval question that is right by this arm alone, -1 by one round alone, else 0. Shape (num_eval,)."""
    better, worse = arm["num_better"], arm["num_worse"]
    return np.repeat([1, -1, 0], [better, worse, arm["num_eval"] - better - worse])


def figures(lab: Lab) -> dict[str, Any]:
    """All arms of one lab, and the rules that stop."""
    found: dict[str, Any] = {"base": lab.correct(lab.ids("eval")).mean(), "arms": {}}
    control: np.ndarray | None = None
    for name, arm in ARMS.items():
        made, correct = run(lab, arm)
        control = correct if control is None else control
        made |= {"num_better": int((correct & ~control).sum()), "num_worse": int((~correct & control).sum())}
        found["arms"][name] = made
        print(lab.folder.name, name, made, flush=True)
    return found | {"stopping": stopping(lab)}


if __name__ == "__main__":
    measured = {
        "arms": list(ARMS),
        "budgets": [BUDGET, BUDGET_MISLED],
        "num_rounds": NUM_ROUNDS,
        "unknown_share": UNKNOWN_SHARE,
        "gain": GAIN,
    }
    measure_worlds(__doc__, "rounds", measured, figures, compare)
