"""What an annotator, a judge or a knowledge writer may need of the run that asks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from actors.workers.faults import FaultsConfig
from ka2l.answers.equivalence import (
    EquivalenceConfig,
)

if TYPE_CHECKING:
    from actors.metrics import Tags
    from actors.workers.placement import Placement
    from actors.workers.standing import StandingWorkers
    from engine.store.run_directory import RunDirectory
    from ka2l.annotation.people import Task


class AnnotationContext(NamedTuple):
    """What an annotator may need of the run."""

    run: RunDirectory
    round_index: int
    reveal: Callable[[Sequence[str]], Mapping[str, list[str]]]
    """Looks up reference answers of question ids."""
    reference_table: str | None
    """File of further questions with answers."""
    make_tasks: Callable[[Sequence[str]], list[Task]]
    """What people are shown of question ids."""
    equivalence: EquivalenceConfig
    money: float | None
    """Most that the whole run may spend on annotation."""
    run_seed: int
    log_path: str
    """Where the annotator's workers write their chatter."""
    placement: Placement
    """Of the annotator's workers."""
    faults: FaultsConfig
    tags: Tags | None = None
    """Of their metrics."""
    shared_teacher: StandingWorkers | None = None
    """Of a benchmark's cells: a local teacher's workers, which others ask, too."""
