"""The command line: ``ka2l run``, ``resume``, ``status``, ``report``, ``export`` and others: ``ka2l --help``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from engine.cluster import RaySession, cluster_address
from ka2l.errors import (
    AnnotationsPending,
    ConfigError,
    HoursUsedUp,
    KA2LError,
    ModelError,
    RunDirectoryError,
    StageFailedError,
    StaleStageError,
    first_line,
)

if TYPE_CHECKING:
    from engine.artifacts import RunDirectory
    from engine.campaign import Campaign
    from engine.config import RunConfig
    from engine.matrix import Cell, MatrixConfig
    from engine.prices import PricesConfig
    from ka2l.models import ModelConfig
    from ka2l.testbed import Testbed, TestbedConfig

app = typer.Typer(
    name="ka2l",
    help="Knowledge-aware active learning: ask a language model what it knows, then annotate and tune on the rest.",
    epilog="Start with: ka2l run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
testbed_app = typer.Typer(help="The built-in closed-book model whose knowledge is known exactly.", no_args_is_help=True)
app.add_typer(testbed_app, name="testbed")
annotate_app = typer.Typer(help="Answer the questions that a paused run waits for.", no_args_is_help=True)
app.add_typer(annotate_app, name="annotate")
console = Console(stderr=True)

ConfigArgument = Annotated[str, typer.Argument(help="Name of a preset (quickstart, ...) or path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key of the config; may be repeated.")
]
RunDirOption = Annotated[
    str | None, typer.Option("--run-dir", help="Folder or URL for the run; runs/NAME where not given.")
]
RunDirArgument = Annotated[str, typer.Argument(help="Folder or URL of a run.")]


@app.command()
def run(
    config: ConfigArgument,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --run-dir already, if there is one.")
    ] = False,
) -> None:
    """Run a campaign: rounds of probe, select, annotate and tune, and a report at the end.

    Example: ka2l run quickstart --set seed=1 --run-dir runs/seed-1
    """
    _begin(config, run_dir, overrides, only_probe=False, go_on=go_on)


@app.command()
def probe(config: ConfigArgument, run_dir: RunDirOption = None, overrides: SetOption = None) -> None:
    """Only map what a model knows of a pool: no annotation, no tuning.

    Writes the table `knowledge` (P(unknown) for every question) and a report with its picture.
    Example: ka2l probe quickstart --set pool.path=questions.jsonl --set model.path=./my-model
    """
    _begin(config, run_dir, overrides, only_probe=True)


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
    from engine.artifacts import RunDirectory
    from engine.config import parse_config

    target = RunDirectory(run_dir)
    text = _require(target)
    config = parse_config(text, overrides or (), f"{run_dir}/config.yaml")
    with target.lock():
        if redo_from is not None:
            _remove_from(target, redo_from, round_index)
        _go_on(target, config, text)


@app.command()
def status(run_dir: RunDirArgument) -> None:
    """Show how far a run is. Reads files only; works while the run goes on, and without a cluster."""
    from engine.artifacts import RunDirectory
    from engine.ledger import committed_stages

    target = RunDirectory(run_dir)
    if (text := target.read_text("matrix.yaml")) is not None:
        Console().print(_matrix_table(target, text))
        return
    _require(target)
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
    _print_summary(target, Console())


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
    from engine.artifacts import RunDirectory
    from engine.report import write_report

    target = RunDirectory(run_dir)
    if (text := target.read_text("matrix.yaml")) is not None:
        _matrix_report(target, text, baselines or (), overrides or ())
        typer.echo(f"{target.url}/benchmark.html")
        return
    prices = _changed_prices(_require(target), overrides or ())
    write_report(target, prices=prices, baselines=baselines or ())
    typer.echo(f"{target.url}/report.html")


def _changed_prices(config_text: str, overrides: Sequence[str]) -> PricesConfig | None:
    """A run's prices with ``--set`` applied; None where nothing is set. The rest of its config is not looked at."""
    import yaml

    from engine.config import parse_config

    if not overrides:
        return None
    if others := [override for override in overrides if not override.strip().startswith("prices.")]:
        raise ConfigError(
            f"a report can change prices alone, not {others[0]!r}", hint="For example --set prices.annotation=0.4"
        )
    try:
        values = yaml.safe_load(config_text)
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

    from engine.export import ExportOptions, export

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
    from ka2l.testbed import cached_testbed_at

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
    from engine.estimate import estimate as predict

    loaded = load_config(config, overrides or ())
    if json_path is not None and not json_path.parent.is_dir():
        raise ConfigError(f"--json {json_path}: there is no such folder", hint="Make it first.")
    model, pool_path = _resolve_testbed(loaded)
    _check_inputs(loaded, model, pool_path)
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


