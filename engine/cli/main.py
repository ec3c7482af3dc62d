"""The command line: ``ka2l run``, ``resume``, ``status``, ``report``, ``export`` and others: ``ka2l --help``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.cli.annotate import annotate_app
from engine.cli.benchmark import benchmark, matrix_report, matrix_table
from engine.cli.options import ConfigArgument, RunDirArgument, RunDirOption, SetOption
from engine.cli.testbed import testbed_app
from engine.execution.cluster import RaySession
from engine.inputs import cache_dir, prepare
from engine.launch import (
    begin,
    config_text,
    console,
    go_on,
    print_summary,
    remove_from,
)
from ka2l.errors import AnnotationsPending, ConfigError, KA2LError

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.forecast.prices import PricesConfig
    from ka2l.model.loading import ModelConfig

app = typer.Typer(
    name="ka2l",
    help="Knowledge-aware active learning: ask a language model what it knows, then annotate and tune on the rest.",
    epilog="Start with: ka2l run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(testbed_app, name="testbed")
app.add_typer(annotate_app, name="annotate")


@app.command()
def run(
    config: ConfigArgument,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    may_go_on: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --run-dir already, if there is one.")
    ] = False,
) -> None:
    """Run a campaign: rounds of probe, select, annotate and tune, and a report at the end.

    Example: ka2l run quickstart --set seed=1 --run-dir runs/seed-1
    """
    begin(config, run_dir, overrides, only_probe=False, may_go_on=may_go_on)


@app.command()
def probe(config: ConfigArgument, run_dir: RunDirOption = None, overrides: SetOption = None) -> None:
    """Only map what a model knows of a pool: no annotation, no tuning.

    Writes the table `knowledge` (P(unknown) for every question) and a report with its picture.
    Example: ka2l probe quickstart --set pool.path=questions.jsonl --set model.path=./my-model
    """
    begin(config, run_dir, overrides, only_probe=True)


@app.command()
def resume(
    run_dir: RunDirArgument,
    redo_from: Annotated[str | None, typer.Option(help="Make this stage and all after it again.")] = None,
    round_index: Annotated[int, typer.Option("--round", help="The round of --redo-from.")] = 0,
    overrides: SetOption = None,
) -> None:
    """Go on with a run where it stopped. What is committed is neither made nor paid for again.

    Example: ka2l resume runs/quickstart --redo-from tune --round 1
    """
    from engine.config import parse_config
    from engine.store.run_directory import RunDirectory

    target = RunDirectory(run_dir)
    text = config_text(target)
    config = parse_config(text, overrides or (), f"{run_dir}/config.yaml")
    with target.lock():
        if redo_from is not None:
            remove_from(target, redo_from, round_index)
        go_on(target, config, text)


@app.command()
def status(run_dir: RunDirArgument) -> None:
    """Show how far a run is. Reads files only; works while the run goes on, and without a cluster."""
    from engine.store.ledger import committed_stages
    from engine.store.run_directory import RunDirectory

    target = RunDirectory(run_dir)
    if (text := target.read_text("matrix.yaml")) is not None:
        Console().print(matrix_table(target, text))
        return
    config_text(target)
    table = Table("round", "stage", "seconds", "what")
    for stage in committed_stages(target):
        manifest = stage.require()
        shown = {key: value for key, value in manifest.metrics.items() if isinstance(value, int | float | str)}
        what = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in shown.items() if key != "example")  # fmt: skip
        if failed := manifest.cost.get("num_failed"):
            what += f", {failed:.0f} questions failed"
        table.add_row(str(manifest.round if manifest.round is not None else ""), stage.name,
                      f"{manifest.seconds:.1f}", what)  # fmt: skip
    Console().print(table)
    print_summary(target, Console())


@app.command()
def report(
    run_dir: RunDirArgument,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="A finished run of the same model and pool to compare with; may be repeated."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PRICES.B=C", help="Change one price, for this report alone.")
    ] = None,
) -> None:
    """Write report.html and summary.json again from what is committed. Reads files only.

    For a benchmark it writes benchmark.html and benchmark.json.
    Example: ka2l report runs/mine --baseline runs/random --set prices.annotation=0.4
    """
    from engine.report.build import write_report
    from engine.store.run_directory import RunDirectory

    target = RunDirectory(run_dir)
    if (text := target.read_text("matrix.yaml")) is not None:
        matrix_report(target, text, baselines or (), overrides or ())
        typer.echo(f"{target.url}/benchmark.html")
        return
    prices = _changed_prices(config_text(target), overrides or ())
    write_report(target, prices=prices, baselines=baselines or ())
    typer.echo(f"{target.url}/report.html")


def _changed_prices(text: str, overrides: Sequence[str]) -> PricesConfig | None:
    """A run's prices with ``--set`` applied; None where nothing is set. The rest of its config is not looked at."""
    import yaml

    from engine.config import parse_config

    if not overrides:
        return None
    if others := [override for override in overrides if not override.strip().startswith("prices.")]:
        raise ConfigError(
            f"a report can change prices only, not {others[0]!r}", hint="For example --set prices.annotation=0.4"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    known = {"prices": values.get("prices") or {}} if isinstance(values, dict) else {}
    return parse_config(yaml.safe_dump(known), overrides, "--set").prices


@app.command("export")
def export_command(
    run_dir: RunDirArgument,
    out: Annotated[str | None, typer.Option(help="Local folder to write; exports/NAME where not given.")] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", help="Take this round's adapter; the last of a finished run if not given.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Also write the base model with the adapter merged in, and check it.")
    ] = False,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="alpaca, sharegpt, prompt_completion or preference; may be repeated. Default: "
            "all that the run can give.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the base model is, if no longer where the run's config says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Upload adapter, card and merged weights, as a private repository; "
            "never the data. The token comes from HF_TOKEN.",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see what --push-to-hub uploads.")] = False,
) -> None:
    """Hand a run over: its adapter with a model card, the annotated data, and the command that serves it.

    Reads what is committed; needs no cluster, and the base model only for --merged.

    \b
    What is written:
      README.md, adapter_*              the adapter with its card, as PEFT, transformers and vLLM load it
      data/alpaca.json, sharegpt.json   question and answer, for trainers that read these
      data/prompt_completion.jsonl      the same with the run's own prompt, for TRL's SFTTrainer
      data/preference.jsonl             better and worse answers, for TRL's DPOTrainer
      merged/                           with --merged
      canary.json                       prompts and what the adapter answers, to check a server with
    Every row of data/ keeps its question_id, annotator and round.

    Example: ka2l export runs/mine --out handover --merged
    """
    from transformers.utils.logging import disable_progress_bar

    from engine.export.package import ExportOptions, export

    disable_progress_bar()
    options = ExportOptions(
        out, round_index, base, merged, tuple(formats or ()), overwrite, push_to_hub, public  # type: ignore[arg-type]
    )  # fmt: skip
    made = export(run_dir, options, _model_where_it_lies)
    for note in made.notes:
        typer.echo(note, err=True)
    typer.echo(f"export: {made.folder}")
    for name, count in made.rows.items():
        typer.echo(f"{name}: {count:,} rows")
    if made.address is not None:
        typer.echo(f"pushed: {made.address}")
    if made.command is not None:
        typer.echo(f"serve it on this machine:\n  {made.command}")


