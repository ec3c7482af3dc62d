"""What should be annotated and tuned on: unknown, known, mixed or random questions, how many, with what rehearsal?

On labs (see ``lab.py``), all arms tuned alike. *Unknown* and *known* are the ends of the engine's first ranking,
*mixed* is half of each, *random* is drawn. Each at 10, 25 and 50 % of the candidates, with the model's own samples of
the rest as rehearsal and without; unknown questions, too, with its greedy answers and with the majority of its
samples; beside them *all*, every candidate annotated. What probing takes is counted in tokens, so that the claim that
half of the annotations do for all can be read gross and net. About 15 minutes a seed on two cores.

    python benchmarks/bench_tuning.py --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lab import Lab
from scipy.stats import ttest_rel
from worlds import measure_worlds

from ka2l.evaluation.statistics import proportion_with_ci
from ka2l.seeds import row_seed

#: Shares of the candidates that are annotated.
BUDGETS = (0.1, 0.25, 0.5)
REHEARSALS = ("samples", "none", "greedy", "majority")


def choices(lab: Lab) -> Mapping[str, Callable[[int], list[str]]]:
    """Arm -> which questions of so many are annotated."""
    ids = lab.ids("candidate")
    ranked = [ids[row] for row in np.argsort(-lab.evidence(ids), kind="stable")]
    drawn = sorted(ids, key=lambda name: row_seed(lab.seed, 0, "random", name))
    return {
        "unknown": lambda count: ranked[:count],
        "known": lambda count: ranked[len(ranked) - count :],
        "mixed": lambda count: ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :],
        "random": lambda count: drawn[:count],
    }


def arms(lab: Lab) -> list[dict[str, Any]]:
    """Every arm's accuracy, and what was kept and learned."""
    own: dict[str, Mapping[str, Sequence[str]]] = {
        kind: {} if kind == "none" else lab.own_answers(kind) for kind in REHEARSALS
    }
    ids = lab.ids("candidate")
    found = []
    for name, choose in choices(lab).items():
        for rehearsal in REHEARSALS if name == "unknown" else REHEARSALS[:2]:
            for share in BUDGETS:
                chosen = choose(round(share * len(ids)))
                found.append(measured(lab, name, rehearsal, chosen, own[rehearsal]))
    return [*found, measured(lab, "all", "none", ids, {})]


def measured(
    lab: Lab, name: str, rehearsal: str, chosen: Sequence[str], own: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """One arm tuned and graded."""
    correct, _ = lab.tuned(chosen, own)
    base = lab.correct(lab.ids("eval"))
    share = proportion_with_ci(correct)
    print(lab.folder.name, name, rehearsal, len(chosen), share.value, flush=True)
    return {
        "arm": name,
        "rehearsal": rehearsal,
        "num_annotated": len(chosen),
        "share": len(chosen) / len(lab.ids("candidate")),
        "accuracy": share.value,
        "ci": [share.low, share.high],
        "kept": correct[base].mean(),
        "learned": correct[~base].mean(),
    }


def probing(lab: Lab) -> dict[str, int]:
    """Tokens that probing took: samples of the seed questions, a prefill of every question; and the rehearsal's."""
    tokenizer = lab.prompter.tokenizer
    answers = {
        split: sum(len(lab.observed[name].answers) for name in lab.ids(split)) for split in ("seed", "candidate")
    }
    length = {
        split: sum(
            len(ids) + 1
            for name in lab.ids(split)
            for ids in tokenizer(lab.observed[name].answers, add_special_tokens=False)["input_ids"]
        )
        for split in ("seed", "candidate")
    }
    return {
        "num_seed_samples": answers["seed"],
        "tokens_generated": length["seed"],
        "tokens_prefilled": sum(len(lab.prompter.token_ids(row["question"])) for row in lab.rows.values()),
        "tokens_rehearsal": length["candidate"],
    }


def figures(lab: Lab) -> dict[str, Any]:
    """All arms of one lab, and what probing it took."""
    return {
        "base": lab.correct(lab.ids("eval")).mean(),
        "num_candidates": len(lab.ids("candidate")),
        "arms": arms(lab),
        "probing": probing(lab),
    }


def compare(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Unknown questions at half of the candidates, with rehearsal, less every other arm; paired over seeds."""

    def final(arm: str, rehearsal: str) -> np.ndarray:
        return np.array(
            [
                max(
                    (row for row in run["arms"] if (row["arm"], row["rehearsal"]) == (arm, rehearsal)),
                    key=lambda row: row["num_annotated"],
                )["accuracy"]
                for run in runs.values()
            ]
        )

    ours = final("unknown", "samples")
    names = dict.fromkeys((row["arm"], row["rehearsal"]) for run in runs.values() for row in run["arms"])
    found = {}
    for arm, rehearsal in names:
        other = final(arm, rehearsal)
        p_value = float(ttest_rel(ours, other).pvalue) if len(ours) > 1 and (ours != other).any() else None
        found[f"{arm}, {rehearsal}"] = {"accuracy": other.mean(), "ahead": (ours - other).mean(), "p": p_value}
    return found


if __name__ == "__main__":
    measure_worlds(__doc__, "tuning", {"budgets": BUDGETS, "rehearsals": REHEARSALS}, figures, compare)
