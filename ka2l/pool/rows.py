"""Turns one row of any source into a clean row or a quarantined one.

Reading files is in :mod:`ka2l.pool.sources`, duplicates and splits in :mod:`ka2l.pool.splits`, the Ray side in
``actors.pool_reader``. One bad row never ends a run: it is quarantined with its place and the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ka2l import schemas
from ka2l.pool.config import ColumnsConfig, PoolConfig
from ka2l.pool.sources import BadRow

#: Longest ``content`` of a quarantined row and longest metadata value, in characters.
MAX_CONTENT_CHARS = 2000

RowMapper = Callable[[Mapping[str, Any]], dict[str, Any]]


class CleanRow(NamedTuple):
    """A usable row."""

    question_id: str
    question: str
    answers: list[str]
    group: str | None
    fact: str | None
    split: str | None
    metadata: str
    """All other columns as a JSON object."""


class Rejected(NamedTuple):
    """A row that cannot be used; the fields of ``schemas.QUARANTINE``."""

    source: str
    row: int
    reason: str
    """``empty`` | ``malformed`` | ``over_long`` | ``unreadable``, a colon, details."""
    content: str


#: Rows between reading and splitting, usable and not, in source order. ``reason`` is null where the row is usable;
#: the keys are 64-bit hashes, and ``split_index`` is an index into ``schemas.SPLITS`` or -1.
CLEAN = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        ("reason", pa.string()),
        ("content", pa.string()),
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("group", pa.string()),
        ("fact", pa.string()),
        ("metadata", pa.string()),
        pa.field("question_key", pa.uint64(), nullable=False),
        pa.field("id_key", pa.uint64(), nullable=False),
        pa.field("group_key", pa.uint64(), nullable=False),
        pa.field("split_index", pa.int8(), nullable=False),
    ]
)

#: The columns of CLEAN from which duplicates and splits follow: all that the driver holds of a pool.
KEY_COLUMNS = ("source", "row", "reason", "question_key", "id_key", "group_key", "split_index")


# ---------------------------------------------------------------------------------------------------- normal form


def normalise_question(text: str) -> str:
    """The form in which two questions are the same: NFKC, case folded, white space collapsed, no final punctuation.

    Only sentence punctuation goes: ``C#`` and ``C++`` stay apart from ``C``. Applying it twice changes nothing.
    """
    if text.isascii():
        text = text.lower()
    else:
        # Case folding can undo NFKC and the other way round (Unicode, section 3.13, toNFKC_Casefold).
        for _ in range(3):
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split()).rstrip(" .?!,;:。؟।")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def question_key(text: str) -> str:
    """64-bit hash of the normalised question, 16 hex digits: equal for questions that are the same."""
    return _hash(normalise_question(text))


def content_id(question: str, answers: Iterable[str]) -> str:
    """A stable id for a row without one: a hash of its normalised question and its answers."""
    return "q-" + _hash("\x1f".join([normalise_question(question), *answers]))


# ---------------------------------------------------------------------------------------------------- one row


class _UnusableError(Exception):
    """Carries the reason why a row is quarantined."""


def clean_row(
    row: object,
    columns: ColumnsConfig,
    config: PoolConfig,
    source: str,
    position: int,
    mapper: RowMapper | None = None,
) -> CleanRow | Rejected:
    """Check one row of a source and bring it into one form.

    Args:
        row: a mapping from column to value; a ``BadRow`` where the source could not be parsed; anything else is
            malformed.
        columns: which columns hold what.
        config: limits on lengths.
        source: file or dataset the row came from, for the quarantine.
        position: position of the row in the source, from 0.
        mapper: of a known dataset, applied first.
    """
    if isinstance(row, BadRow):
        return Rejected(source, position, row.reason, _valid(row.content[:MAX_CONTENT_CHARS]))
    try:
        return _clean(row, columns, config, mapper)
    except _UnusableError as err:
        return Rejected(source, position, str(err), to_json(row)[:MAX_CONTENT_CHARS])


def _clean(row: object, columns: ColumnsConfig, config: PoolConfig, mapper: RowMapper | None) -> CleanRow:
    if not isinstance(row, Mapping):
        raise _UnusableError(f"malformed: the row is a {type(row).__name__}, not an object with columns")
    if mapper is not None:
        try:
            row = mapper(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
            raise _UnusableError(f"malformed: not in the published layout of this dataset ({err!r})") from None
    for name in (columns.question, columns.answers):
        if name not in row:
            shown = ", ".join(sorted(map(str, row))[:20])
            raise _UnusableError(f"malformed: no column '{name}' (the row has: {shown})")
    question = _clean_question(row[columns.question], config.max_question_chars)
    answers = _clean_answers(row[columns.answers], config.max_answer_chars)
    split = _clean_label(row, columns.split, "split")
    if columns.split is not None and split not in schemas.SPLITS:
        raise _UnusableError(f"malformed: split is {split!r}, not one of {', '.join(schemas.SPLITS)}")
    group = _clean_label(row, columns.group, "group")
    fact = _clean_label(row, columns.fact, "fact")
    question_id = _clean_label(row, columns.id, "id") or content_id(question, answers)
    used = {columns.question, columns.answers, columns.id, columns.group, columns.fact, columns.split}
    metadata = {str(name): _shortened(value) for name, value in row.items() if name not in used}
    return CleanRow(question_id, question, answers, group, fact, split, to_json(metadata))


def _clean_question(value: object, max_chars: int) -> str:
    if value is None:
        raise _UnusableError("empty: the question is null")
    if not isinstance(value, str):
        raise _UnusableError(f"malformed: the question is a {type(value).__name__}, not a string")
    question = _checked(value.strip(), "question")
    if not question:
        raise _UnusableError("empty: the question is blank")
    if not normalise_question(question):
        raise _UnusableError("empty: the question is nothing but punctuation")
    if len(question) > max_chars:
        raise _UnusableError(f"over_long: the question has more than {max_chars} characters")
    return question


def _clean_answers(value: object, max_chars: int) -> list[str]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    answers = []
    for item in values:
        if item is None:
            continue
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise _UnusableError(f"malformed: an answer is a {type(item).__name__}, not a string or number")
        answers.append(_checked(item.strip() if isinstance(item, str) else _number(item), "answers"))
    answers = [answer for answer in dict.fromkeys(answers) if answer]
    if not answers:
        raise _UnusableError("malformed: no answer is left after dropping null and blank ones")
    if any(len(answer) > max_chars for answer in answers):
        raise _UnusableError(f"over_long: an answer has more than {max_chars} characters")
    return answers


def _clean_label(row: Mapping[str, Any], name: str | None, role: str) -> str | None:
    value = row.get(name) if name is not None else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _UnusableError(f"malformed: {role} is a {type(value).__name__}, not a string or number")
    return _checked(value.strip() if isinstance(value, str) else _number(value), role) or None


def _number(value: float) -> str:
    # Integers that went through a nullable float column come back as 3.0.
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def _checked(text: str, role: str) -> str:
    # JSON may escape half of a surrogate pair, which no UTF-8 file can hold.
    if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
        raise _UnusableError(f"malformed: {role} holds a lone surrogate, which is not valid Unicode")
    return text


def _valid(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _shortened(value: object) -> object:
    if isinstance(value, bool | int | float | None):
        return value
    text = value if isinstance(value, str) else to_json(value)
    return value if len(text) <= MAX_CONTENT_CHARS else text[:MAX_CONTENT_CHARS]


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)


def to_json(value: object) -> str:
    """JSON that any reader takes: dates and bytes as text, NaN and infinities as null, no lone surrogates."""
    try:
        text = _JSON.encode(value)
    except (TypeError, ValueError):
        text = _JSON.encode(_plain(value))
    return _valid(text)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------- tables


def clean_table(
    rows: Iterable[tuple[int, object]],
    columns: ColumnsConfig,
    config: PoolConfig,
    source: str,
    mapper: RowMapper | None = None,
) -> pa.Table:
    """Clean (position, row) pairs of one source into a table with the schema CLEAN."""
    cells: dict[str, list[Any]] = {name: [] for name in CLEAN.names}
    appends = [column.append for column in cells.values()]
    for position, row in rows:
        cleaned = clean_row(row, columns, config, source, position, mapper)
        for append, value in zip(appends, _cells(cleaned, source, position), strict=True):
            append(value)
    return pa.table(cells, schema=CLEAN)


def _cells(cleaned: CleanRow | Rejected, source: str, position: int) -> tuple[Any, ...]:
    """The row's values, in the order of CLEAN."""
    if isinstance(cleaned, Rejected):
        return (*cleaned[:2], cleaned.reason, cleaned.content, None, None, None, None, None, None, 0, 0, 0, -1)
    question_id, question, answers, group, fact, split, metadata = cleaned
    key = int(question_key(question), 16)
    keys = (key, int(_hash(question_id), 16), _group_key(cleaned, key))
    index = schemas.SPLITS.index(split) if split else -1
    return (source, position, None, None, question_id, question, answers, group, fact, metadata, *keys, index)


