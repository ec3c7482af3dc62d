"""Tables and figures in Markdown, for the sections of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def figure(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number with ``digits`` after the point; a dash where there is none."""
    return "-" if value is None else f"{value:{'+' if sign else ''},.{digits}f}"


def interval(value: float | None, bounds: Sequence[float] | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number and, where there is one, its 95 % confidence interval: ``0.91 [0.90, 0.92]``."""
    if bounds is None or value is None:
        return figure(value, digits, sign=sign)
    low, high = (figure(bound, digits, sign=sign) for bound in bounds)
    return f"{figure(value, digits, sign=sign)} [{low}, {high}]"


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def percent(share: float, digits: int = 0) -> str:
    """A share of 0 to 1 in percent."""
    return f"{100 * share:.{digits}f} %"


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Smallest to largest of at least one number."""
    numbers = [figure(value, digits) for value in sorted(values)]
    return numbers[0] if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
