"""The section ``extraction``: which hidden states are read, and at which position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from ka2l.section import Section

if TYPE_CHECKING:
    pass


class ExtractionConfig(Section):
    """Which hidden states are read, and where."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "device", "replicas", "cpus_per_replica", "gpus_per_replica"}
    )

    layers: Literal["all"] | list[int] = "all"
    """``all``, or layer numbers: 0 is the embedding output, the model's depth the normed output of the last layer;
    negative numbers count from the top."""
    position: Literal["last_token", "mean", "last_and_mean"] = "last_token"
    """The state before the first answer token, the mean over the prompt's tokens, or both, one behind the other: the
    first says best what the model knows, the second what was asked, which a decoder has to read."""
    next_token: bool = True
    """Read how sure the model is of the first answer token, too: the probe ranks better with it. The whole model is run
    for it, whatever ``layers`` says."""
    batch_size: int = 64
    """Prompts in one forward pass, at most."""
    storage_dtype: Literal["float32", "float16"] = "float32"
    """How states are stored; float16 halves the tables."""
    max_prompt_tokens: int = 2048
    """Longer prompts are reported as unusable instead of being cut."""
    device: str = "auto"
    """``auto`` is a GPU where there is one, else the CPU; or a torch device such as ``cuda:1``."""
    replicas: int = 1
    """Models side by side."""
    cpus_per_replica: float = 1.0
    """CPU cores Ray sets aside for a model."""
    gpus_per_replica: float = 0.0
    """GPUs Ray sets aside for a model."""

    @field_validator("layers")
    @classmethod
    def _some_layer(cls, layers: Any) -> Any:
        if not layers:
            raise ValueError("layers is empty; name at least one layer or say all")
        return layers

    @field_validator("batch_size", "max_prompt_tokens", "replicas")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"must be at least 1, is {value}")
        return value
