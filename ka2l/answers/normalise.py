"""Short answers as comparable tokens: words without case and accents, numbers as values, dates as calendar fields.

``1,000``, ``1000.0`` and ``one thousand`` become one :class:`Number`; ``Dec 14, 1972`` and ``1972-12-14`` one
:class:`Date`. What two token lists have to share to mean the same is decided in :mod:`ka2l.answers.lexical`.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

_EDGE = " \t\r\n.,;:!?\"'`´‘’“”«»*_"


class Number(NamedTuple):
    """A cardinal number."""

    value: Decimal


class DateFields(NamedTuple):
    """One reading of a date; a field that the text does not state is None."""

    year: int | None
    month: int | None
    day: int | None


class Date(NamedTuple):
    """A date. ``03/04/1972`` has two readings, all other spellings one."""

    readings: frozenset[DateFields]


Token = str | Number | Date


def _words(text: str) -> list[str]:
    return text.split()


def surface_key(text: str) -> str:
    """The text without what never changes its meaning: case, white space, quotes and closing punctuation.

    Answers with the same key are one answer. Punctuation inside stays (``1.5`` is not ``15``). The key of an answer
    that holds nothing but white space and punctuation is empty: such an answer counts as none.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGE)


def unmangle(text: str) -> str:
    """The text as it was before UTF-8 was read as Windows-1252 or Latin-1 (``DÃ¡in``); as it is where it was not."""
    if not _MANGLED.isdisjoint(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                return text.encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
    return text


#: What the first byte of most two- and three-byte characters is read as.
_MANGLED = frozenset("ÂÃÄÅâ")


def fold(text: str) -> str:
    """Unicode-compatible, lower-case text without accents and mangled bytes, one blank between words."""
    decomposed = unicodedata.normalize("NFKD", unmangle(text)).casefold()
    return " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).split())


# --- dates -----------------------------------------------------------------------------------------------------------

_MONTHS = _words("january february march april may june july august september october november december")
_MONTH_NUMBER = {name[:length]: i for i, name in enumerate(_MONTHS, 1) for length in (3, len(name))} | {"sept": 9}
_MONTH = r"(?P<month>" + "|".join(f"{m[:3]}(?:{m[3:]})?" if m != "may" else m for m in _MONTHS) + r"|sept)\b\.?"
_DAY = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>[12]\d{3})\b"
_CLOCK = r"(?:[t ,]+(?:at +)?\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[ap]\.?m\b\.?)?)?(?: ?(?:z|utc|gmt)\b)?"
_DATE_PATTERNS = tuple(
    re.compile(r"(?<![\w.,/-])" + pattern + _CLOCK)
    for pattern in (
        r"(?P<year>[12]\d{3})[-/.](?P<month>[01]?\d)[-/.](?P<day>[0-3]?\d)(?!\d)",
        r"(?P<first>[0-3]?\d)[-/.](?P<second>[0-3]?\d)[-/.](?P<year>[12]\d{3})\b",
        rf"{_DAY} (?:of )?{_MONTH} ?,? ?(?:of )?{_YEAR}",
        rf"{_MONTH} (?:the )?{_DAY}(?: ?,| of)? ?{_YEAR}",
        rf"{_MONTH} ?,? ?(?:of )?{_YEAR}",
        rf"{_DAY} (?:of )?{_MONTH}(?! ?\d)",
        rf"{_MONTH} (?:the )?{_DAY}\b(?![\d.,:]*\d)",
    )
)


def _read_date(match: re.Match[str]) -> Date | None:
    parts = match.groupdict()
    year = int(parts["year"]) if parts.get("year") else None
    if "first" in parts:
        first, second = int(parts["first"]), int(parts["second"])
        readings = {DateFields(year, first, second), DateFields(year, second, first)}
    else:
        month = parts["month"]
        number = int(month) if month.isdigit() else _MONTH_NUMBER[month]
        readings = {DateFields(year, number, int(parts["day"]) if parts.get("day") else None)}
    valid = frozenset(r for r in readings if 1 <= (r.month or 0) <= 12 and (r.day is None or 1 <= r.day <= 31))
    return Date(valid) if valid else None


def dates_agree(left: Date, right: Date) -> bool:
    """Whether some reading of one date states the other, less or equally precisely (``December 1972``)."""
    return any(_refines(a, b) or _refines(b, a) for a in left.readings for b in right.readings)


def _refines(fine: DateFields, coarse: DateFields) -> bool:
    return all(c is None or c == f for f, c in zip(fine, coarse, strict=True))


# --- numbers and words -----------------------------------------------------------------------------------------------