@testbed_app.command("build")
def build_testbed_command(
    out: Annotated[str | None, typer.Option(help="Folder for the testbed; the user's cache where not given.")] = None,
    facts: Annotated[str | None, typer.Option(help="JSONL with question and answers: a testbed of real facts.")] = None,
    exposure: Annotated[str | None, typer.Option(help="Column of --facts that says how often to show a fact.")] = None,
    overrides: SetOption = None,
) -> None:
    """Build a small model that knows some facts, half knows others and has never seen the rest.

    Writes model/, pool.jsonl and, for benchmarks only, truth.jsonl: which facts were shown, and how often.
    Example: ka2l testbed build --facts facts.jsonl --exposure popularity --out my-testbed
    """
    from engine.config import load_config
    from ka2l.testbed import build_testbed

    loaded = load_config("quickstart", [f"testbed.{item}" for item in overrides or ()]).testbed
    given = {key: value for key, value in {"facts": facts, "exposure": exposure}.items() if value is not None}
    settings = type(loaded).model_validate(loaded.model_dump() | given)
    if out is None:
        built = _cached_testbed(settings)
    else:
        if Path(out).exists():
            raise RunDirectoryError(f"{out} exists already", hint="Choose another --out, or remove it.")
        with _steps("testbed") as progress:
            built = build_testbed(settings, Path(out), progress)
    typer.echo(f"model: {built.model}\npool:  {built.pool}\ntruth: {built.truth}")


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
    from engine import build, human

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
    from engine import human
    from engine.annotate_app import serve

    _, folder = _waiting(context.obj)
    store = human.open_store(folder)
    try:
        serve(human.tasks_of(folder), store, port)
    finally:
        store.close()
    typer.echo(f"go on: ka2l resume {context.obj}")


def _waiting(run_dir: str) -> tuple[RunConfig, Path]:
    """Config of a run and the folder of the round that waits for people."""
    from engine.artifacts import RunDirectory
    from engine.config import parse_config
    from engine.human import pending_round

    target = RunDirectory(run_dir)
    config = parse_config(_require(target), (), f"{run_dir}/config.yaml")
    return config, pending_round(target)


@app.command()
def benchmark(
    config: Annotated[str, typer.Argument(help="Name of a preset (nine) or path of a YAML file.")],
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the cells and the GPUs of each; needs no cluster.")
    ] = False,
) -> None:
    """Run every model with every data set, query strategy and seed, side by side on one cluster.

    Each cell is an ordinary run in RUN_DIR/cells; benchmark.html, written after each cell that ends, compares them.
    The same command goes on with a benchmark that was cut off, and tries what has failed again.

    \b
    The file's keys:
      models, data, strategies   name -> keys of a run's config; seeds: a list
      preset, common             what all cells start from
      gpu_gib                    memory of each GPU: sizes each cell's workers by its model; null: as configured
      priorities                 name of a model, data set or strategy -> higher goes first
      max_running, retries       cells under way at once (9); how often a failed one is started again (1)
      patience_s, slice_s        who waits longer is not passed; a stage yields its workers after so long
      ray                        as in a run

    Example: ka2l benchmark nine --run-dir /shared/runs/nine; meanwhile: ka2l status /shared/runs/nine
    """
    from engine.artifacts import RunDirectory
    from engine.matrix import cells, dump_matrix, load_matrix

    matrix = load_matrix(config, overrides or ())
    made = cells(matrix)
    made, faults = _sized(matrix, made)
    if dry_run:
        _print_plan(made, faults)
    for name, fault in faults.items():
        fault.message = f"cell {name}: {fault.message}"
        raise fault
    if dry_run:
        return
    for cell in made:
        try:
            model, pool_path = _resolve_testbed(cell.config)
            _check_inputs(cell.config, model, pool_path)
        except KA2LError as error:
            error.message = f"cell {cell.name}: {error.message}"
            raise
    target = RunDirectory(run_dir or f"runs/{matrix.name}")
    if target.exists():
        raise RunDirectoryError(f"{target.url} holds a single run", hint="Choose another --run-dir.")
    with target.lock():
        target.write_text("matrix.yaml", dump_matrix(matrix))
        _run_matrix(target, matrix, made)


