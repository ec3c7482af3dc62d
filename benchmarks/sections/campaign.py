"""Rounds and selection on the testbed."""

from __future__ import annotations

from typing import Any

from charts import bars
from pages import Section
from tables import figure, mean, percent, spread, table

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
    """Final accuracy of each arm over testbeds."""
    seeds, compared = result["by_seed"], result["comparison"]
    final = compared["final_accuracy"]
    rows = [["base model", 0, figure(compared["base"]), "", "", ""]]
    for arm, name in ARMS.items():
        runs = [run[arm] for run in seeds.values()]
        rows.append([name, f"{runs[0]['num_annotated']:,}", figure(final[arm]["mean"]), spread(final[arm]["by_seed"]),
                     figure(mean(run["kept"] for run in runs)),
                     figure(mean(run["seconds"] for run in runs), 0)])  # fmt: skip
    num_candidates = next(iter(seeds.values()))["everything"]["num_candidates"]
    rounds = compared["three_rounds_minus_one_round"]
    text = f"""Does asking the model first pay, and do rounds? {len(seeds)} testbeds with {num_candidates:,}
candidates each; accuracy on unseen paraphrases, mean and range over the testbeds; kept: the share of what the
base model answers rightly that the tuned one still does.

{table(["arm", "annotated", "accuracy", "range", "kept", "seconds"], rows)}

Three rounds come {percent(compared["share_of_the_way_to_everything"]["mean"])} of the way from the base model
to everything annotated. Three rounds less one: {rounds["mean"]:+.3f}, by testbed
{", ".join(f"{value:+.3f}" for value in rounds["by_seed"])}."""
    values = {
        name: (final[arm]["mean"], min(final[arm]["by_seed"]), max(final[arm]["by_seed"])) for arm, name in ARMS.items()
    }
    chart = bars("Accuracy after tuning, mean and range over testbeds", "accuracy on unseen paraphrases", values)
    return Section(text, {"accuracy": chart}, losses(result))


def losses(result: dict[str, Any]) -> list[str]:
    """Entropy of every candidate, everything annotated, and one round."""
    final = {arm: found["mean"] for arm, found in result["comparison"]["final_accuracy"].items()}
    found = []
    if final["one_entropy"] > max(final["one_round"], final["three_rounds"]):
        found.append(
            f"Ranking by the semantic entropy of every candidate's own samples ends at {final['one_entropy']:.3f}, the "
            f"probe at {final['one_round']:.3f} in one round and {final['three_rounds']:.3f} in three: the probe only "
            "predicts that entropy, from one forward pass in place of the samples."
        )
    if final["everything"] > final["three_rounds"]:
        found.append(
            f"Annotating everything reaches {final['everything']:.3f}, three rounds {final['three_rounds']:.3f}: what "
            "was not selected stays without an answer."
        )
    if final["three_rounds"] < final["one_round"]:
        found.append(
            f"Three rounds end at {final['three_rounds']:.3f}, one round with as many annotations at "
            f"{final['one_round']:.3f}."
        )
    return found
