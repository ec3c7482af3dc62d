"""The values of a benchmark's report; ``benchmark.json`` has the same structure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: Version of the layout of ``benchmark.json``.
SCHEMA_VERSION = 1


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True)


class CurvePoint(_Values):
    """One measured model state of one cell."""

    round: int
    num_annotated: int
    """Annotations that the state was tuned on."""
    accuracy: float
    accuracy_ci: tuple[float, float] | None = None


class Cost(_Values):
    """What a cell spent."""

    annotations: int = 0
    money: float = 0.0
    tokens_generated: int = 0
    seconds: float = 0.0
    """Wall-clock, of committed stages."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in Cost.model_fields})


class CellReport(_Values):
    """One run of the benchmark."""

    name: str
    model: str
    data: str
    strategy: str
    seed: int
    status: str
    """waiting | running | complete | paused | failed."""
    attempts: int = 0
    error: str | None = None
    """The last lines that it said, where it failed; or why its summary cannot be read."""
    wall_seconds: float = 0.0
    """Wall-clock that its process ran, over all attempts, waiting for workers included."""
    curve: list[CurvePoint] = []
    num_candidates: int | None = None
    unknown_fraction: float | None = None
    """Share of the candidates that the base model does not know, by its probe."""
    cost: Cost = Cost()
    report: str | None = None
    """Path of its own report, relative to this one."""


class MeanPoint(_Values):
    """The same round of the cells that differ in their seed alone."""

    round: int
    num_annotated: float
    """Mean."""
    accuracy: float
    """Mean."""
    low: float
    """Smallest accuracy among the seeds."""
    high: float
    num_seeds: int


class Combination(_Values):
    """A model on a data set with a strategy, over all seeds."""

    model: str
    data: str
    strategy: str
    num_cells: int
    num_complete: int
    curve: list[MeanPoint] = []
    """Of the rounds that every seed with a measurement has measured."""
    final_accuracy: float | None = None
    """Mean over the cells that are complete."""
    final_range: tuple[float, float] | None = None
    """Smallest and largest of them, where there are several."""
    final_ci: tuple[float, float] | None = None
    """95 % confidence interval over the eval questions, where there is one seed."""


class Pair(_Values):
    """Two models' knowledge maps on the same questions."""

    first: str
    second: str
    kappa: float | None
    """Cohen's kappa of known against unknown; null where chance alone would agree everywhere."""
    both_known: float
    """Share of the questions."""
    both_unknown: float
    differ: float


class Agreement(_Values):
    """Who knows what of one data set, by the base models' probes (P(unknown) of at least one half is unknown)."""

    data: str
    strategy: str
    """Of the cells that the maps are taken from; one map a model."""
    seed: int
    maps: dict[str, str]
    """Model -> fingerprint of its map."""
    num_questions: int
    """Questions that all maps hold."""
    num_left_out: int
    """Questions that some maps hold and others do not."""
    unknown: dict[str, float]
    """Model -> share of unknown questions."""
    pairs: list[Pair]
    known_by: list[int]
    """Item k: questions that exactly k of the models know."""


class BenchmarkData(_Values):
    """All that the report of a benchmark shows."""

    schema_version: int = SCHEMA_VERSION
    name: str
    location: str
    models: list[str]
    data: list[str]
    strategies: list[str]
    seeds: list[int]
    cells: list[CellReport]
    combinations: list[Combination]
    agreement: list[Agreement]
    problems: list[str] = []
    """What could not be read, one sentence each."""
