"""Scores of uncertainty: AUROC for wrong and for unknown answers, layers, samples, seed questions, transfer."""

from __future__ import annotations

from typing import Any

from charts import lines, points
from pages import Section
from tables import figure, interval, mean, percent, table
from worlds import WORLDS

TITLE = "Uncertainty: what tells best that a model does not know?"
COMMAND = "python benchmarks/bench_uncertainty.py --worlds people mixed"
#: Score -> its name, and what it needs beyond the greedy answer.
SCORES = {
    "probe": ("KA2L's probe", "one forward pass"),
    "probe_of_states": ("KA2L's probe, hidden states alone", "one forward pass"),
    "probe_on_labels": ("KA2L's probe, hidden states and labels alone", "one forward pass"),
    "first_token": ("log-probability of the likeliest first token", "nothing"),
    "first_token_entropy": ("entropy of the first token", "one forward pass"),
    "evidence": ("KA2L's probe and the samples' disagreement, by which candidates are ranked", "ten samples"),
    "sep": ("logistic probe on entropy (SEP)", "one forward pass"),
    "accuracy_probe": ("logistic probe on accuracy", "one forward pass; references of the seed questions"),
    "semantic_entropy": ("semantic entropy", "ten samples"),
    "weighted_semantic_entropy": ("semantic entropy, weighted by likelihood", "ten samples"),
    "predictive_entropy": ("predictive entropy", "ten samples"),
    "p_true": ("P(True)", "three samples and one forward pass"),
    "log_likelihood": ("log-likelihood", "nothing"),
}


def section(result: dict[str, Any]) -> Section:
    """A table a world, and charts of the first."""
    parts = [
        """AUROC of eval questions, on which nothing is fitted: for *wrong*, the greedy answer is wrong, and for
*unknown*, the semantic entropy of ten further answers is above the threshold. Mean over seeds; the range is over
seeds where there are several, and else the 95 % interval of a bootstrap over questions."""
    ]
    charts: dict[str, str] = {}
    for world, by_seed in result["by_world"].items():
        runs = list(by_seed.values())
        if not runs:
            continue
        parts.append(f"### {WORLDS[world].title}")
        parts.append(scores(runs))
        parts.append(difference(runs))
        parts.append(stopping(runs))
        if "leave_one_out" in runs[0]:
            parts.append(transfer(runs))
        charts |= charts_of(world, runs)
    parts.append(
        "P(True) asks the model to follow an instruction, which the testbed's models, trained on questions and answers "
        "alone, cannot: its figures here say nothing about models that can."
    )
    return Section("\n\n".join(parts), charts, losses(result))


def scores(runs: list[dict[str, Any]]) -> str:
    """Every score for both targets."""
    rows = []
    for name, (title, needs) in SCORES.items():
        if name in runs[0]["auroc"]["wrong"]:
            both = [spread([run["auroc"][target][name] for run in runs]) for target in ("wrong", "unknown")]
            rows.append([title, *both, needs])
    rows.sort(key=lambda row: row[1], reverse=True)
    return table(["score", "wrong", "unknown", "beside the greedy answer it needs"], rows)


def spread(values: list[list[float]]) -> str:
    """Mean and range over seeds; of one seed its interval."""
    if len(values) == 1:
        return interval(values[0][0], values[0][1:])
    means = [value for value, *_ in values]
    return f"{figure(mean(means))} ({figure(min(means))} to {figure(max(means))})"


def difference(runs: list[dict[str, Any]]) -> str:
    """The probe less semantic entropy, by seed."""
    shown = {
        target: ", ".join(interval(value[0], value[1:], sign=True) for value in found)
        for target in ("wrong", "unknown")
        for found in [[run["probe_minus_semantic_entropy"][target] for run in runs]]
    }
    return (
        f"The probe less semantic entropy on the same questions, by seed: for wrong {shown['wrong']}; for unknown "
        f"{shown['unknown']}."
    )


def stopping(runs: list[dict[str, Any]]) -> str:
    """`sampler.stop_early` beside fixed numbers of answers."""
    rows = []
    for place, found in enumerate(runs[0]["stop_early"]):
        of_runs = [run["stop_early"][place] for run in runs]
        rows.append(
            [
                f"at most {found['num_samples']}",
                percent(mean(row["share_drawn"] for row in of_runs)),
                figure(mean(row["auroc"] for row in of_runs)),
                figure(mean(row["auroc_all"] for row in of_runs)),
                ", ".join(interval(row["difference"][0], row["difference"][1:], sign=True) for row in of_runs),
                figure(mean(row["auroc_as_many_each"] for row in of_runs)),
            ]
        )
    return (
        "Sampling that stops where the entropy is settled (`sampler.stop_early`), AUROC of semantic entropy for wrong "
        "answers:\n\n"
        + table(["answers", "drawn", "AUROC", "all drawn", "difference, by seed", "as many for every question"], rows)
    )


