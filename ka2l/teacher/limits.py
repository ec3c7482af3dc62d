"""Limits of a teacher's requests: rate, cap on money, wait before a retry."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


class RateLimit:
    """Spaces requests so that no more than ``per_minute`` units pass in a minute: a bucket that leaks at that rate and
    holds one request. None is no limit. Times are seconds of any one clock."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def reserve(self, amount: float, now: float) -> float:
        """Book ``amount`` units; returns the seconds to wait before they may be used."""
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_per_unit
        return start - now

    def pause(self, until: float) -> None:
        """Let nothing pass before ``until``."""
        self._free_at = max(self._free_at, until)


class MoneyCap:
    """Keeps what is spent, plus the most that requests under way or lost can cost, at or below a limit.

    Args:
        limit: most money, in the currency of the price table; None is no limit.

    The cost of an answer is counted once per journal key, so counting a journal again after a restart changes nothing.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.reserved = 0.0
        self.lost = 0.0
        """Most that requests without an answer can have cost: cut or timed out, they may be billed all the same."""
        self._costs: dict[str, float] = {}
        self._spent = 0.0
        self._num_reserved = 0

    @property
    def spent(self) -> float:
        """Money counted so far."""
        return self._spent

    def count(self, key: str, cost: float) -> None:
        """Count what the answer under a journal key cost."""
        if key not in self._costs:
            self._costs[key] = cost
            self._spent += cost

    def reserve(self, bound: float) -> bool:
        """Set ``bound`` aside for a request; False, and nothing is set aside, where the limit would be passed."""
        if self.limit is not None and self._spent + self.lost + self.reserved + bound > self.limit:
            return False
        self.reserved += bound
        self._num_reserved += 1
        return True

    def release(self, bound: float, *, lost: bool = False) -> None:
        """The request that ``bound`` was set aside for is over; ``lost`` without telling what it cost."""
        self._num_reserved -= 1
        # Exactly zero when nothing is under way: rounding errors must not hold money back.
        self.reserved = self.reserved - bound if self._num_reserved else 0.0
        self.lost += bound if lost else 0.0


def backoff(num_faults: int, base_s: float, cap_s: float) -> float:
    """Seconds to wait after the ``num_faults``-th fault in a row (from 1): exponential with full jitter
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)."""
    return random.uniform(0.0, min(cap_s, base_s * 2.0 ** (num_faults - 1)))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait (``Retry-After`` of RFC 9110 as seconds or date, or ``retry-after-ms``)."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            continue
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return None
