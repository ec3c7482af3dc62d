"""SFT and DPO beside plain TRL."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, interval, table

TITLE = "SFT and DPO beside plain TRL"
COMMAND = "python benchmarks/bench_trl.py"
NAMES = {"sft": "SFT", "dpo": "DPO"}
SIDES = ("ka2l", "trl")


def section(result: dict[str, Any]) -> Section:
    """Speed, memory, and that both did the same work."""
    settings, tuning = result["settings"], result["settings"]["tuning"]
    rows = []
    for what, name in NAMES.items():
        step, total, peak = (result[what][key] for key in ("step", "total", "peak_mib"))
        paces = [figure(1 / step["seconds"][side], 2) for side in SIDES]
        rows += [
            [f"{name}: steps/s", *paces, _ratio(step)],
            [f"{name}: seconds in all", *(figure(total["seconds"][side], 2) for side in SIDES), _ratio(total)],
            [f"{name}: MiB", *(figure(peak[side], 0) for side in SIDES), figure(peak["trl"] / peak["ka2l"], 2)],
        ]
    differences = ", ".join(
        f"{name} {figure(result[what]['max_abs_loss_difference'], 6)}" for what, name in NAMES.items()
    )
    steps = " and ".join(f"{result[what]['num_steps']['ka2l']} of {name}" for what, name in NAMES.items())
    text = f"""Our training is TRL's trainers, with rows made and tokenized by us. What does that cost? The testbed's
model, LoRA of rank {tuning["adapter"]["r"]}, {tuning["dtype"]}, no packing, batches of {tuning["batch_size"]} (SFT) and
{tuning["knowtuning"]["batch_size"]} (DPO), {steps} steps; medians of {settings["repeats"]} rounds in turns, with the
range of their ratios. "In all" is from the loading of the model to the saved adapter, without imports; memory is the
process's, with everything that it has imported.

{table(["", "KA2L", "TRL", "TRL / KA2L, in seconds or MiB"], rows)}

Both did the same work: the largest difference of a logged loss, nats: {differences}."""
    return Section(text, {}, [loss for what, name in NAMES.items() for loss in _losses(result[what], name)])


def _ratio(one: dict[str, Any]) -> str:
    return interval(one["peer_over_ka2l"], one["peer_over_ka2l_range"], 3)


def _losses(one: dict[str, Any], name: str) -> list[str]:
    losses = []
    for key, meaning in (("step", "A step of {}"), ("total", "{} from loading to the saved adapter")):
        ratio = one[key]["peer_over_ka2l"]
        # What a round in either direction contradicts is noise.
        if one[key]["peer_over_ka2l_range"][1] < 1:
            losses.append(f"{meaning.format(name)} takes {1 / ratio:.2f} times plain TRL's seconds.")
    peak = one["peak_mib"]
    if peak["ka2l"] > 1.02 * peak["trl"]:
        losses.append(f"{name} takes {peak['ka2l'] - peak['trl']:.0f} MiB more memory than plain TRL.")
    difference = one["max_abs_loss_difference"]
    if difference is None or difference > 1e-3:
        losses.append(f"{name}'s losses are not plain TRL's: their largest difference is {difference}.")
    return losses
