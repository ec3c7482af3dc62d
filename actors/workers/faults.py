"""FaultsConfig: how often dead workers are replaced, when hung ones are ended, how many questions may fail."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

from pydantic import Field

from ka2l.section import Section


class FaultsConfig(Section):
    """What is done about workers and questions that fail."""

    deadline_s: float = Field(1800.0, gt=0)
    """Seconds that a worker may take to load its model, or over one shard; then it is ended, its stack goes to the
    stage's log, and another takes its place. In training: between two reports of progress."""
    worker_replacements: int = Field(2, ge=0)
    """How often the workers of a stage are replaced all together when they are lost or none gets on, and how often a
    training whose worker died is begun again."""
    max_failed_share: float = Field(0.01, ge=0, le=1)
    """Share of a stage's questions that may fail and be set aside, as those that crash the model do. More end the
    run."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process, with a traceback of all its threads on stderr, where the block takes longer than ``seconds``.

    The clock is a thread of C code, so that it also ends what hangs inside a library. Ray then starts the worker again.
    Deadlines do not nest: one inside another takes its place.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
