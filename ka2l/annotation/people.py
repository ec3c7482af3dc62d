"""Tasks and answers of people, and the rule that joins the answers of several people to one question.

The files that people work in are read and written in :mod:`ka2l.annotation.task_files`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from datetime import datetime
from itertools import combinations
from typing import NamedTuple

from ka2l.annotation.annotator import Annotation
from ka2l.answers.equivalence import Equivalence
from ka2l.answers.normalise import surface_key


class Task(NamedTuple):
    """One question for a person, with what the model made of it."""

    question_id: str
    question: str
    own_answers: list[tuple[str, int]]
    """The model's distinct sampled answers and how often each came, most frequent first."""
    p_unknown: float | None
    """Calibrated probability that the model does not know; None where the probe did not see the question."""
    semantic_entropy: float | None
    """Of the model's sampled answers, in nats; None where none were sampled."""


class HumanAnswer(NamedTuple):
    """What one person said to one question."""

    question_id: str
    answers: list[str]
    """Accepted answers, the preferred one first; empty where ``skipped``."""
    annotator: str
    """The person's name."""
    answered_at: datetime
    """When, with a time zone (UTC)."""
    skipped: bool
    """The person cannot answer."""


class Place(NamedTuple):
    """Where an answer was read."""

    source: str
    """File name; empty for answers that come from no file."""
    line: int
    """Line of the file; in Label Studio's list the position of the task; from 1."""


class Problem(NamedTuple):
    """A row that was not used."""

    place: Place
    question_id: str | None
    """None where the row names none."""
    reason: str


class Conflict(NamedTuple):
    """A question whose annotators do not mean the same; it is left out of the annotations."""

    question_id: str
    question: str
    answers: list[HumanAnswer]
    """One a person, in the order of time."""


class Agreement(NamedTuple):
    """How often two people who answered the same question meant the same. Skipped questions play no part."""

    num_questions: int
    """Questions that two or more people answered."""
    num_pairs: int
    """Pairs of people over those questions."""
    share: float | None
    """Share of the pairs that mean the same, 0 to 1; None without a pair."""
    alpha: float | None
    """Krippendorff's alpha, nominal; see :func:`krippendorff_alpha`."""

    def __str__(self) -> str:
        if self.share is None:
            return "agreement: no question was answered by two people"
        corrected = "undefined: all gave one answer" if self.alpha is None else f"{self.alpha:.2f}"
        return (
            f"agreement: {self.share:.0%} of {self.num_pairs} pairs on {self.num_questions} questions; "
            f"corrected for chance (Krippendorff's alpha, nominal): {corrected}"
        )


class Merged(NamedTuple):
    """What people's answers come to."""

    annotations: list[Annotation]
    """One a settled question, in the order of the tasks."""
    skipped: list[str]
    """Ids of questions that somebody could not answer and nobody answered."""
    conflicts: list[Conflict]
    problems: list[Problem]
    """Rows that were not used, in the order given."""
    missing: list[str]
    """Ids of questions without any usable row."""
    agreement: Agreement


