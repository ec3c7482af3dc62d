"""``ka2l benchmark``: many models, data sets, strategies and seeds on one cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.cli.options import RunDirOption, SetOption
from engine.execution.cluster import RaySession
from engine.inputs import prepare, resolve
from engine.launch import console
from ka2l.errors import AnnotationsPending, ConfigError, KA2LError, RunDirectoryError, StageFailedError

if TYPE_CHECKING:
    from engine.benchmark.matrix import Cell, MatrixConfig
    from engine.store.run_directory import RunDirectory


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
    from engine.benchmark.matrix import cells, dump_matrix, load_matrix
    from engine.store.run_directory import RunDirectory

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
            prepare(cell.config, console)
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
    from engine.benchmark.sizes import Sizes

    sizes, sized, faults = Sizes(matrix.gpu_gib), [], {}
    for cell in made:
        try:
            config = sizes.sized(cell.config, resolve(cell.config, console).model)
            sized.append(cell._replace(config=config))
        except KA2LError as error:
            sized.append(cell)
            faults[cell.name] = error
    return sized, faults


def _print_plan(made: list[Cell], faults: dict[str, KA2LError]) -> None:
    from engine.benchmark.sizes import plan_table

    out = Console()
    if not out.is_terminal:
        out.width = 160
    out.print(plan_table(made, set(faults)))
    for reason in dict.fromkeys(fault.message for fault in faults.values()):
        out.print(f"not sized: {reason}", markup=False, highlight=False, soft_wrap=True)


def _run_matrix(target: RunDirectory, matrix: MatrixConfig, made: list[Cell]) -> None:
    from engine.benchmark.report import write_benchmark_report
    from engine.benchmark.runner import run_cells
    from engine.store.events import Events

    events = Events(target, console)

    def publish() -> None:
        try:
            write_benchmark_report(target, matrix, made)
        except Exception as error:  # the cells go on, and their runs are what counts
            events.say(f"(the benchmark's report could not be written: {error})")

    with RaySession(matrix.ray, f"{target.logs()}/driver.log") as address:
        states = run_cells(matrix, made, target, events, address, on_end=publish)
    Console().print(matrix_table(target, target.read_text("matrix.yaml") or ""))
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


def matrix_report(target: RunDirectory, text: str, baselines: Sequence[str], overrides: Sequence[str]) -> None:
    """Write the report of the benchmark in ``target`` again; ``text`` is its matrix.yaml."""
    from engine.benchmark.matrix import cells, parse_matrix
    from engine.benchmark.report import write_benchmark_report

    if baselines or overrides:
        raise ConfigError(
            f"{target.url} holds a benchmark; --baseline and --set are for a single run",
            hint=f"Name one of its runs: ka2l report {target.url}/cells/CELL",
        )
    matrix = parse_matrix(text, f"{target.url}/matrix.yaml")
    write_benchmark_report(target, matrix, cells(matrix))


def matrix_table(target: RunDirectory, text: str) -> Table:
    """Where each cell of the benchmark in ``target`` stands; ``text`` is its matrix.yaml."""
    from engine.benchmark.matrix import cells, parse_matrix
    from engine.benchmark.runner import state_table

    return state_table(target, cells(parse_matrix(text, f"{target.url}/matrix.yaml")))
