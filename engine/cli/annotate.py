"""``ka2l annotate``: takes people's answers from files or on a local page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.options import RunDirArgument
from engine.launch import config_text

if TYPE_CHECKING:
    from engine.config import RunConfig

annotate_app = typer.Typer(help="Answer the questions that a paused run waits for.", no_args_is_help=True)


@annotate_app.callback()
def annotate(context: typer.Context, run_dir: RunDirArgument) -> None:
    """Answer the questions that a paused run waits for: in a file, or in the browser.

    Example: ka2l annotate runs/mine serve
    """
    context.obj = run_dir


@annotate_app.command("import")
def import_command(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Filled-in task files: JSONL, CSV or Label Studio's JSON.")],
    annotator: Annotated[str, typer.Option(help="Who answered, where a row does not say.")] = "human",
) -> None:
    """Take answers from files. What cannot be used is listed with its line and reason; the rest is taken."""
    from engine import build
    from engine.annotation import human

    config, folder = _waiting(context.obj)
    problems, merged = human.import_answers(folder, files, annotator, build.equivalence(config.equivalence))
    for problem in problems:
        typer.echo(f"{problem.place.source} line {problem.place.line}: {problem.reason}", err=True)
    for conflict in merged.conflicts:
        said = "; ".join(f"{answer.annotator}: {' | '.join(answer.answers)}" for answer in conflict.answers)
        typer.echo(f"conflict over {conflict.question_id} ({conflict.question}): {said}", err=True)
    typer.echo(
        f"{len(merged.annotations):,} answered, {len(merged.skipped):,} cannot be answered, "
        f"{len(merged.conflicts):,} in conflict (left out), {len(merged.missing):,} missing\n{merged.agreement}"
    )
    if not merged.missing:
        typer.echo(f"go on: ka2l resume {context.obj}")


@annotate_app.command("serve")
def serve_command(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.")] = 0,
) -> None:
    """Answer in the browser, one question after the other, with the keyboard alone. Ctrl-C ends it; nothing is lost.

    Listens on 127.0.0.1 only. The address holds a secret: who has it may answer.
    """
    from engine.annotation import human
    from engine.annotation.page import serve

    _, folder = _waiting(context.obj)
    store = human.open_store(folder)
    try:
        serve(human.tasks_of(folder), store, port)
    finally:
        store.close()
    typer.echo(f"go on: ka2l resume {context.obj}")


def _waiting(run_dir: str) -> tuple[RunConfig, Path]:
    """Config of a run and the folder of the round that waits for people."""
    from engine.annotation.human import pending_round
    from engine.config import parse_config
    from engine.store.run_directory import RunDirectory

    target = RunDirectory(run_dir)
    config = parse_config(config_text(target), (), f"{run_dir}/config.yaml")
    return config, pending_round(target)
