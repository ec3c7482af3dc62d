"""Several rounds against one, and when to stop."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, interval, mean, percent, table
from worlds import WORLDS

#: Of several rounds: what a run does unless told otherwise.
DEFAULT = "two_axis"
#: What rounds are compared with.
CONTROL = "one_round"

TITLE = "Rounds: which evidence lets several win over one?"
COMMAND = "python benchmarks/bench_rounds.py --worlds people_misled sets_misled people entity_questions --seeds 0 1 2"
NAMES = {
    "one_round": "one round, `probe`",
    "one_round_probe": "one round, by the forward pass alone",
    "current_state": "rounds, a probe of the last state alone",
    "all_states": "rounds, probes of all states",
    "feedback_probe": "rounds, the first probe fitted again with annotations",
    "feedback": "rounds, the same and the samples' disagreement",
    "later": "rounds, the same and probes of later states: `probe`",
    "two_axis_0.1": "rounds, `two_axis`, up to a tenth explored",
    "two_axis": "rounds, `two_axis`, up to a fifth explored (default)",
}


def section(result: dict[str, Any]) -> Section:
    """Arms against one round, and the rules that stop."""
    found = {world: list(by_seed.values()) for world, by_seed in result["by_world"].items() if by_seed}
    parts = [
        f"### {WORLDS[world].title}\n\n{described(runs, result['comparison'][world], result['settings'])}"
        for world, runs in found.items()
    ]
    charts = {f"stopping-{world.replace('_', '-')}": chart(runs[0]["stopping"]) for world, runs in found.items()}
    return Section("\n\n".join(parts), charts, losses(result))


def described(runs: list[dict[str, Any]], comparison: dict[str, Any], settings: dict[str, Any]) -> str:
    """One world."""
    rows = []
    for arm, name in NAMES.items():
        found, compared = [run["arms"][arm] for run in runs], comparison[arm]
        rows.append(
            [
                name,
                figure(mean(row["num_wrong_found"] / row["num_annotated"] for row in found)),
                figure(mean(row["auroc_wrong_of_the_rest"][-1] for row in found)),
                figure(compared["accuracy"]),
                "" if arm == CONTROL else interval(compared["ahead_of_one_round"], compared["ci"], sign=True),
                "" if arm == CONTROL else ", ".join(f"{value:+.3f}" for value in compared["by_seed"]),
            ]
        )
    share = mean(run["arms"]["one_round"]["num_annotated"] / run["stopping"]["num_candidates"] for run in runs)
    return f"""{percent(share)} of the candidates annotated, at once or in {settings["num_rounds"]} rounds, tuned
from the base model each time; {len(runs)} {"testbeds" if len(runs) > 1 else "testbed"}. Wrong: the share of the
annotations that went to what the base model answers wrongly; AUROC for wrong answers among the rest, before the last
selection; accuracy on unseen paraphrases, and how far it is ahead of one round, paired over eval questions.

{table(["arm", "wrong", "AUROC", "accuracy", "ahead of one round", "by testbed"], rows)}

{stopping(runs, settings)}"""


def stopping(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Where the rules stop."""
    names = runs[0]["stopping"]["rules"]
    rules = {
        "predicted unknown or wrong": " (`stopping.unknown_share`)",
        "slope of the curve": " (`stopping.gain`)",
    }
    rows = [
        [
            name + rules.get(name, ""),
            percent(
                mean(
                    run["stopping"]["rules"][name]["num_annotated"] / run["stopping"]["num_candidates"] for run in runs
                )
            ),
            figure(mean(run["stopping"]["rules"][name]["accuracy"] for run in runs)),
        ]
        for name in names
    ]
    return (
        f"When to stop, in rounds of a tenth by the default: where less than {percent(settings['unknown_share'])} of "
        "the rest is predicted unknown, or as little wrong, too, where a round has gained less than "
        f"{percent(settings['gain'])} of accuracy, or never:\n\n" + table(["rule", "annotated", "accuracy"], rows)
    )


def chart(found: dict[str, Any]) -> str:
    """Accuracy, predicted and real share of unknown over the rounds of the first seed."""
    share = [row["num_annotated"] / found["num_candidates"] for row in found["rounds"]]
    measured = {
        "accuracy": "accuracy",
        "predicted unknown, of the rest": "predicted_unknown",
        "predicted wrong, of the rest": "predicted_wrong",
        "base model wrong, of the rest": "wrong_of_the_rest",
    }
    series = {
        name: [(at, row[key]) for at, row in zip(share, found["rounds"], strict=True) if row.get(key) is not None]
        for name, key in measured.items()
    }
    return lines("Rounds of a tenth, first seed", "annotated, share of the candidates", "share", series)


def losses(result: dict[str, Any]) -> list[str]:
    """Arms of several rounds that are not ahead of one, and the default where it is not the best."""
    found = []
    for world, compared in result["comparison"].items():
        title = WORLDS[world].title
        arms = [arm for arm in compared if arm not in (CONTROL, "one_round_probe")]
        behind = [arm for arm in arms if compared[arm]["ci"][1] < 0]
        found += [
            f"On {title}, {NAMES[arm]}: {figure(compared[arm]['accuracy'])}, "
            f"{figure(-compared[arm]['ahead_of_one_round'])} below one round with as many annotations."
            for arm in behind
        ]
        even = [arm for arm in arms if arm not in behind and compared[arm]["ci"][0] <= 0]
        if even:
            ahead = [compared[arm]["ahead_of_one_round"] for arm in even]
            found.append(
                f"On {title}, {len(even)} of {len(arms)} ways to go in rounds are not shown to beat one round "
                f"with as many annotations: {figure(min(ahead), sign=True)} to {figure(max(ahead), sign=True)}."
            )
        best = max(compared, key=lambda arm: compared[arm]["accuracy"])
        if compared[best]["accuracy"] > compared[DEFAULT]["accuracy"]:
            found.append(
                f"On {title} the default of several rounds reaches {figure(compared[DEFAULT]['accuracy'])}; "
                f"{NAMES[best]}: {figure(compared[best]['accuracy'])}."
            )
    return found
