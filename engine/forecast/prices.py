"""The section ``prices``: the price of an annotation, a CPU-hour and a GPU-hour."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from ka2l.section import Section


class PricesConfig(Section):
    """What the report's net saving reckons with. Changes no result: ``ka2l report`` prices a finished run again."""

    annotation: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Of one annotated question, where the annotator books no money itself. The default is an assumption: a minute or
    two of a person who looks the answer up."""
    cpu_hour: float = Field(0.05, ge=0, allow_inf_nan=False)
    """Of one CPU core for an hour. The default is an assumption: about what clouds ask for a core on demand."""
    gpu_hour: float = Field(2.5, ge=0, allow_inf_nan=False)
    """Of one GPU for an hour. The default is an assumption: about what clouds ask for a data-centre GPU on demand."""
    currency: str = "USD"
    """Name of the currency of all prices, those of the annotator's price table included."""


@dataclass(frozen=True)
class Work:
    """Computation: how long it took, and the CPU and GPU time that it kept busy or set aside."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.seconds * factor, self.cpu_seconds * factor, self.gpu_seconds * factor)

    def money(self, prices: PricesConfig) -> float:
        """Its price."""
        return (self.cpu_seconds * prices.cpu_hour + self.gpu_seconds * prices.gpu_hour) / 3600