def merge(
    tasks: Sequence[Task],
    answers: Sequence[HumanAnswer],
    equivalence: Equivalence,
    places: Sequence[Place] | None = None,
) -> Merged:
    """Turn people's answers into annotations.

    Args:
        tasks: what was asked; ids are unique.
        answers: what came back, from any number of people, in any order.
        equivalence: decides whether two people mean the same; asked once, with all pairs together.
        places: where each answer was read, for the problems; without it, lines count the answers from 1.

    Of several rows of one person to one question the latest counts (of equally late ones the last). A question that
    one person skipped and another answered is answered. People agree where the preferred answer of one means the same
    as any accepted answer of the other; the first person to agree with another shares their cluster, as in
    :func:`ka2l.answers.clustering.cluster_answers`, and a question with two clusters is a conflict. The annotation of
    people who agree has all their answers and their names, joined by commas, earliest first.
    """
    usable, problems = _usable(tasks, answers, places or [Place("", i + 1) for i in range(len(answers))])
    question_of = {task.question_id: task.question for task in tasks}
    given = {q: [row for row in rows if not row.skipped] for q, rows in usable.items()}
    clusters = _clusters(question_of, given, equivalence)
    conflicts = [Conflict(q, question_of[q], given[q]) for q in question_of if len(set(clusters.get(q, []))) > 1]
    in_conflict = {conflict.question_id for conflict in conflicts}
    return Merged(
        annotations=[_joined(question_of[q], given[q]) for q in question_of if given.get(q) and q not in in_conflict],
        skipped=[q for q in question_of if usable.get(q) and not given[q]],
        conflicts=conflicts,
        problems=problems,
        missing=[q for q in question_of if not usable.get(q)],
        agreement=_agreement(given, clusters),
    )


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 is perfect agreement, 0 what chance gives.

    Args:
        units: for every unit the values that its coders gave; units with fewer than two play no part.

    Returns:
        alpha, or None where it is undefined: without two values of one unit, or where all values are the same.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C,
    https://repository.upenn.edu/handle/20.500.14332/2089
    """
    paired = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[Hashable] = sum(paired, Counter())
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum((u.total() ** 2 - sum(c * c for c in u.values())) / (u.total() - 1) for u in paired)
    return 1 - (n - 1) * observed / expected


def _usable(
    tasks: Sequence[Task], answers: Sequence[HumanAnswer], places: Sequence[Place]
) -> tuple[dict[str, list[HumanAnswer]], list[Problem]]:
    """Rows that count by question id, in the order of time, and why the others do not."""
    asked = {task.question_id for task in tasks}
    reasons: dict[int, str] = {}
    latest: dict[tuple[str, str], int] = {}
    for i in sorted(range(len(answers)), key=lambda i: answers[i].answered_at):
        row = answers[i]
        if row.question_id not in asked:
            reasons[i] = "unknown question_id: no such question was asked"
        elif not row.skipped and not any(map(surface_key, row.answers)):
            reasons[i] = "empty answer: nothing but white space and punctuation"
        else:
            earlier = latest.get((row.question_id, row.annotator))
            latest[row.question_id, row.annotator] = i
            if earlier is not None:
                same = (row.answers, row.skipped) == (answers[earlier].answers, answers[earlier].skipped)
                how = "duplicate of" if same else "replaced by"
                where = f"{places[i].source} line {places[i].line}".strip()
                reasons[earlier] = f"{how} what {row.annotator} says in {where}"
    problems = [Problem(places[i], answers[i].question_id or None, reasons[i]) for i in sorted(reasons)]
    usable: dict[str, list[HumanAnswer]] = {}
    for i in sorted(latest.values(), key=lambda i: answers[i].answered_at):
        row = answers[i]
        kept = [] if row.skipped else [answer for answer in row.answers if surface_key(answer)]
        usable.setdefault(row.question_id, []).append(row._replace(answers=kept))
    return usable, problems


def _clusters(
    question_of: dict[str, str], given: dict[str, list[HumanAnswer]], equivalence: Equivalence
) -> dict[str, list[int]]:
    """For every question the cluster of each person's answer: the first person whose answer means the same."""
    asked: list[tuple[str, int, int, str, str]] = []
    for q, rows in given.items():
        for (i, a), (j, b) in combinations(enumerate(rows), 2):
            pairs = [(b.answers[0], text) for text in a.answers] + [(text, a.answers[0]) for text in b.answers]
            asked += [(q, i, j, left, right) for left, right in dict.fromkeys(pairs)]
    verdicts = equivalence.equivalent([question_of[q] for q, *_ in asked], [p[3] for p in asked], [p[4] for p in asked])
    agree = {(q, i, j) for (q, i, j, _, _), same in zip(asked, verdicts, strict=True) if same}
    clusters: dict[str, list[int]] = {}
    for q, rows in given.items():
        clusters[q] = []
        for j in range(len(rows)):
            representatives = dict.fromkeys(clusters[q])
            clusters[q].append(next((i for i in representatives if (q, i, j) in agree), j))
    return clusters


def _agreement(given: dict[str, list[HumanAnswer]], clusters: dict[str, list[int]]) -> Agreement:
    several = {q: rows for q, rows in given.items() if len(rows) > 1}
    pairs = [a == b for q in several for a, b in combinations(clusters[q], 2)]
    # What chance would give is read off the answers of all questions: a cluster goes by its first answer's text.
    values = [[surface_key(rows[i].answers[0]) for i in clusters[q]] for q, rows in several.items()]
    share = sum(pairs) / len(pairs) if pairs else None
    return Agreement(len(several), len(pairs), share, krippendorff_alpha(values))


def _joined(question: str, rows: list[HumanAnswer]) -> Annotation:
    texts: dict[str, str] = {}
    for text in (text for row in rows for text in row.answers):
        texts.setdefault(surface_key(text), text)
    return Annotation(
        question_id=rows[0].question_id,
        question=question,
        answers=list(texts.values()),
        annotator=", ".join(row.annotator for row in rows),
        annotated_at=rows[-1].answered_at,
        prompt_sha256=None,
        cost=0.0,
    )
