"""Query strategies: learning curves, the area under them, and half the budget against everything."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, mean, percent, table
from worlds import WORLDS

TITLE = "Query strategies: which question is worth an annotation?"
COMMAND = "python benchmarks/bench_strategies.py --worlds people entity_questions popqa"
DEFAULT = "probe"
ALPHA = 0.05
WHY = (
    "Each reads the doubt that the model's answers show, so that they ask much the same questions; what differs is "
    "what reading it takes."
)
#: The same arm in a reader's words, where its name does not say it.
NAMES = {
    "random_alone": "random, without rehearsal",
    "probe_alone": "probe, by its forward pass alone",
    "first_token": "least confident first token, no probe",
    "two_axis": "two_axis, exploring for rounds to come",
}


def section(result: dict[str, Any]) -> Section:
    """Areas by world, curves, and what half of the annotations reach."""
    budgets = ", ".join(percent(share, 1).replace(".0 ", " ") for share in result["settings"]["budgets"])
    parts = [
        f"""All strategies rank the same candidates by what the base model shows, once for each budget ({budgets} of
the candidates); the same tuner with the same rehearsal follows, and unseen paraphrases of all candidates' facts are
graded. `probe`, which the default, `two_axis`, is in a single round, counts, beside its forward pass, how far the
samples disagree that are drawn for that rehearsal; `semantic_entropy` and `entropy` read the same samples of every
candidate. The row `two_axis` has explored a tenth for rounds that do not come here:
[rounds](#rounds-which-evidence-lets-several-win-over-one) show what that is for. The area is that under the learning
curve from no annotation to the largest budget, divided by its width: mean accuracy over budgets. Ahead: how far
`{DEFAULT}` is in front, paired over seeds, with the p-value of a t-test. Why is mostly told by the middle columns:
how many of the annotated questions the base model answers wrongly, by budget. Annotations of right answers teach
nothing."""
    ]
    charts = {}
    for world, compared in result["comparison"].items():
        runs = list(result["by_world"][world].values())
        parts.append(f"### {WORLDS[world].title}")
        parts.append(described(runs, compared))
        parts.append(areas(compared["areas"], runs, result["settings"]["budgets"]))
        charts[f"curves-{world.replace('_', '-')}"] = lines(
            f"Accuracy against annotations, {WORLDS[world].title}, mean over seeds ({len(runs)})",
            "annotated, share of the candidates",
            "accuracy on unseen paraphrases",
            curves(runs, result["settings"]["budgets"]),
        )
    return Section("\n\n".join(parts), charts, losses(result))


def described(runs: list[dict[str, Any]], compared: dict[str, Any]) -> str:
    """The world's size, and what half of the annotations come to."""
    half, found = compared["half_budget"], runs[0]
    scores = {name: mean(run["auroc_wrong"][name] for run in runs) for name in found["auroc_wrong"]}
    return f"""{len(runs)} {"seeds" if len(runs) > 1 else "seed"}, {found["num_candidates"]:,} candidates each, of
which the base model answers {percent(half["unknown_share"])} wrongly. Half of them annotated by `{DEFAULT}`:
{figure(half["default"])}; all of them: {figure(half["all"])}; within the 95 % interval of all on
{half["seeds_within_ci_of_all"]} of {len(runs)}. AUROC for wrong answers among the candidates: the score of
`probe` {figure(scores["probe"])}, semantic entropy {figure(scores["semantic_entropy"])}."""


def areas(found: dict[str, dict[str, Any]], runs: list[dict[str, Any]], budgets: list[float]) -> str:
    """A table, the largest area first, with the share of wrong answers among the annotated questions."""

    def wrong(arm: str, at: int) -> str:
        points = [run["curves"][arm][at] for run in runs]
        return percent(mean(point["num_wrong"] / point["num_annotated"] for point in points))

    rows = [
        [
            f"**{NAMES.get(arm, arm)}**" if arm == DEFAULT else NAMES.get(arm, arm),
            *(wrong(arm, at) for at in range(len(budgets))),
            figure(row["area"]),
            "" if arm == DEFAULT else figure(row["ahead"], sign=True),
            "" if row["p"] is None else f"{row['p']:.2g}",
        ]
        for arm, row in sorted(found.items(), key=lambda item: -item[1]["area"])
    ]
    header = ["strategy", *(f"wrong, of {percent(share, 1).replace('.0 ', ' ')}" for share in budgets)]
    return table([*header, "area", "ahead", "p"], rows)


def curves(runs: list[dict[str, Any]], budgets: list[float]) -> dict[str, list[tuple[float, float]]]:
    """Mean accuracy over seeds at each budget, by strategy, the best at the end first."""
    base = mean(run["base"]["accuracy"] for run in runs)
    made = {
        NAMES.get(arm, arm): [
            (0.0, base),
            *((share, mean(run["curves"][arm][at]["accuracy"] for run in runs)) for at, share in enumerate(budgets)),
        ]
        for arm in runs[0]["curves"]
    }
    return dict(sorted(made.items(), key=lambda item: -item[1][-1][1]))


def losses(result: dict[str, Any]) -> list[str]:
    """Strategies ahead of the default, or too close to tell; budgets that do not reach everything."""
    found = []
    for world, compared in result["comparison"].items():
        title, num_seeds = WORLDS[world].title, len(result["by_world"][world])
        areas = compared["areas"]
        mine = figure(areas[DEFAULT]["area"])
        told = [arm for arm, row in areas.items() if row["p"] is not None and row["p"] < ALPHA]
        found += [
            f"On {title} the strategy `{arm}` has the larger area: {figure(areas[arm]['area'])} against {mine} of "
            f"`{DEFAULT}` (p = {areas[arm]['p']:.2g})."
            for arm in told
            if areas[arm]["ahead"] < 0
        ]
        close = sorted((arm for arm in areas if arm not in (*told, DEFAULT)), key=lambda arm: -areas[arm]["area"])
        if close:
            listed = ", ".join(f"`{arm}` ({figure(areas[arm]['area'])})" for arm in close)
            found.append(
                f"On {title} `{DEFAULT}`, with an area of {mine}, cannot be told from {listed}: p >= {ALPHA} over "
                f"{num_seeds} "
                f"{'seeds' if num_seeds > 1 else 'seed'}. {WHY}"
            )
        half = compared["half_budget"]
        if half["seeds_within_ci_of_all"] < num_seeds:
            found.append(
                f"On {title} half of the annotations reach {figure(half['default'])}, all of them "
                f"{figure(half['all'])}; {num_seeds - half['seeds_within_ci_of_all']} of {num_seeds} seeds are below "
                "the interval of all."
            )
    return found
