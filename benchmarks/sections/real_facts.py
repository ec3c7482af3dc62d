"""A testbed of real facts."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, interval, table

TITLE = "Real facts"
COMMAND = (
    "python benchmarks/bench_real_facts.py --facts entityquestions_train.jsonl --other nq_open_dev.jsonl "
    "--num-facts 2000"
)


def section(result: dict[str, Any]) -> Section:
    """A campaign, and a map of another set."""
    run, other = result["campaign"], result["knowledge_map"]
    step = run["num_annotated"] / (len(run["accuracy"]) - 1)
    aurocs = [*run["probe_auroc"], None]
    wrong = [*run["auroc_wrong_unannotated"], None]
    rows = [
        [
            at,
            f"{step * at:.0f}",
            interval(accuracy, run["accuracy_ci"] if at == len(aurocs) - 1 else None),
            figure(aurocs[at]),
            figure(wrong[at]),
        ]
        for at, accuracy in enumerate(run["accuracy"])
    ]
    probe = other["probe"]
    text = f"""Does it carry over to questions that nobody invented? {result["num_facts"] or "All"} facts of
`{result["facts"]}`, {run["num_candidates"]:,} candidates; the testbed's model has seen some of the subjects.
AUROC of the probe for its label, and of the ranking for "answers wrongly" among what is not annotated.

{table(["round", "annotated", "accuracy", "AUROC unknown", "AUROC wrong"], rows)}

Of what the base model answers rightly the tuned one keeps {figure(run["kept"])}. The run took
{run["seconds"]:,.0f} s.

`ka2l probe` with the same model on {other["pool"]["usable"]:,} questions of `{result["other"]}`, which it has
never seen: it answers {interval(other["accuracy"], other["accuracy_ci"])} rightly, and
{figure(other["unknown_fraction"])} are mapped as unknown; AUROC unknown
{interval(probe["auroc"], probe["auroc_ci"])}, AUROC wrong
{interval(probe["auroc_wrong"], probe["auroc_wrong_ci"])}."""
    curve = {"KA2L": [(step * at, accuracy) for at, accuracy in enumerate(run["accuracy"])]}
    chart = lines("Accuracy by annotations, real facts", "annotations", "accuracy", curve)
    found = []
    if probe["auroc_wrong_ci"][0] <= 0.5:
        found.append(
            f"On `{result['other']}`, of which the model knows next to nothing, the probe tells right from wrong "
            f"answers no better than chance (AUROC {interval(probe['auroc_wrong'], probe['auroc_wrong_ci'])}): with "
            f"{figure(other['accuracy'])} of the answers right there is little to tell apart."
        )
    return Section(text, {"accuracy": chart}, found)
