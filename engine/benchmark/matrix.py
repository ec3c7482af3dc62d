"""Many runs as one: every model with every data set, query strategy and seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, field_validator

from engine.config import RayConfig, RunConfig, load_values, parse_values, validated
from ka2l.errors import ConfigError
from ka2l.section import Section

_AXES = ("models", "data", "strategies")
_SEPARATOR = "--"


class MatrixConfig(Section):
    """The cells of a benchmark: each is an ordinary run of its own."""

    name: str = "benchmark"
    """Names the folder ``runs/NAME`` where none is given."""
    preset: str | None = None
    """Preset or YAML file that every cell starts from."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Keys of a run's config for every cell, on top of the preset; an axis may change them again."""
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> keys of a run's config."""
    data: dict[str, dict[str, Any]] = Field({"pool": {}}, min_length=1)
    """Name -> keys of a run's config."""
    strategies: dict[str, dict[str, Any]] = Field({"probe": {}}, min_length=1)
    """Name -> keys of a run's config."""
    seeds: list[int] = Field([0], min_length=1)
    """One cell each."""
    priorities: dict[str, float] = Field(default_factory=dict)
    """Name of a model, data set or strategy -> what it adds to its cells' priority. Higher goes first; 0 otherwise."""
    max_running: int = Field(9, ge=1)
    """Cells that are under way at once; each has a process of its own."""
    retries: int = Field(1, ge=0)
    """How often a cell that failed is started again; it goes on with what is committed."""
    patience_s: float = Field(60.0, ge=0)
    """Seconds that the first in the queue for workers may be passed by smaller ones."""
    slice_s: float = Field(3600.0, gt=0)
    """Seconds after which a stage that works shard by shard lets others have its workers, if any wait."""
    gpu_gib: float | None = Field(None, gt=0)
    """Memory of each GPU, GiB. Sampler, extraction and tuning of each cell get the GPUs that its model needs, unless
    its config names them itself; null leaves all configs as they are."""
    ray: RayConfig = RayConfig()
    """Where all cells' workers live."""

    @field_validator(*_AXES)
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not name or _SEPARATOR in name or not all(part.isalnum() or part in "-_." for part in name):
                raise ValueError(f"{name!r} becomes part of a folder's name: use letters, digits, '.', '_' and '-'")
        return values


class Cell(NamedTuple):
    """One run of a benchmark."""

    name: str
    """MODEL--DATA--STRATEGY--SEED."""
    model: str
    data: str
    strategy: str
    seed: int
    priority: float
    config: RunConfig


def load_matrix(path: str, overrides: Iterable[str] = ()) -> MatrixConfig:
    """Read a benchmark's YAML file or preset.

    Raises:
        ConfigError: no such file, YAML that does not parse, an unknown key, a wrong value.
    """
    return _validated(load_values(path, overrides), path)


def parse_matrix(text: str, source: str) -> MatrixConfig:
    """Read what `dump_matrix` wrote; raises ConfigError."""
    return _validated(parse_values(text, (), source), source)


def _validated(values: Mapping[str, Any], path: str) -> MatrixConfig:
    try:
        return MatrixConfig.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'benchmark'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise ConfigError(f"{path}: {problems}", hint="`ka2l benchmark --help` shows the keys.") from None


def cells(config: MatrixConfig) -> list[Cell]:
    """All cells, those of the highest priority first.

    Raises:
        ConfigError: names the cell whose config is wrong, or a priority for what is not there.
    """
    known = {name for axis in _AXES for name in getattr(config, axis)}
    if unknown := sorted(set(config.priorities) - known):
        raise ConfigError(
            f"priorities names {', '.join(unknown)}, which is not a model, data set or strategy",
            hint=f"There are {', '.join(sorted(known))}.",
        )
    made = list(_cells(config))
    return sorted(made, key=lambda cell: -cell.priority)


def _cells(config: MatrixConfig) -> Iterator[Cell]:
    base = load_values(config.preset) if config.preset else {}
    for model, data, strategy, seed in product(config.models, config.data, config.strategies, config.seeds):
        name = _SEPARATOR.join((model, data, strategy, str(seed)))
        values: Mapping[str, Any] = base
        for more in (config.common, config.models[model], config.data[data], config.strategies[strategy]):
            values = merge(values, more)
        # A cell joins the Ray of its benchmark, whose address it is told.
        ray = config.ray.model_dump() | {"address": "auto"}
        values = merge(values, {"name": name, "seed": seed, "ray": ray})
        priority = sum(config.priorities.get(part, 0.0) for part in (model, data, strategy))
        yield Cell(name, model, data, strategy, seed, priority, validated(values, f"cell {name}"))


def merge(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``more`` on top; sections are merged key by key."""
    merged = dict(values)
    for key, value in more.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def dump_matrix(config: MatrixConfig) -> str:
    """The benchmark's config as YAML. It holds no secret: a run's config names variables, never keys."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
