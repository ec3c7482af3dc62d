"""``ka2l testbed``: builds a model whose knowledge is known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.options import SetOption
from engine.inputs import TestbedProgress, testbed_in_cache
from engine.launch import console
from ka2l.errors import RunDirectoryError

testbed_app = typer.Typer(help="The built-in closed-book model whose knowledge is known exactly.", no_args_is_help=True)


@testbed_app.command("build")
def build_testbed_command(
    config: Annotated[str, typer.Argument(help="Preset or YAML file whose `testbed:` section says what to build.")] = (
        "quickstart"
    ),
    out: Annotated[str | None, typer.Option(help="Folder for the testbed; the user's cache where not given.")] = None,
    facts: Annotated[str | None, typer.Option(help="JSONL with question and answers: a testbed of real facts.")] = None,
    exposure: Annotated[str | None, typer.Option(help="Column of --facts that says how often to show a fact.")] = None,
    overrides: SetOption = None,
) -> None:
    """Build a small model that knows some facts, half knows others and has never seen the rest.

    Writes model/, pool.jsonl and, for benchmarks only, truth.jsonl: which facts were shown, and how often.
    Where no --out is given, a testbed that came with the package or was built before is not built again.
    Example: ka2l testbed build --facts facts.jsonl --exposure popularity --out my-testbed
    """
    from engine.config import load_config
    from ka2l.testbed.build import build_testbed

    loaded = load_config(config, [f"testbed.{item}" for item in overrides or ()]).testbed
    given = {key: value for key, value in {"facts": facts, "exposure": exposure}.items() if value is not None}
    settings = type(loaded).model_validate(loaded.model_dump() | given)
    if out is None:
        built = testbed_in_cache(settings, console)
    else:
        if Path(out).exists():
            raise RunDirectoryError(f"{out} exists already", hint="Choose another --out, or remove it.")
        with TestbedProgress(console) as progress:
            built = build_testbed(settings, Path(out), progress)
    typer.echo(f"model: {built.model}\npool:  {built.pool}\ntruth: {built.truth}")
