"""Questions decoded from hidden states."""

from __future__ import annotations

from typing import Any

from charts import bars
from pages import Section
from tables import figure, mean, spread, table

TITLE = "Questions decoded from hidden states"
COMMAND = "python benchmarks/bench_decoder.py --seeds 0 1 2"
KINDS = {
    "inversion": "inversion, from the last token's and the mean state",
    "self_inversion": "self_inversion, from both",
    "last_token": "inversion, from the last token's state alone",
}
HELP = {
    "pool_only": "selected questions of the pool",
    "half_decoded": "half of them decoded",
    "all_decoded": "all of them decoded",
    "paraphrases": "half as many selected, each in two wordings",
    "random": "random questions of the pool",
}


def section(result: dict[str, Any]) -> Section:
    """How true decoding is, and whether it helps."""
    seeds = result["by_seed"]
    fidelity = [_fidelity(name, [run[arm] for run in seeds.values() if arm in run]) for arm, name in KINDS.items()]
    base = [run["pool_only"]["before"] for run in seeds.values()]
    rows = [["nothing", *(figure(mean(run[key] for run in base)) for key in ("accuracy_in_pool", "accuracy_outside"))]]
    in_pool, outside = {}, {}
    for arm, name in HELP.items():
        runs = [run[arm]["after"] for run in seeds.values()]
        in_pool[arm] = [run["accuracy_in_pool"] for run in runs]
        outside[arm] = [run["accuracy_outside"] for run in runs]
        rows.append([name, f"{mean(in_pool[arm]):.3f}", f"{mean(outside[arm]):.3f}"])
    num_annotated = next(iter(seeds.values()))["pool_only"]["num_annotated"]
    headers = ["decoder", "testbeds", "word for word", "token F1", "noised that pass all gates", "training, s"]
    text = f"""How truly are states read back into the questions they come from, and does annotating decoded
questions help? {len(seeds)} testbeds; unseen questions read back word for word, and the noised ones that all
gates let through.

{table(headers, fidelity)}

With {num_annotated} annotations in one round, mean accuracy on unseen paraphrases of facts in the pool, and on
facts of the same people outside it:

{table(["annotated", "in the pool", "outside it"], rows)}

The testbed's facts are independent of each other: an answer about one person teaches nothing about another."""
    values = {name: (mean(in_pool[arm]), min(in_pool[arm]), max(in_pool[arm])) for arm, name in HELP.items()}
    chart = bars("Accuracy on facts in the pool, mean and range over testbeds", "accuracy", values)
    before = mean(run["accuracy_outside"] for run in base)
    return Section(text, {"help": chart}, losses(in_pool, outside, before))


def _fidelity(name: str, runs: list[dict[str, Any]]) -> list[object]:
    return [
        name,
        len(runs),
        spread(run["decoder"]["exact_match"] for run in runs),
        spread(run["decoder"]["token_f1"] for run in runs),
        spread(run["decoded"]["by_variant"]["noised"]["passed"] for run in runs),
        spread((run["decoder"]["training_seconds"] for run in runs), 0),
    ]


def losses(in_pool: dict[str, list[float]], outside: dict[str, list[float]], before: float) -> list[str]:
    """Arms that are behind the pool's own questions, or behind the base model outside the pool."""
    found = []
    best = mean(in_pool["pool_only"])
    lower = [arm for arm in ("half_decoded", "all_decoded") if mean(in_pool[arm]) < best]
    if lower:
        figures = ", ".join(f"{mean(in_pool[arm]):.3f} with {HELP[arm]}" for arm in lower)
        found.append(
            f"Annotating decoded questions does not help here: accuracy in the pool is {figures}, and {best:.3f} "
            "with the pool's own questions, since nothing follows from a fact about one person for another."
        )
    behind = [mean(outside[arm]) for arm in ("pool_only", "half_decoded", "all_decoded")]
    if max(behind) < before:
        found.append(
            "Tuning lowers accuracy on facts of the same people that the pool does not ask for, decoded questions or "
            f"not: base model {before:.3f}, tuned {spread(behind)}."
        )
    return found
