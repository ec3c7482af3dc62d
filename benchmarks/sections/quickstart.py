"""`make quickstart` in a fresh clone."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, interval, table

TITLE = "The quickstart"
COMMAND = "make quickstart"


def section(result: dict[str, Any]) -> Section:
    """Round by round."""
    summary = result["summary"]
    rounds = summary["rounds"]
    rows = []
    for row in rounds:
        decoded, probe, cost = row["decoded"] or {}, row["probe"], row["cost"]
        rows.append([row["round"], row["num_annotated"], interval(row["accuracy"], row["accuracy_ci"]),
                     figure(decoded.get("accuracy_in_pool")), figure(decoded.get("accuracy_outside")),
                     interval(probe["auroc"], probe["auroc_ci"]),
                     interval(probe["auroc_wrong"], probe["auroc_wrong_ci"]),
                     f"{cost['tokens_generated']:,}", figure(cost["seconds"], 0)])  # fmt: skip
    header = ["round", "annotated", "accuracy", "in the pool", "outside it", "AUROC unknown", "AUROC wrong",
              "tokens generated", "seconds"]  # fmt: skip
    text = f"""What does `make quickstart` come to ({result["what"]})? A fifth of the eval questions ask for
facts outside the pool, and a tenth of the annotations goes to decoded questions; accuracy in and outside the
pool is taken where a round decodes.

{table(header, rows)}

The command took {result["wall_seconds"]} s, the run {summary["total_seconds"]:.0f} s."""
    curve = {
        "all eval questions": [(row["num_annotated"], row["accuracy"], *row["accuracy_ci"]) for row in rounds],
        **{
            name: [(row["num_annotated"], row["decoded"][key]) for row in rounds if row["decoded"]]
            for key, name in (("accuracy_in_pool", "in the pool"), ("accuracy_outside", "outside it"))
        },
    }
    chart = lines("Accuracy by annotations, quickstart (95 % CI)", "annotations", "accuracy", curve)
    return Section(text, {"accuracy": chart}, losses(summary))


def losses(summary: dict[str, Any]) -> list[str]:
    """Facts outside the pool, and computation."""
    found = []
    outside = [row["decoded"]["accuracy_outside"] for row in summary["rounds"] if row["decoded"]]
    if outside[-1] < outside[0]:
        found.append(
            f"In the quickstart accuracy on facts outside the pool falls from {outside[0]:.3f} to {outside[-1]:.3f} "
            "by the last round that decodes: tuning on other facts blurs them, and too few decoded questions reach "
            "them."
        )
    net = summary["net"]
    saving, everything = net["everything"]["saving"], net["everything"]
    if saving["compute_money"] < 0:
        found.append(
            f"The quickstart computes for {net['compute_total']['seconds']:.0f} s to save "
            f"{saving['annotations']:.0f} annotations; tuning once on every candidate would take an estimated "
            f"{everything['compute']['seconds']:.0f} s: asking, decoding and tuning in rounds pays only where an "
            f"annotation costs more than {saving['break_even_price']:.2g} {net['currency']}."
        )
    return found
