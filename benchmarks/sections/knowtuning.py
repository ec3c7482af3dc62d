"""What each part of KnowTuning does."""

from __future__ import annotations

from typing import Any

from charts import bars
from pages import Section
from tables import interval, mean, table

TITLE = "KnowTuning, part by part"
COMMAND = "python benchmarks/bench_knowtuning.py --seeds 0 1 2"
ARMS = {
    "base": "base model",
    "knowtuning": "both stages",
    "no_ka": "-KA: no hardest facts",
    "no_kc": "-KC: no stage II",
    "no_kcc": "-KCC: no completeness",
    "no_kfc": "-KFC: no factuality",
    "no_klc": "-KLC: no logicality",
    "sft": "SFT only",
    "random": "both stages, random questions",
}
SCORES = {
    "num_correct": "correct",
    "num_incorrect": "incorrect",
    "share_correct": "share correct",
    "completeness": "completeness",
    "order": "order",
}
#: What each part is there for.
PURPOSE = {"no_ka": "num_correct", "no_kcc": "completeness", "no_kfc": "share_correct", "no_klc": "order"}


def section(result: dict[str, Any]) -> Section:
    """Scores of all arms, and what they are less the full method."""
    scores, less = result["scores"], result["minus_knowtuning"]
    header = ["arm", *SCORES.values()]
    seconds = {arm: f"{mean(taken):.0f}" for arm, taken in result["seconds"].items()}
    absolute = table(
        [*header, "seconds a run"],
        ([ARMS[arm], *_cells(scores[arm], False), seconds.get(arm, "")] for arm in ARMS if arm in scores),
    )
    paired = table(header, ([ARMS[arm], *_cells(less[arm], True)] for arm in ARMS if arm in less and arm != "base"))
    text = f"""What does each part do, and what does it do to choose the questions? The testbed's lives, one
round, {len(result["seeds"])} worlds. Facts correct and incorrect an answer, share of stated facts that are
correct, share of a life's facts that are stated, share of pairs of true statements in the right order.

{absolute}

Less the full method, paired over questions:

{paired}"""
    values = {
        ARMS[arm]: (less[arm]["num_correct"]["mean"], *less[arm]["num_correct"]["ci"])
        for arm in ARMS
        if arm in less and arm != "base"
    }
    chart = bars("Correct facts an answer, less the full method (95 % CI)", "facts", values)
    return Section(text, {"correct": chart}, losses(less))


def _cells(found: dict[str, Any], sign: bool) -> list[str]:
    return [
        interval(found[score]["mean"], found[score]["ci"], 2 if score.startswith("num") and not sign else 3, sign=sign)
        for score in SCORES
    ]


def losses(less: dict[str, Any]) -> list[str]:
    """Parts that do not do what they are there for, and arms that are better at something."""

    def shown(arm: str, score: str) -> str:
        return f"{SCORES[score]} {interval(less[arm][score]['mean'], less[arm][score]['ci'], sign=True)}"

    idle = [arm for arm, score in PURPOSE.items() if less[arm][score]["ci"][1] >= 0]
    found = [
        f"Without the part, what it is there for is no lower: `{ARMS[arm]}`, {shown(arm, PURPOSE[arm])}."
        for arm in idle
    ]
    for arm in ("no_kc", "sft", "random"):
        better = [
            score
            for score in SCORES
            if (less[arm][score]["ci"][1] < 0 if score == "num_incorrect" else less[arm][score]["ci"][0] > 0)
        ]
        if better:
            figures = ", ".join(shown(arm, score) for score in better)
            found.append(f"`{ARMS[arm]}` is better than the full method in some scores: {figures}.")
    if less["sft"]["num_correct"]["ci"][1] >= 0:
        found.append(
            f"`{ARMS['sft']}` is not shown to be behind the full method in facts: {shown('sft', 'num_correct')}."
        )
    return found