_SMALL = {
    word: value
    for value, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        )
    )
} | {word: 10 * value for value, word in enumerate(_words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ORDINALS = {
    word: f"{value}{('th', 'st', 'nd', 'rd')[value if value < 4 else 0]}"
    for value, word in enumerate(_words("first second third fourth fifth sixth seventh eighth ninth tenth"), 1)
}
_SIGNS = {"$": " dollar ", "£": " pound ", "€": " euro ", "¥": " yen ", "%": " percent ", "°": " degree ", "&": " and "}
_UNITS_AFTER_NUMBER = {
    "mi": "mile", "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "ft": "foot", "yd": "yard",
    "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound", "lbs": "pound", "oz": "ounce", "l": "liter",
    "ml": "milliliter", "h": "hour", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute", "s": "second",
    "sec": "second", "secs": "second", "yr": "year", "yrs": "year", "c": "celsius", "f": "fahrenheit", "usd": "dollar",
}  # fmt: skip
_SPELLINGS = {
    "feet": "foot", "inches": "inch", "metre": "meter", "metres": "meter", "kilometre": "kilometer",
    "kilometres": "kilometer", "litre": "liter", "litres": "liter", "pct": "percent", "people": "person",
    "men": "man", "women": "woman", "children": "child", "usa": "us", "saint": "st", "mount": "mt",
}  # fmt: skip

_NUMBER = r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)"
_SCAN = re.compile(
    rf"(?P<ordinal>\d+(?:st|nd|rd|th|s)\b)|(?P<number>{_NUMBER})|(?P<word>[^\W_]+)|(?P<date>\x00\d+\x00)"
)


def singular(word: str) -> str:
    """A word without its plural ending, by rule: ``miles`` -> ``mile``, ``cities`` -> ``city``."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui":
        return word[:-1]
    return word


@lru_cache(maxsize=2**16)
def tokenize(text: str) -> tuple[Token, ...]:
    """The text's words, numbers and dates in order; punctuation is dropped, accents and case are folded.

    Words are singular and spelled one way (``kilometres`` and ``km`` after a number both give ``kilometer``).
    """
    text = fold(text)
    dates: list[Date] = []

    def keep_date(match: re.Match[str]) -> str:
        date = _read_date(match)
        if date is None:
            return match.group()
        dates.append(date)
        return f" \x00{len(dates) - 1}\x00 "

    text = text.replace("\x00", " ")
    text = re.sub(r"\bunited states(?: of america)?\b", "us", re.sub(r"\bunited kingdom\b", "uk", text))
    for pattern in _DATE_PATTERNS:
        text = pattern.sub(keep_date, text)
    for sign, word in _SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"(?<=[^\W\d])[.'’](?=[^\W\d]|\W|$)", "", text)  # D.C. -> dc, crosby's -> crosbys, Jr. -> jr
    text = re.sub(
        r"(?<=\d)(?=(?:" + "|".join(u for u in _UNITS_AFTER_NUMBER if u != "s") + r")\b)", " ", text
    )  # 5km -> 5 km, but 1990s
    text = re.sub(r"(?<=\d)\s*[-–—]\s*(?=\d)", " to ", text)  # a range is no negative number

    tokens: list[Token] = []
    for match in _SCAN.finditer(text):
        value = match.group()
        if match.lastgroup == "date":
            tokens.append(dates[int(value.strip("\x00"))])
        elif match.lastgroup == "number":
            tokens.append(_number(value))
        elif tokens and isinstance(tokens[-1], Number) and value in _UNITS_AFTER_NUMBER:
            tokens.append(_UNITS_AFTER_NUMBER[value])
        else:
            word = _SPELLINGS.get(value) or _ORDINALS.get(value) or value
            tokens.append(word if match.lastgroup == "ordinal" else singular(word))
    return tuple(_merge_numbers(tokens))


def _number(text: str) -> Number:
    return Number(Decimal(text.replace(",", "").replace("−", "-")).normalize())


def _merge_numbers(tokens: list[Token]) -> list[Token]:
    """Spelled numbers and scale words become one number: ``two hundred and five``, ``3.5 million``, ``minus 4``."""
    merged: list[Token] = []
    position = 0
    while position < len(tokens):
        value, length = _leading_number(tokens[position:])
        if not length:
            merged.append(tokens[position])
        else:
            if merged and merged[-1] in ("minus", "negative"):
                merged.pop()
                value = -value
            merged.append(Number(value.normalize()))
        position += length or 1
    return merged


def _leading_number(tokens: list[Token]) -> tuple[Decimal, int]:
    """Value and length of the longest single number that the tokens begin with; length 0 where there is none.

    Read as English reads it: ``below`` is what the next word has to stay under, so that ``five six`` and ``1 2`` stay
    two numbers, while ``two hundred and five thousand`` is one.
    """
    total, current, below, group_below, length = Decimal(0), Decimal(0), Decimal("inf"), Decimal("inf"), 0
    for position, token in enumerate(tokens):
        if token == "and" and length and (current % 100 == 0):
            continue
        if isinstance(token, str) and token in _SCALES:
            scale = Decimal(_SCALES[token])
            if scale >= group_below or (scale < 1000 and length and current >= 100):
                break
            current = (current if length else Decimal(1)) * scale
            below = scale
            if scale >= 1000:
                total, current, below, group_below = total + current, Decimal(0), Decimal(1000), scale
        elif isinstance(token, Number) and not length:
            current, below = token.value, Decimal(0)
        elif isinstance(token, str) and token in _SMALL and _SMALL[token] < below and (token != "zero" or not length):
            current += _SMALL[token]
            below = Decimal(10 if _SMALL[token] >= 20 else 0)
        else:
            break
        length = position + 1
    return total + current, length
