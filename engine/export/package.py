"""Exports a run: its adapter with a model card, merged weights, the annotated data, the command that serves it.

Reads what is committed, and the base model where that is needed; no cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import RunConfig
from engine.execution.campaign import Campaign
from engine.export.card import CardFacts, Whole, base_licence, base_name, is_local, render_card
from engine.export.data import (
    FILES,
    FORMATS,
    AnnotatedSet,
    Asked,
    Format,
    annotated_set,
    why_no_preferences,
    write_format,
)
from engine.export.folder import MARK, check_out, written_folder
from engine.export.hub import check_push, push
from engine.export.serve import Served, not_servable, serve_command
from engine.export.source import check_base, chosen_round, config_of, tuned_rounds
from engine.stages.tables import first_questions
from engine.store.events import Events
from engine.store.run_directory import RunDirectory
from engine.store.stage_folder import Stage
from ka2l.errors import ConfigError
from ka2l.model.loading import ModelConfig
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
        raise ConfigError("--public applies to --push-to-hub only", hint="Give --push-to-hub ORG/NAME, too.")
    run = RunDirectory(run_dir)
    config = config_of(run)
    out = check_out(options.out or f"exports/{config.name}", options.overwrite)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    summary = json.loads(run.read_text("summary.json") or "{}")
    model = config.model.model_copy(update={"path": options.base}) if options.base else find_model(config)
    campaign = Campaign(config, run, Events(run), model, "")
    round_index = chosen_round(run, tuned_rounds(campaign), summary, options.round_index)
    notes: list[str] = []
    check_base(campaign, round_index, notes, needed=options.merged)
    data = annotated_set(campaign, round_index)
    formats = _possible(campaign, options.formats, data, notes)
    made = _Export(campaign, round_index, options, summary, out, notes)
    with written_folder(out) as folder:
        rows, command = made.write(folder, data, formats)
    address = None
    if options.push_to_hub is not None:
        address = push(out, options.push_to_hub, public=options.public)
    return Exported(out, rows, command, notes, address)


def _possible(campaign: Campaign, wanted: Sequence[Format], data: AnnotatedSet, notes: list[str]) -> list[Format]:
    """The formats to write; raises ConfigError where one is asked for that there is nothing for."""
    for name in wanted:
        if name not in FORMATS:
            raise ConfigError(f"there is no format {name!r}", hint=f"Formats: {', '.join(FORMATS)}.")
    chosen = list(dict.fromkeys(wanted)) or list(FORMATS)
    if "preference" in chosen and not data.preferences:
        reason = why_no_preferences(campaign)
        if wanted:
            raise ConfigError(f"format preference is not available. {reason}", hint="Leave it out.")
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
        fields = self._write_adapter(folder)
        canary = json.loads((folder / "canary.json").read_text(encoding="utf-8"))
        whole = self._write_whole(folder, canary, beside=fields is not None)
        prompt, chat = self._prompt(canary)
        asked = Asked(self.campaign.config.prompt, chat)
        rows = {name: write_format(folder / FILES[name], name, data.of(name), asked) for name in formats}
        base, where = self.campaign.model.path, self.options.push_to_hub or "."
        found_at = str(Path(base).expanduser().absolute()) if is_local(base) else base
        command = self._command(fields, found_at, str(self.out), str(self.out), whole)
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
            command=self._command(fields, base_name(base), where, ".", whole),
            not_served=None if fields is None else not_servable(fields),
            adapter_config=fields,
            whole=whole,
        )
        if facts.not_served is not None:
            self.notes.append(facts.not_served)
        (folder / "README.md").write_text(render_card(self.campaign, facts), encoding="utf-8")
        self._write_mark(folder, rows, command, whole)
        return rows, command

    def _write_adapter(self, folder: Path) -> dict[str, Any] | None:
        """The adapter's files, byte for byte, and the canary; returns the adapter's config, None where the run has
        tuned a whole model."""
        self._copy("model", folder, only="canary.json")
        if not self._copy("adapter", folder):
            return None
        fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return fields

    def _write_whole(self, folder: Path, canary: dict[str, Any], *, beside: bool) -> Whole | None:
        """A whole model: the one that the run has written, else on request base and adapter merged.

        Args:
            beside: there is an adapter, too.
        """
        if beside and not self.options.merged:
            return None
        place = "merged" if beside else ""
        if self._copy("model", folder / place):
            if beside:
                (folder / place / "canary.json").unlink()
            found = json.loads((folder / place / "config.json").read_text(encoding="utf-8"))
            return Whole(place, str(found.get("dtype") or found.get("torch_dtype")))
        from ka2l.model.merging import check_merged, merge_adapter

        model, merged = self.campaign.model, str(folder / place)
        dtype = merge_adapter(model.source, str(folder), merged, model.trust_remote_code)
        check_merged(merged, dtype, canary, model.trust_remote_code)
        return Whole(place, dtype)

    def _copy(self, source: str, folder: Path, only: str | None = None) -> bool:
        """Copy what the stage has committed in one of its folders; returns whether there was anything."""
        names = [entry.path for entry in self.stage.verify().files if entry.path.startswith(f"{source}/")]
        for path in names:
            name = Path(path).name
            if only in (None, name):
                folder.mkdir(exist_ok=True)
                self.campaign.run.copy_out(f"{self.stage.path}/{path}", folder / name)
        return bool(names)

    def _prompt(self, canary: Mapping[str, Any]) -> tuple[str, bool]:
        """How the run asks ``{question}``, and whether a chat template renders that; read from the canary's prompts,
        which are those of the questions with the lowest ids."""
        config = self.campaign.config.prompt
        rendered: str = canary["prompts"][0]
        (first,) = first_questions(self.campaign.stage("questions"), 1)
        chat = rendered != plain_prompt(first, config.instruction, EXAMPLES[: config.num_shots])
        before, found, after = rendered.rpartition(first)
        return (f"{before}{{question}}{after}" if found else rendered), chat

    def _command(
        self, fields: Mapping[str, Any] | None, base: str, adapter: str, folder: str, whole: Whole | None
    ) -> str | None:
        if fields is not None and not_servable(fields) is None:
            served = Served(base, self.name, adapter, None)
        elif whole is not None:
            served = Served(base, self.name, None, f"{folder}/{whole.place}" if whole.place else adapter)
        else:
            return None
        return serve_command(served, self.campaign.config, fields or {}, self.campaign.model.path)

    def _write_mark(self, folder: Path, rows: Mapping[Format, int], command: str | None, whole: Whole | None) -> None:
        manifest = self.stage.require()
        content = {
            "run": self.campaign.run.url,
            "round": self.round_index,
            "stage": manifest.stage,
            "fingerprint": manifest.fingerprint,
            "model": manifest.config["run"]["model"],
            "whole_model": None if whole is None else whole._asdict(),
            "rows": {FILES[name]: count for name, count in rows.items()},
            "serve": command,
            "notes": self.notes,
        }
        (folder / MARK).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
