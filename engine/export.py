"""A run handed over: its adapter with a model card, merged weights, the annotated data, how to serve it.

Reads what is committed, and the base model where that is needed; no cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.artifacts import RunDirectory, Stage
from engine.campaign import Campaign
from engine.config import RunConfig, parse_config
from engine.events import Events
from engine.export_card import CardFacts, base_licence, base_name, is_local, render_card
from engine.export_data import (
    FILES,
    FORMATS,
    AnnotatedSet,
    Asked,
    Format,
    annotated_set,
    why_no_preferences,
    write_format,
)
from engine.export_folder import MARK, check_out, written_folder
from engine.export_hub import check_push, push
from engine.export_serve import Served, not_servable, serve_command
from engine.stages.tables import first_questions
from ka2l.errors import ConfigError, ModelError, RunDirectoryError
from ka2l.models import ModelConfig, model_identity
from ka2l.prompts import EXAMPLES, plain_prompt

#: Finds the base model of a run: its config's ``model`` with ``path`` resolved to a folder or hub id.
FindModel = Callable[[RunConfig], ModelConfig]


@dataclass(frozen=True)
class ExportOptions:
    """What is wanted of an export."""

    out: str | None = None
    """Local folder; ``exports/NAME`` where not given."""
    round_index: int | None = None
    """Whose adapter; None: the last of a finished run."""
    base: str | None = None
    """Where the base model is, if not where the run's config says."""
    merged: bool = False
    formats: Sequence[Format] = ()
    """Empty: all that the run can give."""
    overwrite: bool = False
    push_to_hub: str | None = None
    """ORG/NAME."""
    public: bool = False


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    rows: dict[Format, int]
    command: str | None
    """``vllm serve ...``; None where vLLM can serve neither adapter nor merged weights."""
    notes: list[str]
    """What was left out, and why."""
    address: str | None
    """On the hub."""


def export(run_dir: str, options: ExportOptions, find_model: FindModel) -> Exported:
    """Write a run's adapter, card, data and, on request, merged weights into a new folder.

    Raises:
        RunDirectoryError: there is no finished run with an adapter, or the folder may not be written.
        ModelError: the base model is needed and not there, or is not the one that was tuned.
        ConfigError: a format or repository that cannot be had.
        CanaryError: merged weights that do not answer as the adapter does.
    """
    if options.public and options.push_to_hub is None:
        raise ConfigError("--public is about --push-to-hub", hint="Give --push-to-hub ORG/NAME, too.")
    run = RunDirectory(run_dir)
    config = _config_of(run)
    out = check_out(options.out or f"exports/{config.name}", options.overwrite)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    summary = json.loads(run.read_text("summary.json") or "{}")
    model = config.model.model_copy(update={"path": options.base}) if options.base else find_model(config)
    campaign = Campaign(config, run, Events(run), model, "")
    round_index = _chosen_round(run, _tuned_rounds(campaign), summary, options.round_index)
    notes: list[str] = []
    _check_base(campaign, round_index, notes, needed=options.merged)
    data = annotated_set(campaign, round_index)
    formats = _possible(campaign, options.formats, data, notes)
    made = _Export(campaign, round_index, options, summary, out, notes)
    with written_folder(out) as folder:
        rows, command = made.write(folder, data, formats)
    address = None
    if options.push_to_hub is not None:
        address = push(out, options.push_to_hub, public=options.public)
    return Exported(out, rows, command, notes, address)


# -- what there is to export -------------------------------------------------------------------------------------------


def _config_of(run: RunDirectory) -> RunConfig:
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


def _tuned_rounds(campaign: Campaign) -> list[int]:
    """Rounds whose adapter is there."""
    begun = range(campaign.run.num_rounds_begun())
    return [index for index in begun if campaign.adapter_stage(index).manifest() is not None]


def _chosen_round(run: RunDirectory, rounds: Sequence[int], summary: Mapping[str, Any], wanted: int | None) -> int:
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


def _check_base(campaign: Campaign, round_index: int, notes: list[str], *, needed: bool) -> None:
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


def _possible(campaign: Campaign, wanted: Sequence[Format], data: AnnotatedSet, notes: list[str]) -> list[Format]:
    """The formats to write; raises ConfigError where one is asked for that there is nothing for."""
    for name in wanted:
        if name not in FORMATS:
            raise ConfigError(f"there is no format {name!r}", hint=f"Formats: {', '.join(FORMATS)}.")
    chosen = list(dict.fromkeys(wanted)) or list(FORMATS)
    if "preference" in chosen and not data.preferences:
        reason = why_no_preferences(campaign)
        if wanted:
            raise ConfigError(f"format preference cannot be had. {reason}", hint="Leave it out.")
        chosen.remove("preference")
        notes.append(f"No preference data. {reason}")
    return chosen


