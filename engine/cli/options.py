"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(help="Name of a preset (quickstart, ...) or path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key of the config; may be repeated.")
]
RunDirOption = Annotated[
    str | None, typer.Option("--run-dir", help="Folder or URL for the run; runs/NAME where not given.")
]
RunDirArgument = Annotated[str, typer.Argument(help="Folder or URL of a run.")]