def _group_key(row: CleanRow, key: int) -> int:
    if row.group is not None:
        return int(_hash(f"group\x1f{row.group}"), 16)
    if row.fact is not None:
        return int(_hash(f"fact\x1f{row.fact}"), 16)
    return key


def questions_table(clean: pa.Table, splits: np.ndarray) -> pa.Table:
    """The table ``schemas.QUESTIONS`` of usable rows; ``splits`` holds indices into ``schemas.SPLITS``, shape (n,)."""
    names = pa.array(schemas.SPLITS).take(pa.array(splits))
    table = clean.append_column("split", names).select(schemas.QUESTIONS.names)
    return table.cast(schemas.QUESTIONS)


def references_table(clean: pa.Table) -> pa.Table:
    """The table ``schemas.REFERENCES`` of usable rows."""
    return clean.select(schemas.REFERENCES.names).cast(schemas.REFERENCES)


def quarantine_table(clean: pa.Table, reasons: list[str]) -> pa.Table:
    """The table ``schemas.QUARANTINE``; rows that parsed well (duplicates) show what was made of them."""
    contents = []
    for row in clean.select(["content", "question_id", "question", "answers", "metadata"]).to_pylist():
        content = row["content"]
        if content is None:
            own = {"id": row["question_id"], "question": row["question"], "answers": row["answers"]}
            content = to_json(own | json.loads(row["metadata"]))[:MAX_CONTENT_CHARS]
        contents.append(content)
    arrays = [clean["source"], clean["row"], pa.array(reasons, pa.string()), pa.array(contents, pa.string())]
    return pa.table(arrays, schema=schemas.QUARANTINE)
