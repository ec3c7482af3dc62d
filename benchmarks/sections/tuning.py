"""What is tuned on: unknown, known, mixed, random, all; with and without rehearsal; what probing takes."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, mean, percent, table
from worlds import WORLDS

TITLE = "Tuning: unknown, known, mixed or random questions, and the half that does for all"
COMMAND = "python benchmarks/bench_tuning.py --seeds 0 1 2"


def section(result: dict[str, Any]) -> Section:
    """Arms by budget, the claim of the half, tokens of probing."""
    found = {world: list(by_seed.values()) for world, by_seed in result["by_world"].items() if by_seed}
    text = "\n\n".join(f"### {WORLDS[world].title}\n\n{described(runs)}" for world, runs in found.items())
    return Section(
        text, {f"budgets-{world.replace('_', '-')}": chart(runs) for world, runs in found.items()}, losses(result)
    )


def described(runs: list[dict[str, Any]]) -> str:
    """One world."""
    return f"""{len(runs)} {"testbeds" if len(runs) > 1 else "testbed"}, {runs[0]["num_candidates"]:,} candidates
each; accuracy on unseen paraphrases of all candidates' facts, from {figure(mean(run["base"] for run in runs))} of the
base model. Kept: the share of its right answers that are still right; learned: that of its wrong ones that are right
now.

{table(["annotated", "rehearsal", "share", "accuracy", "kept", "learned"], rows(runs))}

{claim(runs)}"""


def averaged(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arms' figures, each the mean over seeds."""
    made = []
    for place, first in enumerate(runs[0]["arms"]):
        same = [run["arms"][place] for run in runs]
        made.append(first | {key: mean(row[key] for row in same) for key in ("accuracy", "kept", "learned")})
    return made


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A line an arm and budget."""
    return [
        [
            row["arm"],
            row["rehearsal"],
            percent(row["share"]),
            *(figure(row[key]) for key in ("accuracy", "kept", "learned")),
        ]
        for row in averaged(runs)
    ]


def claim(runs: list[dict[str, Any]]) -> str:
    """Half of the annotations against all, gross; and what probing takes beside them."""
    within = [half_of(run) for run in runs]
    asked = {key: mean(run["probing"][key] for run in runs) for key in runs[0]["probing"]}
    saved = runs[0]["num_candidates"] // 2
    return f"""Half of the annotations, unknown ones with rehearsal:
{figure(mean(row["accuracy"] for row, _ in within))}; all:
{figure(mean(full["accuracy"] for _, full in within))}; at or above the lower bound of all's 95 % interval on
{sum(row["accuracy"] >= full["ci"][0] for row, full in within)} of {len(runs)}. Gross that saves {saved:,} annotations a
testbed. For it probing generated {asked["tokens_generated"]:,.0f} tokens and read {asked["tokens_prefilled"]:,.0f},
rehearsal generated {asked["tokens_rehearsal"]:,.0f}: net, a saved annotation costs
{(asked["tokens_generated"] + asked["tokens_rehearsal"]) / saved:,.0f} generated tokens."""


def half_of(run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unknown questions with rehearsal at the largest budget, and all."""
    ours = [row for row in run["arms"] if (row["arm"], row["rehearsal"]) == ("unknown", "samples")]
    return max(ours, key=lambda row: row["share"]), run["arms"][-1]


def chart(runs: list[dict[str, Any]]) -> str:
    """Accuracy against annotations."""
    series: dict[str, list[tuple[float, float]]] = {}
    base = mean(run["base"] for run in runs)
    for row in averaged(runs)[:-1]:
        if row["rehearsal"] in ("samples", "none"):
            name = row["arm"] + (", no rehearsal" if row["rehearsal"] == "none" else "")
            series.setdefault(name, [(0.0, base)]).append((row["share"], row["accuracy"]))
    return lines("Accuracy against annotations", "annotated, share of the candidates", "accuracy", series)


def losses(result: dict[str, Any]) -> list[str]:
    """Arms ahead of unknown questions with rehearsal by samples, at the same budget."""
    sentences = []
    for world, by_seed in result["by_world"].items():
        found = averaged(list(by_seed.values())) if by_seed else []
        ours = {
            row["share"]: row["accuracy"] for row in found if (row["arm"], row["rehearsal"]) == ("unknown", "samples")
        }
        sentences += [
            f"On {WORLDS[world].title}, with {percent(row['share'])} annotated, {row['arm']} questions with rehearsal "
            f"`{row['rehearsal']}` reach {figure(row['accuracy'])}, unknown ones with `samples` "
            f"{figure(ours[row['share']])}."
            for row in found
            if row["share"] in ours and row["accuracy"] > ours[row["share"]]
        ]
    return sentences
