"""A testbed's world from the questions of a file: real facts in place of invented people."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ka2l.errors import PoolError
from ka2l.seeds import row_seed
from ka2l.testbed.world import Fact, World, expose, exposure_by_share

if TYPE_CHECKING:
    from ka2l.testbed.build import TestbedConfig

#: Question and first answer together at most: the model is small and reads 512 tokens.
MAX_CHARACTERS = 400

#: Ways to ask a question of a file. The bare question comes first.
WRAPPERS = ("{q}", "Tell me: {q}", "Here is a question. {q}", "{q} Do you know?")


def read_facts(config: TestbedConfig) -> World:
    """The questions of a JSONL file as facts: rows ``{question, answers, [subject], [the exposure column]}``.

    Rows without question or answers, over-long rows and repeated questions are skipped and counted. Exposure: a column
    of numbers goes by rank (the largest are well known, the next partly, the rest and all zeros are strangers); a
    column of true/false or 1/0 means shown or not; without a column a seeded hash decides, subject by subject.

    Raises:
        PoolError: no such file, no usable row, or no row with the exposure column.
    """
    rows, num_skipped = _read_rows(Path(str(config.facts)))
    groups = [str(row.get("subject") or f"fact-{index:05d}") for index, row in enumerate(rows)]
    by_hash = sorted(set(groups), key=lambda group: (row_seed(config.seed, 0, "split", group), group))
    num_seed = round(len(by_hash) * config.num_seed_people / (config.num_people + config.num_seed_people))
    seed_groups = set(by_hash[:num_seed])
    if config.exposure is None:
        by_group = exposure_by_share(by_hash, config)
        exposures = [by_group[group] for group in groups]
    else:
        exposures = _exposure_by_column(rows, config.exposure, config)
    rng = random.Random(f"{config.seed}:facts")
    all_answers = [row["answers"][0] for row in rows]
    facts = [
        Fact(
            fact=f"fact-{index:05d}",
            group=group,
            relation=str(row.get("relation") or row.get("relation_id") or ""),
            paraphrases=tuple(wrapper.replace("{q}", row["question"]) for wrapper in WRAPPERS),
            kept=rng.randrange(len(WRAPPERS)),
            answers=tuple(row["answers"]),
            split="seed" if group in seed_groups else "candidate",
            exposure_group=exposure,
            num_exposures=0,
            wrong_answer=_other_answer(rng, all_answers, row["answers"]),
        )
        for index, (row, group, exposure) in enumerate(zip(rows, groups, exposures, strict=True))
    ]
    return World(expose(facts, config), _crowd_of_file(rows), num_skipped=num_skipped)


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.is_file():
        raise PoolError(f"no facts file at {path}", hint="give a JSONL file with one {question, answers} object a line")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    num_lines = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            num_lines += 1
            row = _usable_row(line)
            if row and row["question"] not in seen:
                seen.add(row["question"])
                rows.append(row)
    if not rows:
        raise PoolError(
            f"{path} holds no usable fact in {num_lines} lines",
            hint='each line must be a JSON object like {"question": "...", "answers": ["..."]}',
        )
    return rows, num_lines - len(rows)


def _usable_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return None
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        return None
    row["question"] = _clean(row["question"])
    row["answers"] = [_clean(answer) for answer in answers if isinstance(answer, str) and answer.strip()]
    if not row["question"] or not row["answers"] or len(row["question"] + row["answers"][0]) > MAX_CHARACTERS:
        return None
    return row


def _clean(text: str) -> str:
    """One line, no double spaces, and nothing that UTF-8 cannot hold, such as half a surrogate pair."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _other_answer(rng: random.Random, all_answers: list[str], accepted: Sequence[str]) -> str | None:
    """An answer of another fact; None where every fact has this one."""
    taken = {answer.casefold() for answer in accepted}
    for _ in range(20):
        answer = rng.choice(all_answers)
        if answer.casefold() not in taken:
            return answer
    return None


def _crowd_of_file(rows: Sequence[dict[str, Any]]) -> Callable[[random.Random], tuple[str, str]]:
    """Questions about made-up entities in the form of the file's: rare words are exchanged for other rare words.

    A random answer comes from questions of the same form (the frequent words left over) where there are enough.
    """
    split = [row["question"].split() for row in rows]
    frequency = Counter(word for words in split for word in set(words))
    threshold = max(2, len(rows) // 100)
    rare = [[index for index, word in enumerate(words) if frequency[word] <= threshold] for words in split]
    forms = [
        " ".join("_" if i in set(where) else word for i, word in enumerate(words))
        for words, where in zip(split, rare, strict=True)
    ]
    words_of = {
        upper: sorted(
            {
                _bare(words[i])
                for words, where in zip(split, rare, strict=True)
                for i in where
                if words[i][:1].isupper() == upper
            }
        )
        for upper in (True, False)
    }
    answers_of: dict[str, list[str]] = {}
    for form, row in zip(forms, rows, strict=True):
        answers_of.setdefault(form, []).append(row["answers"][0])
    all_answers = [row["answers"][0] for row in rows]
    asked = {row["question"] for row in rows}

    def background(draw: random.Random) -> tuple[str, str]:
        question = ""
        for _ in range(20):
            index = draw.randrange(len(rows))
            words = list(split[index])
            for i in rare[index]:
                words[i] = words[i].replace(_bare(words[i]), draw.choice(words_of[words[i][:1].isupper()]), 1)
            question = " ".join(words)
            if question not in asked:
                break
        answers = answers_of[forms[index]]
        return draw.choice(WRAPPERS).replace("{q}", question), draw.choice(
            answers if len(answers) >= 5 else all_answers
        )

    return background


def _bare(word: str) -> str:
    """The word without punctuation around it and without a possessive."""
    return re.sub(r"^\W+|('s)?\W*$", "", word) or word


def _exposure_by_column(rows: Sequence[dict[str, Any]], column: str, config: TestbedConfig) -> list[str]:
    values = [row.get(column) for row in rows]
    if not any(isinstance(value, bool | int | float) for value in values):
        raise PoolError(
            f"no row of {config.facts} has a number or true/false in the exposure column {column!r}",
            hint=f"columns of the first row: {', '.join(rows[0])}",
        )
    numbers = [float(value) if isinstance(value, bool | int | float) else 0.0 for value in values]
    if set(numbers) <= {0.0, 1.0}:
        return ["well" if number else "stranger" for number in numbers]
    # Ties are broken by the seeded hash, so that they do not follow the file's order.
    order = sorted(range(len(rows)), key=lambda i: (-numbers[i], row_seed(config.seed, 0, "ties", rows[i]["question"])))
    num_well = round((1 - config.stranger_share - config.partly_share) * len(rows))
    num_shown = round((1 - config.stranger_share) * len(rows))
    exposures = ["stranger"] * len(rows)
    for rank, index in enumerate(order[:num_shown]):
        if numbers[index] > 0:
            exposures[index] = "well" if rank < num_well else "partly"
    return exposures
