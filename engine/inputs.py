"""Checks a run's model and pool before anything expensive begins, and builds a testbed where one is named."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.execution.cluster import cluster_address
from engine.progress import Progress
from ka2l.errors import BudgetError, ModelError, PoolError, first_line
from ka2l.section import is_plugin

if TYPE_CHECKING:
    from rich.console import Console

    from engine.config import RunConfig
    from ka2l.model.loading import ModelConfig
    from ka2l.testbed.build import Testbed, TestbedConfig

TESTBED = "testbed"
#: Rows of the pool that are looked at before the run begins.
_FIRST_ROWS = 100


class Inputs(NamedTuple):
    """What a run works on."""

    model: ModelConfig
    """With ``testbed`` resolved to a folder."""
    pool_path: str
    """With ``testbed`` resolved to a file."""


def prepare(config: RunConfig, console: Console, *, pool_is_read: bool = False) -> Inputs:
    """Check what can be checked at little cost, build the testbed where one is missing, say where model and pool lie.

    Args:
        config: of the run.
        console: where a testbed's progress is shown.
        pool_is_read: the run directory holds the pool already, so its source may be gone.

    Raises:
        KA2LError: something that a run with this config would fail of, sooner or later.
    """
    _check_settings(config)
    if config.model.path != TESTBED:
        _check_model(config, config.model, resumed=pool_is_read)
    if not pool_is_read and _check_pool(config):
        _check_budget(config)
    inputs = resolve(config, console)
    if config.model.path == TESTBED:
        _check_model(config, inputs.model, resumed=pool_is_read)
    return inputs


def resolve(config: RunConfig, console: Console) -> Inputs:
    """Where model and pool lie; a testbed that is neither shipped nor cached is built."""
    model, pool_path = config.model, config.pool.path
    if TESTBED in (model.path, pool_path):
        built = testbed_in_cache(config.testbed, console)
        if model.path == TESTBED:
            model = model.model_copy(update={"path": str(built.model)})
        if pool_path == TESTBED:
            pool_path = str(built.pool)
    return Inputs(model, pool_path)


def testbed_in_cache(settings: TestbedConfig, console: Console) -> Testbed:
    """The testbed of these settings: shipped with the package, in the user's cache, or built there with its progress
    shown."""
    from ka2l.testbed.build import cached_testbed

    with TestbedProgress(console) as progress:
        return cached_testbed(settings, cache_dir() / "testbeds", progress)


def cache_dir() -> Path:
    """``$KA2L_CACHE``, else ``ka2l`` in the user's cache directory."""
    if "KA2L_CACHE" in os.environ:
        return Path(os.environ["KA2L_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ka2l"


class TestbedProgress:
    """Shows the steps of a testbed's training, once there are any."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def __enter__(self) -> TestbedProgress:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return self

    def __call__(self, step: int, num_steps: int) -> None:
        if self._progress is None:
            self._progress = Progress(self._console, "building the testbed", num_steps, "steps").__enter__()
        self._progress.advance(step - self._progress.done)

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._console.print(self._progress.summary(), highlight=False)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_settings(config: RunConfig) -> None:
    from engine.annotation.annotators import annotator_class
    from engine.build import plugin
    from engine.execution.trackers import check_trackers
    from ka2l.model.loading import check_model_directory
    from ka2l.tuning.trainer import check_tuning

    cluster_address(config.ray)
    if config.trackers:
        check_trackers(config.trackers)
    check_tuning(config.tuning)
    if config.annotator.kind == "local_teacher" and config.annotator.teacher is not None:
        check_model_directory(config.annotator.teacher.model)
    # Samplers and equivalences of the user's own run on workers, which may have packages that this process lacks.
    if is_plugin(config.annotator.kind):
        annotator_class(config.annotator.kind)
    if is_plugin(config.selection.kind):
        plugin(config.selection.kind)


def _check_model(config: RunConfig, model: ModelConfig, *, resumed: bool) -> None:
    """The model's folder is whole, and the adapter can be put on it. A hub id is looked up when it is loaded."""
    from ka2l.model.loading import check_model_directory, is_directory

    check_model_directory(model.path)
    if resumed or not is_directory(model.path):
        return  # importing peft takes seconds, and whoever began the run has checked the adapter
    from ka2l.model.adapter import check_adapter

    try:
        check_adapter(model.path, config.tuning.adapter, model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot use the model in {model.path}: {first_line(error)}", hint="Check its config.json."
        ) from error


def _check_pool(config: RunConfig) -> bool:
    """The pool's files are there, their columns are those of the config, and their first rows can be understood.

    Returns:
        Whether there may be usable rows. Where none of the first ones is, reading the pool tells why, row by row.
    """
    from ka2l.pool.config import ColumnsConfig
    from ka2l.pool.rows import Rejected, clean_row
    from ka2l.pool.sources import find_pieces, is_dataset, read_piece

    pool = config.pool
    if pool.path == TESTBED or is_dataset(pool.path):
        return True  # what a data set holds is known once Ray runs
    columns = pool.columns or ColumnsConfig()
    named = (columns.question, columns.answers, columns.group, columns.fact, columns.split)
    pieces = find_pieces(pool.path, tuple(name for name in named if name is not None))
    rows = islice(read_piece(pieces[0]), _FIRST_ROWS) if pieces else ()
    first = [clean_row(row, columns, pool, pieces[0].path, position) for position, row in rows]
    reasons = [row.reason for row in first if isinstance(row, Rejected)]
    if first and all(map(_is_of_format, reasons)) and len(reasons) == len(first):
        raise PoolError(
            f"none of the first {len(first)} rows of {pieces[0].path} can be used: {reasons[0]}",
            hint="Name the columns in pool.columns, for example {question: Question, answers: Answer}.",
        )
    return len(reasons) < len(first)


def _is_of_format(reason: str) -> bool:
    """Whether a row was rejected for what all rows of its file have in common."""
    return reason.startswith(("malformed: no column", "malformed: invalid", "malformed: the row is"))


def _check_budget(config: RunConfig) -> None:
    """The pool may hold as many candidates as will be annotated. Which rows are usable is known once it is read."""
    from ka2l.pool.sources import count_rows, is_dataset

    pool, wanted = config.pool, config.annotation_cap
    if is_dataset(pool.path):
        return
    columns = pool.columns
    if pool.path == TESTBED:
        num_candidates = _testbed_candidates(config.testbed)
    elif columns is not None and columns.split:
        num_candidates = count_rows(pool.path, wanted)
    else:
        # Whole groups may make fewer eval questions than asked for.
        num_eval = 0 if columns is not None and (columns.group or columns.fact) else pool.num_eval
        kept = pool.num_seed + num_eval
        num_rows = count_rows(pool.path, kept + wanted)
        num_candidates = (num_rows if pool.limit is None else min(num_rows, pool.limit)) - kept
    if num_candidates < wanted:
        raise BudgetError(
            f"the budget of {wanted} annotations ({config.rounds} rounds x {config.selection.budget}) is larger than "
            f"the {max(0, num_candidates)} candidates that {pool.path} can hold",
            hint="Lower rounds, selection.budget, pool.num_seed or pool.num_eval, or set budget.annotations.",
        )


def _testbed_candidates(settings: TestbedConfig) -> int:
    from ka2l.testbed.build import build_world
    from ka2l.testbed.world import pool_rows

    rows = pool_rows(build_world(settings).facts, settings.seed, settings.outside_share)
    return sum(row["split"] == "candidate" for row in rows)
