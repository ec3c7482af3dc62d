"""Rates that the warm-up measured, each with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: What is measured once may as well take so much more or less.
MEASURED_ONCE = 0.25
#: Standard errors in a 95 % interval.
_Z = 1.96


@dataclass(frozen=True)
class Range:
    """A prediction with the interval that the measurements leave open."""

    value: float
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        # As if both erred the same way: what rates they share is wrong for both.
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def hull(self, other: Range) -> Range:
        """The same value with an interval that covers the other's, too."""
        return Range(self.value, min(self.low, other.low), max(self.high, other.high))


def exactly(value: float) -> Range:
    """What is known."""
    return Range(value, value, value)


def measured_once(value: float) -> Range:
    """What no repetition says anything about."""
    return Range(value, value * (1 - MEASURED_ONCE), value * (1 + MEASURED_ONCE))


def mean_of(values: Sequence[float], num_all: int | None = None) -> Range:
    """The mean of all, by some drawn from them: 95 % interval from the spread between those drawn.

    Args:
        num_all: how many there are; None for many more than were drawn.
    """
    mean = sum(values) / len(values)
    if num_all == len(values):
        return exactly(mean)
    if len(values) < 2:
        return measured_once(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    error = _Z * deviation / math.sqrt(len(values))
    return Range(mean, mean - error, mean + error)


class Pace(NamedTuple):
    """How long a stage takes: its start, and each unit of its work on one worker."""

    start_s: Range
    s_per_unit: Range

    def seconds(self, units: float, workers: int = 1) -> Range:
        """Seconds for so much work."""
        return self.start_s + self.s_per_unit * (units / workers)


class Decoding(NamedTuple):
    """How long a decoder takes to fit and to use."""

    fit: Pace
    """A unit is an optimiser step."""
    decode_s: Range
    """Of the warm-up's few drafts: mostly the start of two models."""
    forwarded_share: float
    """Of the drafts, those that are new enough to be forwarded again."""


class Refining(NamedTuple):
    """How long KnowTuning takes beside tuning, with a writer that costs nothing."""

    facts: Pace
    """A unit is an answer, as in the next two."""
    difficulty: Pace
    augment: Pace
    compare: Pace | None
    """A unit is an optimiser step; None without comparisons."""
    pairs: Mapping[str, float]
    """Pairs an answer, by part (schemas.PAIRS)."""
    num_facts: float
    """Of an answer: each is a forward pass."""
    num_tokens: float
    """Of an answer's facts, with their prompts."""


class Scoring(NamedTuple):
    """How long it takes to find the perplexity of candidates."""

    pace: Pace
    """A unit is a candidate."""
    num_tokens: float
    """Of a candidate with its prompt."""


class Rates(NamedTuple):
    """What the warm-up measured."""

    prompt_tokens: dict[str, Range]
    """Tokens of a prompt, by split."""
    shared_tokens: float
    """Of them, those that all prompts begin with and that extraction forwards only once."""
    answer_tokens: dict[str, Range]
    """Tokens of an answer of the base model, by purpose."""
    adapted_tokens: dict[str, Range]
    """Tokens of an answer after a short tuning, by purpose."""
    observe: Pace
    """A unit is an answer."""
    observe_adapted: Pace
    """With a LoRA adapter, as in every round but the first."""
    extract: Pace
    """A unit is a question, as in all that follow but the last."""
    extract_adapted: Pace
    cluster: Pace
    feedback: Pace
    driver: tuple[dict[str, Pace], dict[str, Pace]]
    """Of what the driver does itself, in the first round, where it pays for a start, and in later ones. A unit is a
    seed question for label and probe."""
    tune: Pace
    """A unit is an optimiser step."""
    decoding: Decoding | None = None
    """None without a decoder."""
    refining: Refining | None = None
    """None where nothing is taken apart, or a teacher does it."""
    scoring: Scoring | None = None
    """None but for ``selection.kind: perplexity``."""