def _model_where_it_lies(config: RunConfig) -> ModelConfig:
    """The model of a run, with ``testbed`` as the folder that it was built in; builds nothing."""
    from ka2l.testbed.build import cached_testbed_at

    if config.model.path != "testbed":
        return config.model
    return config.model.model_copy(
        update={"path": str(cached_testbed_at(config.testbed, cache_dir() / "testbeds").model)}
    )


@app.command()
def estimate(
    config: ConfigArgument,
    overrides: SetOption = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File that takes the figures for machines.")] = None,
) -> None:
    """Predict tokens, forward passes, annotations, seconds and money, from the config and a short measured warm-up.

    Nothing is paid for and no run directory is written.
    Example: ka2l estimate quickstart --json estimate.json
    """
    from engine.config import load_config
    from engine.forecast.estimate import estimate as predict

    loaded = load_config(config, overrides or ())
    if json_path is not None and not json_path.parent.is_dir():
        raise ConfigError(f"--json {json_path}: there is no such folder", hint="Make it first.")
    model, pool_path = prepare(loaded, console)
    with RaySession(loaded.ray, os.devnull):
        made = predict(loaded, model, pool_path, Console())
    if json_path is not None:
        json_path.write_text(made.as_json(), encoding="utf-8")


@app.command("config")
def show_config(
    config: Annotated[str, typer.Argument(help="Name of a preset or path of a YAML file.")] = "quickstart",
    overrides: SetOption = None,
) -> None:
    """Print the resolved config with every key; secrets are masked."""
    from engine.config import dump_config, load_config

    typer.echo(dump_config(load_config(config, overrides or ())), nl=False)


app.command()(benchmark)

#: What a shell says of a process that Ctrl-C or SIGTERM has ended.
_INTERRUPTED, _TERMINATED = 130, 143


def main() -> None:
    """Entry point: exit code 0 done, 2 the user must change something, 3 paused for annotations, 1 a fault of ours."""
    code = _INTERRUPTED

    def terminate(*_: object) -> None:
        """A scheduler wants the machine back: ends as after Ctrl-C."""
        nonlocal code
        code = _TERMINATED
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        if app(standalone_mode=False) == _INTERRUPTED:  # typer makes a value of it
            raise KeyboardInterrupt
    except KA2LError as error:
        word, style = ("paused", "bold yellow") if isinstance(error, AnnotationsPending) else ("error", "bold red")
        console.print(f"{word}: {error}", style=style, markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted; what is committed is safe: ka2l resume RUN_DIR", highlight=False)
        sys.exit(code)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # wrong usage, as typer words it
            console.print(f"error: {error.format_message()}", markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)
        traceback.print_exc()
        console.print("This is a fault of KA2L; please report it with the lines above.", highlight=False)
        sys.exit(1)
