"""Reads and writes one cell of an annotation file: several answers as one text, flags, times, numbers, names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

SEPARATOR = " | "


def join_answers(answers: Sequence[str]) -> str:
    """Several answers in one text, separated by `` | ``; a separator inside an answer is escaped as ``\\|``."""
    return SEPARATOR.join(re.sub(r"(^|(?<=\s))(\\*)\|", r"\2\2\\|", answer.strip()) for answer in answers)


def split_answers(text: str) -> list[str]:
    """Undo :func:`join_answers`; blank answers are dropped. A ``|`` without blanks around it stays: ``AC|DC``."""
    parts = re.split(r"(?:^|\s+)\|(?=\s|$)", text)
    unescaped = (re.sub(r"(^|(?<=\s))(\\+)\|", lambda m: "\\" * (len(m[2]) // 2) + "|", part) for part in parts)
    return [part.strip() for part in unescaped if part.strip()]


def guard_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that would be begins with an apostrophe.

    Source: OWASP, CSV Injection, https://owasp.org/www-community/attacks/CSV_Injection
    """
    return "'" + text if _RISKY.match(text) else text


def unguard_cell(text: str) -> str:
    """Undo :func:`guard_cell`. Text that was typed in a spreadsheet and never guarded stays as it is."""
    return text[1:] if text.startswith("'") and _RISKY.match(text) else text


#: Apostrophes before the sign belong to the pattern: else undoing would take away one that was there before.
_RISKY = re.compile(r"'*\s*[=+\-@\t\r＝＋－＠]")


def question_id_of(values: Mapping[str, Any]) -> str:
    """A row's question id; raises ValueError where there is none."""
    question_id = values.get("question_id")
    if not isinstance(question_id, str | int) or not str(question_id).strip():
        raise ValueError("no question_id")
    return str(question_id)


def completed_by(who: Any) -> str:
    """A person's name as Label Studio gives it: an e-mail address, a name or a number."""
    if isinstance(who, dict):
        name = f"{who.get('first_name') or ''} {who.get('last_name') or ''}".strip()
        return str(who.get("email") or name or completed_by(who.get("id")))
    return f"user {who}" if isinstance(who, int) else str(who or "")


def flag_of(value: Any) -> bool:
    """``yes``, ``true``, ``x``, ``1`` and their opposites, as people write them; raises ValueError."""
    text = str("" if value is None else value).strip().lower()
    if text in ("yes", "y", "true", "x", "1", "skip", "skipped"):
        return True
    if text in ("", "no", "n", "false", "0"):
        return False
    raise ValueError(f"skipped is {value!r}; write yes or leave it empty")


def time_of(value: Any, otherwise: datetime) -> datetime:
    """ISO 8601, taken as UTC where no zone is given. Spreadsheets rewrite times; an answer is not lost for that."""
    try:
        when = datetime.fromisoformat(str(value).strip())
        return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return otherwise


def number_of(value: Any) -> float | None:
    """A finite number; None for a blank cell, NaN and infinities. Raises ValueError."""
    if value is None or value == "":
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def own_answers_of(value: Any) -> list[tuple[str, int]]:
    """The model's answers with their counts, from ``Paris (8) | Lyon (2)`` or a list of pairs."""
    if isinstance(value, str):
        found = [re.fullmatch(r"(.*) \((\d+)\)", part, re.DOTALL) for part in split_answers(value)]
        return [(match[1], int(match[2])) for match in found if match]
    return [(str(answer), int(count)) for answer, count in value]