def _sized(matrix: MatrixConfig, made: list[Cell]) -> tuple[list[Cell], dict[str, KA2LError]]:
    """The cells with the GPUs that their models need, and by cell why that is not known."""
    if matrix.gpu_gib is None:
        return made, {}
    from engine.matrix_sizes import Sizes

    sizes, sized, faults = Sizes(matrix.gpu_gib), [], {}
    for cell in made:
        try:
            config = sizes.sized(cell.config, _resolve_testbed(cell.config)[0])
            sized.append(cell._replace(config=config))
        except KA2LError as error:
            sized.append(cell)
            faults[cell.name] = error
    return sized, faults


def _print_plan(made: list[Cell], faults: dict[str, KA2LError]) -> None:
    from engine.matrix_sizes import plan_table

    out = Console()
    if not out.is_terminal:
        out.width = 160
    out.print(plan_table(made, set(faults)))
    for reason in dict.fromkeys(fault.message for fault in faults.values()):
        out.print(f"not sized: {reason}", markup=False, highlight=False, soft_wrap=True)


def _run_matrix(target: RunDirectory, matrix: MatrixConfig, made: list[Cell]) -> None:
    from engine.benchmark import run_cells
    from engine.benchmark_report import write_benchmark_report
    from engine.events import Events

    events = Events(target, console)

    def publish() -> None:
        try:
            write_benchmark_report(target, matrix, made)
        except Exception as error:  # the cells go on, and their runs are what counts
            events.say(f"(the benchmark's report could not be written: {error})")

    with RaySession(matrix.ray, f"{target.logs()}/driver.log") as address:
        states = run_cells(matrix, made, target, events, address, on_end=publish)
    Console().print(_matrix_table(target, target.read_text("matrix.yaml") or ""))
    typer.echo(f"report: {target.url}/benchmark.html")
    failed = [name for name, state in states.items() if state.status == "failed"]
    paused = [name for name, state in states.items() if state.status == "paused"]
    if failed:
        raise StageFailedError(
            f"{len(failed)} of {len(states)} cells have failed: {', '.join(failed[:5])}\n{states[failed[0]].error}",
            hint=f"The logs are in {target.logs()}. The same command tries them again.",
        )
    if paused:
        raise AnnotationsPending(
            f"{len(paused)} cells wait for annotations: {', '.join(paused[:5])}",
            hint="ka2l annotate RUN_DIR/cells/CELL serve, then the same command.",
        )


def _matrix_report(target: RunDirectory, text: str, baselines: Sequence[str], overrides: Sequence[str]) -> None:
    from engine.benchmark_report import write_benchmark_report
    from engine.matrix import cells, parse_matrix

    if baselines or overrides:
        raise ConfigError(
            f"{target.url} holds a benchmark; --baseline and --set are for a single run",
            hint=f"Name one of its runs: ka2l report {target.url}/cells/CELL",
        )
    matrix = parse_matrix(text, f"{target.url}/matrix.yaml")
    write_benchmark_report(target, matrix, cells(matrix))


def _matrix_table(target: RunDirectory, text: str) -> Table:
    from engine.benchmark import state_table
    from engine.matrix import cells, parse_matrix

    return state_table(target, cells(parse_matrix(text, f"{target.url}/matrix.yaml")))


# -- how commands work ------------------------------------------------------------------------------------------------


def _go_on(target: RunDirectory, config: RunConfig, text: str) -> None:
    """Go on with a run that was made with the config in ``text``; the caller holds its lock."""
    from engine.config import dump_config

    target.write_text("config.yaml", dump_config(config))
    try:
        _execute(target, config, only_probe=(target.read_text("mode") == "probe"))
    except StaleStageError:
        target.write_text("config.yaml", text)
        raise


def _begin(
    source: str, run_dir: str | None, overrides: list[str] | None, *, only_probe: bool, go_on: bool = False
) -> None:
    from engine.artifacts import RunDirectory
    from engine.config import dump_config, load_config

    config = load_config(source, overrides or ())
    if only_probe:
        config = config.model_copy(update={"rounds": 0})  # so that nothing is sampled for tuning
    target = RunDirectory(run_dir or f"runs/{config.name}")
    if go_on and (text := target.read_text("config.yaml")) is not None:
        with target.lock():
            _go_on(target, config, text)
        return
    _refuse_old_run(target)
    model, pool_path = _resolve_testbed(config)
    _check_inputs(config, model, pool_path)
    with target.lock():
        _refuse_old_run(target)  # one that began in the meantime
        target.write_text("mode", "probe" if only_probe else "campaign")
        target.write_text("config.yaml", dump_config(config))
        _execute(target, config, only_probe=only_probe)


def _refuse_old_run(target: RunDirectory) -> None:
    if target.exists():
        raise RunDirectoryError(
            f"{target.url} holds a run already",
            hint=f"Go on with it: ka2l resume {target.url}. Or choose another --run-dir.",
        )


