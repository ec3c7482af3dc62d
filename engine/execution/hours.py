"""The cap on a run's hours: a round that would not end in time is not begun; a deadline ends what takes longer.

A run's hours are the wall-clock seconds of its stages, those of killed attempts included, and all that the process at
work has used. A run that waits for people uses none.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.stages import round_stages
from engine.stages.kind import StageKind
from engine.store.ledger import worked_seconds
from ka2l.errors import HoursUsedUp

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign
    from engine.store.manifest import Manifest
    from engine.store.run_directory import RunDirectory

#: Kept free at the end for what is interrupted to be torn down.
TEARDOWN_S = 10.0
#: What the next time may take, of what the last time took.
_ALLOWANCE = 1.1


class Hours:
    """What is left of the cap.

    Args:
        cap: hours; None for no cap.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, run: RunDirectory, cap: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.cap = cap
        self._clock = clock
        self._ends = None if cap is None else clock() + 3600 * cap - worked_seconds(run) - TEARDOWN_S

    @property
    def left_s(self) -> float:
        """Seconds that may still be worked; infinite without a cap."""
        return float("inf") if self._ends is None else self._ends - self._clock()

    def check(self, campaign: Campaign, kind: StageKind, round_index: int | None) -> None:
        """Raise HoursUsedUp unless a stage fits in what is left, with all that must follow it: see `needed_seconds`."""
        if self.cap is None:
            return
        left, needed = self.left_s, _ALLOWANCE * needed_seconds(campaign, kind, round_index)
        if left > 0 and needed <= left:
            return
        where = campaign.stage(kind.name, round_index).label
        with_rest = f" and what must follow it take about {needed:,.0f} s more" if needed else " would pass it"
        raise HoursUsedUp(
            f"The budget of {self.cap:g} hours is used up but for {max(0.0, left):,.0f} s: {where}{with_rest}."
        )

    @contextlib.contextmanager
    def deadline(self) -> Iterator[None]:
        """Interrupt the block, as Ctrl-C would, where it outlasts the cap. For the main thread.

        Raises:
            HoursUsedUp: it was interrupted.
        """
        if self.cap is None or self.left_s <= 0:  # then nothing is begun at all
            yield
            return
        passed = threading.Event()
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            passed.set()
            signal.pthread_kill(main, signal.SIGINT)

        handler = signal.getsignal(signal.SIGINT)
        if handler in (signal.SIG_IGN, None):  # as in what a script starts in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(self.left_s, interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield
        except KeyboardInterrupt:
            if not passed.is_set():
                raise
            raise HoursUsedUp(
                f"The budget of {self.cap:g} hours is used up: what was at work was stopped, and is not committed."
            ) from None
        finally:
            timer.cancel()
            if handler is not None:
                signal.signal(signal.SIGINT, handler)


def needed_seconds(campaign: Campaign, kind: StageKind, round_index: int | None) -> float:
    """Seconds from a stage to the next point where a run may end with its last state measured, by what has been
    measured so far; stages that nothing tells about count as 0.

    A state is measured by the first stages of its round. From then on that point is behind the round's end: the next
    state, measured.
    """
    if round_index is None:
        return 0.0
    kinds = round_stages()
    rest = kinds[[item.name for item in kinds].index(kind.name) :]
    if kind.measures:
        return sum(_predicted(campaign, later, round_index) for later in rest if later.measures)
    if kind.is_leaf:  # nothing waits for it: what comes next is checked by itself
        return _predicted(campaign, kind, round_index)
    seconds = sum(_predicted(campaign, later, round_index) for later in rest)
    if campaign.config.rounds:
        seconds += sum(_predicted(campaign, later, round_index + 1) for later in kinds if later.measures)
    return seconds


def _predicted(campaign: Campaign, kind: StageKind, round_index: int) -> float:
    """Seconds of a stage, by the last round before that has made it; 0 where none has."""
    for earlier in reversed(range(round_index)):
        manifest = campaign.stage(kind.name, earlier).manifest()
        if manifest is not None:
            working, growth = _growth(campaign, kind, manifest, earlier, round_index)
            return manifest.seconds + working * (growth - 1)
    return 0.0


def _growth(
    campaign: Campaign, kind: StageKind, manifest: Manifest, earlier: int, round_index: int
) -> tuple[float, float]:
    """Seconds of a stage's work without its start, and how much more work the later round has."""
    config = campaign.config
    match kind.grows_with(config):
        case "annotations":
            then = campaign.num_annotated(earlier + 1)
            now = campaign.num_annotated(round_index) + campaign.num_left(round_index)
            return float(manifest.metrics["training_seconds"]), now / max(1, then)
        case "samples" if earlier == 0:
            # The base model alone is sampled for rehearsal, too.
            counts = campaign.stage("questions").require().metrics
            num_samples = counts["seed"] * config.sampler.num_samples
            num_samples += counts["eval"] * (1 + config.evaluation.num_samples)
            if config.selection.samples_candidates and round_index < config.rounds:
                num_samples += counts["candidate"] * config.sampler.num_samples
            seconds = manifest.cost.get("generate_seconds", 0.0) / config.sampler.replicas
            return min(manifest.seconds, seconds), num_samples / max(1, manifest.metrics["num_samples"])
        case _:
            return 0.0, 1.0
