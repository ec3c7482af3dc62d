"""What does each part of KnowTuning do? The paper's ablations, and its questions chosen by KA2L or at random.

Arms, each one round of the preset `knowtuning` on the testbed's lives, on the same annotated questions but the last:

    knowtuning   both stages
    no_ka        without the hardest facts in stage I (the paper's -KA)
    no_kc        without stage II (-KC)
    no_kcc       stage II without completeness (-KCC)
    no_kfc       stage II without factuality (-KFC)
    no_klc       stage II without logicality (-KLC)
    sft          the annotated answers alone
    random       both stages on as many questions chosen at random: the same number of teacher calls

Counted are, of the eval questions' greedy answers against the testbed's truth: facts correct and incorrect an answer,
the share of stated facts that are correct, the share of a life's facts that are stated (completeness), and the share of
pairs of true statements in the right order. Differences to the full method are paired over the eval questions of all
seeds. Takes about 45 minutes on two cores.

    python benchmarks/bench_knowtuning.py --seeds 0 1 2
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import SHARED_STAGES, run_arm, seeded_parser
from machine import write_result

from engine.store.run_directory import RunDirectory
from ka2l.evaluation.statistics import mean_with_ci
from ka2l.testbed.lives import grade_life

#: Up to the facts of the annotated answers, which every arm but ``random`` has in common.
ANNOTATED = (*SHARED_STAGES, "select", "annotate", "facts", "difficulty")
ASPECTS = ("completeness", "factuality", "logicality")
NO_STAGE_TWO = "tuning.knowtuning.aspects=[]"


def without(aspect: str) -> str:
    """The setting that leaves an aspect out."""
    return f"tuning.knowtuning.aspects=[{','.join(other for other in ASPECTS if other != aspect)}]"


ARMS: dict[str, list[str]] = {
    "knowtuning": [],
    "no_ka": ["tuning.knowtuning.augment=false"],
    "no_kc": [NO_STAGE_TWO],
    "no_kcc": [without("completeness")],
    "no_kfc": [without("factuality")],
    "no_klc": [without("logicality")],
    "sft": ["tuning.kind=sft"],
    "random": ["selection.kind=random"],
}
SCORES = ("num_correct", "num_incorrect", "share_correct", "completeness", "order")


def scores(folder: Path, round_index: int) -> dict[str, dict[str, float | None]]:
    """Scores of each eval question's greedy answer under a round's model state."""
    run = RunDirectory(folder)
    references = run.stage("references").table(["question_id", "answers"]).to_pylist()
    truth = {row["question_id"]: row["answers"][0] for row in references}
    samples = run.stage("observe", round_index).table(["question_id", "purpose", "answer"]).to_pylist()
    found: dict[str, dict[str, float | None]] = {}
    for row in samples:
        if row["purpose"] == "eval":
            grade = grade_life(row["answer"], truth[row["question_id"]])
            stated = grade.num_correct + grade.num_incorrect
            found[row["question_id"]] = {
                "num_correct": grade.num_correct,
                "num_incorrect": grade.num_incorrect,
                "share_correct": grade.num_correct / stated if stated else None,
                "completeness": grade.num_correct / (grade.num_correct + grade.num_missing),
                "order": grade.order,
            }
    return found


def mean(rows: Sequence[dict[str, float | None]], name: str) -> dict[str, Any]:
    """Mean and 95 % CI over the questions that have the score."""
    estimate = mean_with_ci([value for row in rows if (value := row[name]) is not None], 0)
    return {"mean": estimate.value, "ci": [estimate.low, estimate.high]}


def difference(arm: dict[str, dict[str, float | None]], full: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """Scores of an arm minus those of the full method, paired over questions that both have a score of."""
    made = {}
    for name in SCORES:
        pairs = [(arm[key][name], full[key][name]) for key in sorted(arm.keys() & full.keys())]
        estimate = mean_with_ci([a - b for a, b in pairs if a is not None and b is not None], 0)
        made[name] = {"mean": estimate.value, "ci": [estimate.low, estimate.high]}
    return made


def main() -> None:
    """Parse arguments, run, write the result."""
    arguments = seeded_parser(__doc__, "knowtuning").parse_args()
    graded: dict[str, dict[str, dict[str, float | None]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        base = arguments.work / f"seed-{seed}"
        for arm, settings in ARMS.items():
            source = None if arm == "knowtuning" else base / "knowtuning"
            shared = SHARED_STAGES if arm == "random" else ANNOTATED
            wanted = [f"seed={seed}", f"testbed.seed={seed}", *settings]
            run_arm(base / arm, wanted, source, preset="knowtuning", shared=shared)
            summary = json.loads((base / arm / "summary.json").read_text())
            seconds.setdefault(arm, []).append(summary["total_seconds"])
            own = {f"{seed}/{name}": row for name, row in scores(base / arm, 1).items()}
            graded.setdefault(arm, {}).update(own)
            if arm == "knowtuning":
                before = {f"{seed}/{name}": row for name, row in scores(base / arm, 0).items()}
                graded.setdefault("base", {}).update(before)
            print(seed, arm, {name: round(mean(list(own.values()), name)["mean"], 3) for name in SCORES}, flush=True)
    result = {
        "seeds": arguments.seeds,
        "scores": {arm: {name: mean(list(rows.values()), name) for name in SCORES} for arm, rows in graded.items()},
        "minus_knowtuning": {
            arm: difference(rows, graded["knowtuning"]) for arm, rows in graded.items() if arm != "knowtuning"
        },
        "seconds": seconds,
    }
    print(json.dumps(result["minus_knowtuning"], indent=1))
    print(f"written: {write_result('knowtuning', result, arguments.out)}")


if __name__ == "__main__":
    main()
