"""Rounds and selection on the testbed."""

from __future__ import annotations

from typing import Any

from charts import bars
from pages import Section
from tables import figure, mean, table

TITLE = "Selection against random questions and against everything"
COMMAND = "python benchmarks/bench_campaign.py --seeds 0 1 2"
ARMS = {
    "random": "random questions, no rehearsal",
    "one_round": "KA2L, one round",
    "three_rounds": "KA2L, three rounds",
    "one_entropy": "one round by semantic entropy of every candidate's samples",
    "everything": "everything annotated",
}


def section(result: dict[str, Any]) -> Section:
    """Final accuracy of each arm, by testbed."""
    seeds, compared = result["by_seed"], result["comparison"]
    final = compared["final_accuracy"]
    spread = {arm: (min(final[arm]["by_seed"]), max(final[arm]["by_seed"])) for arm in ARMS}
    rows = [["base model", 0, figure(compared["base"]), "", "", ""]]
    for arm, name in ARMS.items():
        runs = [run[arm] for run in seeds.values()]
        low, high = spread[arm]
        rows.append([name, f"{runs[0]['num_annotated']:,}", figure(final[arm]["mean"]), f"{low:.3f} to {high:.3f}",
                     figure(mean(run["kept"] for run in runs)),
                     figure(mean(run["seconds"] for run in runs), 0)])  # fmt: skip
    num_candidates = next(iter(seeds.values()))["everything"]["num_candidates"]
    share = compared["share_of_the_way_to_everything"]["mean"]
    rounds = compared["three_rounds_minus_one_round"]
    text = f"""Does asking the model first pay, and do rounds? {len(seeds)} testbeds with {num_candidates:,} candidates
each; accuracy on unseen paraphrases, mean and range over the testbeds; kept: what the base model answered rightly and
the tuned one still does.

{table(["arm", "annotated", "accuracy", "range", "kept", "seconds"], rows)}

With half of the candidates annotated, three rounds come {share:.0%} of the way from the base model to everything
annotated. Three rounds less one: {rounds["mean"]:+.3f}, by testbed {_listed(rounds["by_seed"])}."""
    charts = {"accuracy": bars("Accuracy after tuning, mean and range over testbeds", "accuracy on unseen paraphrases",
                               {name: (final[arm]["mean"], *spread[arm]) for arm, name in ARMS.items()})}  # fmt: skip
    return Section(text, charts, losses(result))


def losses(result: dict[str, Any]) -> list[str]:
    """Entropy of everything against the probe, and annotating everything."""
    final = {arm: found["mean"] for arm, found in result["comparison"]["final_accuracy"].items()}
    found = []
    if final["one_entropy"] > final["one_round"]:
        found.append(
            f"Ranking by the semantic entropy of every candidate's own samples ends at {final['one_entropy']:.3f}, "
            f"the probe at {final['one_round']:.3f} in one round and {final['three_rounds']:.3f} in three: the probe "
            "only predicts that entropy, from one forward pass in place of the samples."
        )
    if final["everything"] > final["three_rounds"]:
        found.append(
            f"Annotating everything reaches {final['everything']:.3f}, three rounds with half of the annotations "
            f"{final['three_rounds']:.3f}: the other half of the candidates stays without an answer."
        )
    if result["comparison"]["three_rounds_minus_one_round"]["mean"] < 0:
        found.append("Three rounds end lower than one with as many annotations.")
    return found


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)
