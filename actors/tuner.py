"""Runs `ka2l.tuning.sft.tune` and `ka2l.tuning.dpo.compare` on Ray Train workers.

All paths must be readable from every node the workers run on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from actors.metrics import Tags
from actors.workers.faults import FaultsConfig
from actors.workers.ray_task import Workers, run_remote
from actors.workers.ray_train import run_loop
from ka2l.schemas import TrainingRow
from ka2l.tuning.checkpoints import CheckpointFolder, Checkpoints
from ka2l.tuning.sft import TuningConfig

if TYPE_CHECKING:
    from ka2l.tuning.dpo import ComparisonRow

Row = TypeVar("Row")


def write_rows(rows: Iterable[TrainingRow | ComparisonRow], path: str) -> None:
    """Write rows to train on as JSON lines, in their order."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: str, kind: Callable[..., Row]) -> list[Row]:
    """Read what `write_rows` wrote of one kind of rows."""
    with open(path, encoding="utf-8") as file:
        return [kind(**json.loads(line)) for line in file]


def run_training(
    model_path: str,
    rows_path: str,
    config: TuningConfig,
    output_dir: str,
    seed: int,
    scratch_dir: str,
    previous_adapter: str | None = None,
    trust_remote_code: bool = False,
    log_path: str | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    compared: bool = False,
    chat: bool,
    faults: FaultsConfig = FaultsConfig(),  # noqa: B008 - frozen
    tags: Tags | None = None,
    checkpoints: CheckpointFolder | None = None,
) -> dict[str, Any]:
    """Train an adapter on ``config.workers`` Ray Train workers; blocks until it is written to ``output_dir``.

    Args:
        rows_path: file of `write_rows`.
        previous_adapter: as for `ka2l.tuning.sft.tune`; ``adapter_dir`` of `ka2l.tuning.dpo.compare`.
        compared: train by `compare`, on its rows, and not by `tune`.
        scratch_dir: folder for Ray Train's own files and the progress file; the caller removes it.
        log_path: file that takes the workers' stdout and stderr; default: in ``scratch_dir``.
        on_progress: called in a thread of this process with what `tune` reports.
        chat: as for `tune`.
        faults: when a worker is taken for dead, and how often training is begun again.
        tags: of the worker's metrics.
        checkpoints: where they are kept, and looked for by a training that begins; None: a training whose worker dies
            begins from its start.

    Returns:
        The metrics of `ka2l.tuning.sft.TuneResult`.

    Raises:
        KA2LError: as `tune` raised it in a worker.
        ResourcesBusyError: the cluster has no room for the workers.
        StageFailedError: anything else; carries the last lines of the log.
    """
    arguments = {
        "model_path": _absolute(model_path),
        "rows_path": _absolute(rows_path),
        "config": config.model_dump(),
        "output_dir": os.path.abspath(output_dir),
        "seed": seed,
        "previous_adapter": _absolute(previous_adapter) if previous_adapter else None,
        "trust_remote_code": trust_remote_code,
        "chat": chat,
    }
    workers = Workers("tuning", config.workers, config.cpus_per_worker, config.gpus_per_worker, faults, tags=tags)
    loop = _compare if compared else _tune
    return run_loop(loop, arguments, workers, scratch_dir, log_path, on_progress, checkpoints)


def _tune(arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from ka2l.tuning.sft import tune

    config = TuningConfig(**arguments.pop("config"))
    rows = read_rows(arguments.pop("rows_path"), TrainingRow)
    with _checkpoints() as checkpoints:
        return tune(rows=rows, config=config, progress=report, checkpoints=checkpoints, **arguments).metrics


def _compare(arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from ka2l.tuning.dpo import ComparisonRow, compare

    config = TuningConfig(**arguments.pop("config"))
    rows = read_rows(arguments.pop("rows_path"), ComparisonRow)
    arguments["adapter_dir"] = arguments.pop("previous_adapter")
    with _checkpoints() as checkpoints:
        return compare(rows=rows, config=config, progress=report, checkpoints=checkpoints, **arguments).metrics


@contextlib.contextmanager
def _checkpoints() -> Iterator[Checkpoints]:
    """Checkpoints by Ray Train: it copies each to the run's storage, and gives a training that begins the last one."""
    import ray.train

    def keep(folder: str | None) -> None:  # on every worker: Ray Train waits for all of them
        made = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=made)

    found = ray.train.get_checkpoint()
    with contextlib.nullcontext() if found is None else found.as_directory() as folder:
        yield Checkpoints(keep, folder)


def run_canary(arguments: dict[str, Any], workers: Workers, log_path: str | None) -> dict[str, Any]:
    """`ka2l.model.canary.canary` in a process of its own.

    Raises:
        KA2LError: as `canary` raised it.
        StageFailedError: the process died.
    """
    work = functools.partial(_canary, arguments)
    result: dict[str, Any] = run_remote(work, "the canary", workers, log_path)
    return result


def _canary(arguments: dict[str, Any]) -> dict[str, Any]:
    from ka2l.model.canary import canary

    return canary(**arguments)


def _absolute(path: str) -> str:
    """Workers run in another folder; hub ids stay as they are."""
    return os.path.abspath(path) if os.path.exists(path) else path
