"""Finds the model state of a run that is exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import RunConfig, parse_config
from engine.execution.campaign import Campaign
from engine.store.run_directory import RunDirectory
from ka2l.errors import ModelError, RunDirectoryError
from ka2l.model.loading import model_identity


def config_of(run: RunDirectory) -> RunConfig:
    """The config of a run that tunes; raises RunDirectoryError where there is none."""
    if run.read_text("matrix.yaml") is not None:
        raise RunDirectoryError(
            f"{run.url} holds a benchmark, not a run", hint=f"Name one of its runs: ka2l export {run.url}/cells/CELL"
        )
    text = run.read_text("config.yaml")
    if text is None:
        raise RunDirectoryError(f"{run.url} holds no run", hint="Start one: ka2l run CONFIG --run-dir DIR")
    if run.read_text("mode") == "probe":
        raise RunDirectoryError(
            f"{run.url} holds no adapter: `ka2l probe` tunes nothing", hint="Export a run made by `ka2l run`."
        )
    return parse_config(text, (), f"{run.url}/config.yaml")


def tuned_rounds(campaign: Campaign) -> list[int]:
    """Rounds whose adapter is there."""
    begun = range(campaign.run.num_rounds_begun())
    return [index for index in begun if campaign.adapter_stage(index).manifest() is not None]


def chosen_round(run: RunDirectory, rounds: Sequence[int], summary: Mapping[str, Any], wanted: int | None) -> int:
    """The round to take: the one that is ``wanted``, else the last of a finished run.

    Raises:
        RunDirectoryError: it has tuned nothing, or the run is not finished and nothing is wanted.
    """
    if not rounds:
        raise RunDirectoryError(f"no round of {run.url} has tuned an adapter yet", hint=f"Go on: ka2l resume {run.url}")
    if wanted is not None:
        if wanted not in rounds:
            there = ", ".join(map(str, rounds))
            raise RunDirectoryError(f"round {wanted} of {run.url} has no adapter", hint=f"These have one: {there}.")
        return wanted
    status = summary.get("status", "running")
    if status != "complete":
        raise RunDirectoryError(
            f"{run.url} is not finished: {status}",
            hint=f"Finish it: ka2l resume {run.url}. Or take the adapter of the last round that has one: "
            f"--round {rounds[-1]}",
        )
    return rounds[-1]


def check_base(campaign: Campaign, round_index: int, notes: list[str], *, needed: bool) -> None:
    """Raise ModelError where the base model is not the one that the adapter was tuned on."""
    model = campaign.model
    try:
        found = model_identity(model)
    except ModelError as error:
        if needed:
            raise ModelError(
                f"merging needs the base model: {error.message}", hint="Say where it is: --base DIR"
            ) from error
        notes.append(f"The base model was not looked at: {error.message}.")
        return
    tuned_on = campaign.adapter_stage(round_index).require().config["run"]["model"]["content"]
    if found != tuned_on:
        raise ModelError(
            f"the adapter was tuned on another base model than {model.path} ({tuned_on}, not {found})",
            hint="Its files have changed since, or it is another model. Say where the right one is: --base DIR",
        )