def _execute(target: RunDirectory, config: RunConfig, *, only_probe: bool) -> None:
    from engine import loop
    from engine.benchmark import LEASES_VARIABLE, leases_from
    from engine.campaign import Campaign
    from engine.events import Events
    from engine.trackers import open_trackers

    model, pool_path = _resolve_testbed(config)
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
    _print_summary(target, Console())
    typer.echo(f"report: {target.url}/report.html")


def _note_failure(campaign: Campaign) -> None:
    from engine.ledger import write_ledger
    from engine.report import write_report

    try:
        write_report(campaign.run, "failed")
        write_ledger(campaign.run)
    except Exception as error:  # the first error is the one to show
        campaign.events.say(f"(the report could not be written: {error})")


def _check_inputs(config: RunConfig, model: Any, pool_path: str) -> None:
    """What can be known to be wrong before anything is written or spent."""
    from engine.trackers import check_trackers
    from ka2l.models import check_model_directory, is_directory
    from ka2l.pool_sources import find_pieces, is_dataset

    cluster_address(config.ray)
    if config.trackers:
        check_trackers(config.trackers)
    if not is_dataset(pool_path):
        find_pieces(pool_path, ())
    check_model_directory(model.path)
    if config.annotator.kind == "local_teacher" and config.annotator.teacher is not None:
        check_model_directory(config.annotator.teacher.model)
    if is_directory(model.path):
        from ka2l.adapter import check_adapter
        from ka2l.training import check_tuning

        check_tuning(config.tuning)
        try:
            check_adapter(model.path, config.tuning.adapter, model.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot use the model in {model.path}: {first_line(error)}", hint="Check its config.json."
            ) from error


def _resolve_testbed(config: RunConfig) -> tuple[Any, str]:
    model, pool_path = config.model, config.pool.path
    if "testbed" in (model.path, pool_path):
        built = _cached_testbed(config.testbed)
        if model.path == "testbed":
            model = model.model_copy(update={"path": str(built.model)})
        if pool_path == "testbed":
            pool_path = str(built.pool)
    return model, pool_path


def _cached_testbed(settings: TestbedConfig) -> Testbed:
    from transformers.utils.logging import disable_progress_bar

    from ka2l.testbed import cached_testbed

    disable_progress_bar()
    with _steps("testbed") as progress:
        return cached_testbed(settings, cache_dir() / "testbeds", progress)


def cache_dir() -> Path:
    """``$KA2L_CACHE``, else ``ka2l`` in the user's cache directory."""
    if "KA2L_CACHE" in os.environ:
        return Path(os.environ["KA2L_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ka2l"


class _steps:  # noqa: N801 - reads as a verb
    """A progress bar for work that reports (step, num_steps)."""

    def __init__(self, label: str) -> None:
        from rich.progress import Progress

        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.label = label
        self.task: Any = None

    def __enter__(self) -> _steps:
        self.bar.start()
        return self

    def __call__(self, step: int, num_steps: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.label, total=num_steps)
            if not console.is_terminal:
                console.print(f"building the {self.label}: {num_steps} steps", highlight=False)
        self.bar.update(self.task, completed=step, total=num_steps)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _require(target: RunDirectory) -> str:
    text = target.read_text("config.yaml")
    if text is None:
        raise RunDirectoryError(f"{target.url} holds no run", hint="Start one: ka2l run CONFIG --run-dir DIR")
    return text


def _remove_from(target: RunDirectory, stage_name: str, round_index: int) -> None:
    from engine.ledger import POOL_STAGES, ROUND_STAGES

    if stage_name not in POOL_STAGES + ROUND_STAGES:
        raise ConfigError(f"no stage is called {stage_name!r}", hint=f"Stages: {', '.join(POOL_STAGES + ROUND_STAGES)}")
    if round_index not in range(max(1, target.num_rounds_begun())):
        raise RunDirectoryError(
            f"{target.url} has no round {round_index}", hint="`ka2l status` shows the rounds that were begun."
        )
    if stage_name in POOL_STAGES:
        for name in POOL_STAGES:
            target.stage(name).remove()
        round_index, stage_name = 0, ROUND_STAGES[0]
    for index in range(round_index, target.num_rounds_begun()):
        first = ROUND_STAGES.index(stage_name) if index == round_index else 0
        for name in ROUND_STAGES[first:]:
            target.stage(name, index).remove()


def _print_summary(target: RunDirectory, out: Console) -> None:
    import json

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


if __name__ == "__main__":
    main()
