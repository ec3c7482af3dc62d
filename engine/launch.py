"""Starts or resumes a run: checks its config, executes it, prints its summary."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from engine.execution.cluster import RaySession
from engine.inputs import prepare, resolve
from ka2l.errors import (
    AnnotationsPending,
    ConfigError,
    HoursUsedUp,
    KA2LError,
    RunDirectoryError,
    StaleStageError,
)

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.execution.campaign import Campaign
    from engine.store.run_directory import RunDirectory

console = Console(stderr=True)


def begin(
    source: str, run_dir: str | None, overrides: list[str] | None, *, only_probe: bool, may_go_on: bool = False
) -> None:
    """Begin a run with the config that ``source`` names, and execute it.

    Args:
        only_probe: map what the model knows; nothing is annotated or tuned.
        may_go_on: go on with a run that is there already, in place of refusing it.
    """
    from engine.config import dump_config, load_config
    from engine.store.run_directory import RunDirectory

    config = load_config(source, overrides or ())
    if only_probe:
        config = config.model_copy(update={"rounds": 0})  # so that nothing is sampled for tuning
    target = RunDirectory(run_dir or f"runs/{config.name}")
    if may_go_on and (text := target.read_text("config.yaml")) is not None:
        with target.lock():
            go_on(target, config, text)
        return
    _refuse_old_run(target)
    prepare(config, console)
    with target.lock():
        _refuse_old_run(target)  # one that began in the meantime
        target.write_text("mode", "probe" if only_probe else "campaign")
        target.write_text("config.yaml", dump_config(config))
        _execute(target, config, only_probe=only_probe)


def go_on(target: RunDirectory, config: RunConfig, text: str) -> None:
    """Go on with a run that was made with the config in ``text``; the caller holds its lock."""
    from engine.config import dump_config

    prepare(config, console, pool_is_read=target.stage("questions").manifest() is not None)
    target.write_text("config.yaml", dump_config(config))
    try:
        _execute(target, config, only_probe=(target.read_text("mode") == "probe"))
    except StaleStageError:
        target.write_text("config.yaml", text)
        raise


def _refuse_old_run(target: RunDirectory) -> None:
    if target.exists():
        raise RunDirectoryError(
            f"{target.url} holds a run already",
            hint=f"Go on with it: ka2l resume {target.url}. Or choose another --run-dir.",
        )


def _execute(target: RunDirectory, config: RunConfig, *, only_probe: bool) -> None:
    from engine import loop
    from engine.execution.campaign import Campaign
    from engine.execution.sharing import LEASES_VARIABLE, leases_from
    from engine.execution.trackers import open_trackers
    from engine.store.events import Events

    model, pool_path = resolve(config, console)
    events = Events(target, console)
    trackers = open_trackers(config, target, events)
    events.emit("run_started", pid=os.getpid())
    campaign = Campaign(config, target, events, model, pool_path, trackers=trackers)
    if config.rounds and not only_probe:
        events.say(config.tuning.adapter.served(config.sampler.kind))
    try:
        with RaySession(config.ray, f"{target.logs()}/driver.log"), campaign.hours.deadline():
            campaign.leases, campaign.slice_s = leases_from(os.environ.get(LEASES_VARIABLE))
            (loop.probe if only_probe else loop.run)(campaign)
    except HoursUsedUp as used_up:
        events.say(used_up.message)
        loop.publish(campaign, "complete", used_up.message)
    except AnnotationsPending as pending:
        events.emit("run_paused", reason=pending.message)
        loop.publish(campaign, "paused", pending.message)
        raise
    except BaseException as error:
        with contextlib.suppress(KA2LError):  # a full disk must not hide the first error
            events.emit("run_stopped", error=repr(error))
        if not isinstance(error, KA2LError) or error.exit_code == 1:
            _note_failure(campaign)
        raise
    finally:
        trackers.finish()
    events.emit("run_complete")
    print_summary(target, Console())
    typer.echo(f"report: {target.url}/report.html")


def _note_failure(campaign: Campaign) -> None:
    from engine.report.build import write_report
    from engine.store.ledger import write_ledger

    try:
        write_report(campaign.run, "failed")
        write_ledger(campaign.run)
    except Exception as error:  # the first error is the one to show
        campaign.events.say(f"(the report could not be written: {error})")


def config_text(target: RunDirectory) -> str:
    """The config of the run in ``target``, as YAML.

    Raises:
        RunDirectoryError: there is no run.
    """
    text = target.read_text("config.yaml")
    if text is None:
        raise RunDirectoryError(f"{target.url} holds no run", hint="Start one: ka2l run CONFIG --run-dir DIR")
    return text


def remove_from(target: RunDirectory, stage_name: str, round_index: int) -> None:
    """Remove a stage of a round and all that comes after it."""
    from engine.stages import pool_folders, round_folders

    of_pool, of_round = pool_folders(), round_folders()
    if stage_name not in of_pool + of_round:
        raise ConfigError(f"no stage is called {stage_name!r}", hint=f"Stages: {', '.join(of_pool + of_round)}")
    if round_index not in range(max(1, target.num_rounds_begun())):
        raise RunDirectoryError(
            f"{target.url} has no round {round_index}", hint="`ka2l status` shows the rounds that were begun."
        )
    if stage_name in of_pool:
        for name in of_pool:
            target.stage(name).remove()
        round_index, stage_name = 0, of_round[0]
    for index in range(round_index, target.num_rounds_begun()):
        first = of_round.index(stage_name) if index == round_index else 0
        for name in of_round[first:]:
            target.stage(name, index).remove()


def print_summary(target: RunDirectory, out: Console) -> None:
    """A table of the run's rounds, where there is a summary yet."""
    text = target.read_text("summary.json")
    if text is None:
        return
    summary = json.loads(text)
    table = Table("round", "annotated", "accuracy", "kept", "probe AUROC", "seconds", title=f"{summary['status']}")
    for row in summary["rounds"]:
        number = lambda value: "" if value is None else f"{value:.3f}"  # noqa: E731
        forgotten = row.get("forgetting")
        table.add_row(
            str(row["round"]),
            str(row["num_annotated"]),
            number(row["accuracy"]),
            number(None if forgotten is None else 1 - forgotten),
            number((row.get("probe") or {}).get("auroc")),
            f"{row['cost']['seconds']:.0f}",
        )
    out.print(table)