# -- writing it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Export:
    campaign: Campaign
    round_index: int
    options: ExportOptions
    summary: Mapping[str, Any]
    out: Path
    """Where the folder will be in the end."""
    notes: list[str]

    @property
    def stage(self) -> Stage:
        return self.campaign.adapter_stage(self.round_index)

    @property
    def name(self) -> str:
        """What requests call the model."""
        return re.sub(r"[^\w.-]+", "-", self.campaign.config.name).strip("-") or "adapter"

    def write(
        self, folder: Path, data: AnnotatedSet, formats: Sequence[Format]
    ) -> tuple[dict[Format, int], str | None]:
        """Write all files; returns the rows of each format and the command that serves them."""
        self._copy_adapter(folder)
        fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        canary = json.loads((folder / "canary.json").read_text(encoding="utf-8"))
        merged_dtype = self._merge(folder, canary) if self.options.merged else None
        prompt, chat = self._prompt(canary)
        asked = Asked(self.campaign.config.prompt, chat)
        rows = {name: write_format(folder / FILES[name], name, data.of(name), asked) for name in formats}
        reason = not_servable(fields)
        base, where = self.campaign.model.path, self.options.push_to_hub or "."
        found_at = str(Path(base).expanduser().absolute()) if is_local(base) else base
        command = self._command(fields, found_at, str(self.out), merged=merged_dtype is not None)
        facts = CardFacts(
            round_index=self.round_index,
            manifest=self.stage.require(),
            summary=self.summary,
            data=data,
            counts=rows,
            licence=base_licence(base, self.campaign.model.revision),
            prompt=prompt,
            chat=chat,
            where=where,
            name=self.name,
            command=self._command(fields, base_name(base), where, merged=merged_dtype is not None),
            not_served=reason,
            merged_dtype=merged_dtype,
            adapter_config=fields,
        )
        if reason is not None:
            self.notes.append(reason)
        (folder / "README.md").write_text(render_card(self.campaign, facts), encoding="utf-8")
        self._write_mark(folder, rows, command, merged_dtype)
        return rows, command

    def _copy_adapter(self, folder: Path) -> None:
        """The stage's adapter files, byte for byte."""
        for entry in self.stage.verify().files:
            if entry.path.startswith("adapter/"):
                content = self.campaign.run.read_bytes(f"{self.stage.path}/{entry.path}")
                assert content is not None
                (folder / Path(entry.path).name).write_bytes(content)

    def _merge(self, folder: Path, canary: Mapping[str, Any]) -> str:
        from ka2l.merging import check_merged, merge_adapter

        model, merged = self.campaign.model, str(folder / "merged")
        dtype = merge_adapter(model.path, str(folder), merged, model.trust_remote_code)
        check_merged(merged, dtype, canary, model.trust_remote_code)
        return dtype

    def _prompt(self, canary: Mapping[str, Any]) -> tuple[str, bool]:
        """How the run asks ``{question}``, and whether a chat template renders that; read from the canary's prompts,
        which are those of the questions with the lowest ids."""
        config = self.campaign.config.prompt
        rendered: str = canary["prompts"][0]
        (first,) = first_questions(self.campaign.stage("questions"), 1)
        chat = rendered != plain_prompt(first, config.instruction, EXAMPLES[: config.num_shots])
        before, found, after = rendered.rpartition(first)
        return (f"{before}{{question}}{after}" if found else rendered), chat

    def _command(self, fields: Mapping[str, Any], base: str, where: str, *, merged: bool) -> str | None:
        served = None
        if not_servable(fields) is None:
            served = Served(base, self.name, where, None)
        elif merged:
            served = Served(base, self.name, None, str(Path(where) / "merged"))
        if served is None:
            return None
        return serve_command(served, self.campaign.config, fields, self.campaign.model.path)

    def _write_mark(
        self, folder: Path, rows: Mapping[Format, int], command: str | None, merged_dtype: str | None
    ) -> None:
        manifest = self.stage.require()
        content = {
            "run": self.campaign.run.url,
            "round": self.round_index,
            "stage": manifest.stage,
            "fingerprint": manifest.fingerprint,
            "model": manifest.config["run"]["model"],
            "merged": merged_dtype,
            "rows": {FILES[name]: count for name, count in rows.items()},
            "serve": command,
            "notes": self.notes,
        }
        (folder / MARK).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