def transfer(runs: list[dict[str, Any]]) -> str:
    """Leave-one-set-out."""
    names = {
        "probe_own": "probe on its own set",
        "probe_others": "probe on the others",
        "states_others": "states alone, on the others",
        "probe_all": "probe on all",
        "semantic_entropy": "semantic entropy",
    }
    rows = [
        [part, *(spread([run["leave_one_out"][part][name] for run in runs]) for name in names)]
        for part in runs[0]["leave_one_out"]
    ]
    return (
        "AUROC for wrong answers on each set, of probes fitted on its own seed questions, on those of the three "
        "others (the set is left out), and on all:\n\n" + table(["asked about", *names.values()], rows)
    )


def charts_of(world: str, runs: list[dict[str, Any]]) -> dict[str, str]:
    """By layer, by samples, by seed questions, and the principal components of the first seed."""
    title = WORLDS[world].title

    def averaged(key: str, x: str, name: str) -> list[tuple[float, float]]:
        at = [row[x] for row in runs[0][key]]
        values = [mean(_first(run[key][place][name]) for run in runs) for place in range(len(at))]
        return list(zip(at, values, strict=True))

    by_layer = {
        f"for {target}": averaged("by_layer", "layer", target)
        for target in ("unknown", "wrong")
        if all(row[target][0] is not None for run in runs for row in run["by_layer"])
    }
    by_samples = {
        "semantic entropy": averaged("by_num_samples", "num_samples", "semantic_entropy"),
        "probe on labels of as many": averaged("by_num_samples", "num_samples", "probe"),
    }
    kinds = runs[0]["components"]
    return {
        f"{world}-layers": lines(f"The probe by layer, {title}", "layer (0: embeddings)", "AUROC", by_layer),
        f"{world}-samples": lines(
            f"Answers sampled, {title}", "answers a question", "AUROC for wrong answers", by_samples
        ),
        f"{world}-seeds": lines(
            f"Seed questions of the probe, {title}",
            "seed questions",
            "AUROC for wrong answers",
            {"probe": averaged("by_num_seed", "num_seed", "probe")},
            log_x=True,
        ),
        f"{world}-components": points(
            f"Hidden states of eval questions at the probe's layer, {title}", "component 1", "component 2", kinds
        ),
    }


def _first(value: Any) -> float:
    return float(value[0]) if isinstance(value, list) else float(value)


def losses(result: dict[str, Any]) -> list[str]:
    """Scores above the probe's, by world and target."""
    found = []
    for world, by_seed in result["by_world"].items():
        runs, title = list(by_seed.values()), WORLDS[world].title
        for target in ("wrong", "unknown") if runs else ():
            means = {name: mean(run["auroc"][target][name][0] for run in runs) for name in runs[0]["auroc"][target]}
            # The probe with the samples' disagreement is ours, too.
            better = {name: value for name, value in means.items() if value > means["probe"] and name != "evidence"}
            if better:
                listed = ", ".join(f"{SCORES[name][0]} {figure(value)}" for name, value in better.items())
                found.append(
                    f"For {target} answers on {title} the probe's AUROC is {figure(means['probe'])}; better: {listed}."
                )
        for place, row in enumerate(runs[0]["stop_early"] if runs else ()):
            fixed = mean(run["stop_early"][place]["auroc_as_many_each"] for run in runs)
            stopped = mean(run["stop_early"][place]["auroc"] for run in runs)
            if fixed > stopped:
                found.append(
                    f"Stopping early at {row['num_samples']} answers at most, on {title}: AUROC "
                    f"{figure(stopped)}, and {figure(fixed)} with as many answers for every question alike."
                )
        for part in runs[0].get("leave_one_out", {}) if runs else ():
            others, own = (
                mean(run["leave_one_out"][part][name][0] for run in runs)
                for name in ("probe_others", "semantic_entropy")
            )
            if others < own:
                found.append(
                    f"A probe that has not seen {part} has AUROC {figure(others)} there for wrong answers, semantic "
                    f"entropy {figure(own)}."
                )
    return found
