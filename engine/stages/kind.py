"""The declaration of a stage: everything that loop, ledger, report, hours, meter and status know about it.

A stage is declared once, by the decorator `declare` on its function, and takes its place in the loop by its name in one
of the tuples of ``engine/stages/__init__.py``. Everything else is derived from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.execution.campaign import Campaign
    from engine.store.stage_folder import Stage
    from ka2l.knowledge.extraction_config import ExtractionConfig
    from ka2l.sampling.sampler import EngineConfig

#: What a stage hands back: metrics for the manifest, and cost that is not in its shards.
Outcome = tuple[Mapping[str, Any], Mapping[str, float]]

#: What computation is for, in the order of the report.
Purpose = Literal["sampling", "probing", "decoding", "tuning", "measuring", "rest"]
PURPOSES: tuple[Purpose, ...] = ("sampling", "probing", "decoding", "tuning", "measuring", "rest")

#: What the work of a stage grows with from one round to the next. The pool's questions are the same in every round.
Growth = Literal["questions", "samples", "annotations"]


class Work(NamedTuple):
    """One stage of one round, about to be made."""

    config: Mapping[str, Any]
    """The part of the config that decides its result."""
    inputs: Sequence[Stage]
    """Committed stages that it reads."""
    make: Callable[[Stage], Outcome]
    """Writes the tables and files of the open stage."""


class Room(NamedTuple):
    """What the workers of a stage hold, all together."""

    cpus: float
    gpus: float


def one_cpu(config: RunConfig) -> Room:
    """Of a stage that the driver makes itself."""
    return Room(1.0, 0.0)


def replicas(section: EngineConfig | ExtractionConfig) -> Room:
    """Of a stage that so many replicas make."""
    return Room(section.replicas * section.cpus_per_replica, section.replicas * section.gpus_per_replica)


@dataclass(frozen=True)
class StageKind:
    """A stage as it is declared. Calling it with a campaign and a round makes it, unless it is committed."""

    name: str
    plan: Callable[[Campaign, int], Work | None]
    """What there is to do in a round; None where nothing is."""
    purpose: Purpose
    """What its cost is booked as."""
    room: Callable[[RunConfig], Room] = one_cpu
    """What its workers hold."""
    needed: Callable[[RunConfig, int], bool] = lambda config, round_index: True
    """Whether a round has it."""
    tables: tuple[str, ...] = ()
    """Folders that it commits; one of its own name where none are given. The last tells what was spent."""
    in_rounds: bool = True
    """Whether each round has one of its own; else the run has one."""
    measures: bool = False
    """Whether the accuracy of a model state is known once this is committed, and those like it before."""
    closes: bool = False
    """Whether it is made of the last model state, too, after which nothing is selected."""
    is_leaf: bool = False
    """Whether no stage reads it but itself in later rounds. It is made anew where its settings have changed, and the
    cap on hours asks for no room behind it."""
    answers: tuple[str, ...] = ()
    """Purposes of sampled answers (schemas.PURPOSES) among which its cost is shared by generated tokens."""
    grows_with: Callable[[RunConfig], Growth] = lambda config: "questions"
    """What its work grows with."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of the folders that it commits."""
        return self.tables or (self.name,)

    def __call__(self, campaign: Campaign, round_index: int | None = None) -> None:
        campaign.make(self, round_index if self.in_rounds else None)


def declare(purpose: Purpose, **declared: Any) -> Callable[[Callable[[Campaign, int], Work | None]], StageKind]:
    """Make a stage of the function that plans it, under the function's name or ``name``."""

    def make(plan: Callable[[Campaign, int], Work | None]) -> StageKind:
        named: dict[str, Any] = {"name": plan.__name__} | declared
        return StageKind(plan=plan, purpose=purpose, **named)

    return make
