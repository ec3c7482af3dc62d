"""GPUs of a benchmark's cells, from their models' configs; and the cells as a table before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

from rich.table import Column, Table

from engine.benchmark.matrix import Cell
from engine.config import RunConfig
from ka2l.errors import ConfigError, KA2LError, ModelError
from ka2l.model.loading import ModelConfig
from ka2l.model.sizing import EngineShape, ModelNeeds, engine_shape, model_needs
from ka2l.section import Section

_Section = TypeVar("_Section", bound=Section)
#: The cache holds so many tokens at least: a few hundred short questions with their answers, decoded at once.
_CACHE_TOKENS = 64 * 1024
#: Of each parameter in full fine-tuning: weight, gradient and AdamW's two moments, all in float32.
_TRAINED_BYTES = 16


class Sizes:
    """Works out what each model's workers need; a model that several cells ask is looked at once.

    Args:
        gpu_gib: memory of each GPU.
        needs_of: reads a model's config.
    """

    def __init__(self, gpu_gib: float, needs_of: Callable[..., ModelNeeds] = model_needs) -> None:
        self._gpu_gib = gpu_gib
        self._needs_of = needs_of
        self._known: dict[tuple[Any, ...], ModelNeeds | KA2LError] = {}

    def sized(self, config: RunConfig, model: ModelConfig) -> RunConfig:
        """The config with GPUs for sampler, extraction and tuning; a section that says how many keeps its own.

        Args:
            model: of the run, as a directory or hub id.

        Raises:
            ModelError: the model's config cannot be read.
            ConfigError: the GPUs do not hold the model.
        """
        sampler, extraction, tuning = config.sampler, config.extraction, config.tuning
        own = sampler.model_fields_set & {"gpus_per_replica", "tensor_parallel_size"}
        if own and "gpus_per_replica" in extraction.model_fields_set and "gpus_per_worker" in tuning.model_fields_set:
            return config
        needs = self._needs(model)
        if not own:
            shape = engine_shape(needs, self._gpu_gib, _num_tokens(config, needs))
            sampler = _filled(
                sampler,
                gpus_per_replica=shape.gpus,
                tensor_parallel_size=shape.tensor_parallel_size,
                gpu_memory_utilization=shape.gpu_memory_utilization,
            )
        single = self._single(needs, model)
        # Beside the weights an extractor needs what an engine's cache takes, for the activations of long batches.
        share = single.gpu_share if own else max(single.gpu_share, min(1.0, sampler.gpus_per_replica))
        extraction = _filled(extraction, gpus_per_replica=share)
        self._check_full(config, needs, model)
        tuning = _filled(tuning, gpus_per_worker=1.0)
        return config.model_copy(update={"sampler": sampler, "extraction": extraction, "tuning": tuning})

    def _needs(self, model: ModelConfig) -> ModelNeeds:
        key = (model.source, model.dtype, model.trust_remote_code)
        if key not in self._known:
            try:
                self._known[key] = self._needs_of(model.source, model.dtype, trust_remote_code=model.trust_remote_code)
            except ModelError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, KA2LError):
            raise found
        return found

    def _check_full(self, config: RunConfig, needs: ModelNeeds, model: ModelConfig) -> None:
        """Raise ConfigError where training all weights needs more memory than the workers' GPUs have."""
        tuning = config.tuning
        if tuning.adapter.kind != "full":
            return
        shards = tuning.workers if tuning.parallel == "fsdp" else 1
        needed_gib = needs.num_parameters * _TRAINED_BYTES / shards / 2**30
        if needed_gib > self._gpu_gib:
            raise ConfigError(
                f"full fine-tuning of {model.path} takes {needed_gib:,.0f} GiB a worker for weights, gradients and the "
                f"optimiser alone, and a GPU has {self._gpu_gib:g}",
                hint="Set tuning.parallel=fsdp and more tuning.workers, or tuning.adapter.kind=lora.",
            )

    def _single(self, needs: ModelNeeds, model: ModelConfig) -> EngineShape:
        """The part of one GPU that holds the weights."""
        shape = engine_shape(needs, self._gpu_gib, 0)
        if shape.tensor_parallel_size > 1:
            raise ConfigError(
                f"{model.path} does not fit one GPU of {self._gpu_gib:g} GiB, and hidden states and adapters are made "
                "on one GPU each",
                hint="Use GPUs with more memory, or a smaller model.",
            )
        return shape


def _num_tokens(config: RunConfig, needs: ModelNeeds) -> int:
    """Tokens that the cache must hold: vLLM wants room for one sequence of full length at least."""
    return max(_CACHE_TOKENS, config.sampler.max_model_len or needs.max_positions)


def _filled(section: _Section, **values: Any) -> _Section:
    """The section with these values where it names none."""
    return section.model_copy(
        update={key: value for key, value in values.items() if key not in section.model_fields_set}
    )


def plan_table(cells: Iterable[Cell], unknown: Container[str] = ()) -> Table:
    """A line for each cell, those of the highest priority first: its model, and the GPUs of its workers.

    Args:
        unknown: names of cells of which the size is not known.
    """
    table = Table(Column("cell", no_wrap=True), "sampler: GPUs", "tensor parallel", "memory share", "extraction: GPUs",
                  "tuning: GPUs", "priority", "model")  # fmt: skip
    for cell in cells:
        sampler, config = cell.config.sampler, cell.config
        gpus = (
            ["?"] * 5
            if cell.name in unknown
            else [
                f"{sampler.replicas} x {sampler.gpus_per_replica:g}",
                str(sampler.tensor_parallel_size),
                f"{sampler.gpu_memory_utilization:g}",
                f"{config.extraction.replicas} x {config.extraction.gpus_per_replica:g}",
                f"{config.tuning.workers} x {config.tuning.gpus_per_worker:g}",
            ]
        )
        table.add_row(cell.name, *gpus, f"{cell.priority:g}", config.model.path)
    return table
