"""Leases questions to browsers, so that no two people answer the same one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from engine.annotation.answers import AnswerStore
from ka2l.annotation.people import HumanAnswer, Task


class TakenError(Exception):
    """Somebody else answered the question first."""


class Progress(NamedTuple):
    """How far all people together are."""

    num_done: int
    """Questions answered or skipped by anybody."""
    num_total: int
    num_mine: int
    """Those among them by the person who asks."""


class TaskQueue:
    """Hands out questions in their order. A browser is a session; who sits at it is the annotator."""

    def __init__(
        self,
        tasks: Sequence[Task],
        store: AnswerStore,
        lease_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes up where the store ends.

        Args:
            tasks: what is asked; ids are unique.
            store: where answers go; answers to other questions than these play no part.
            lease_s: seconds for which a question that was handed out is kept from other browsers.
            clock: seconds, for the leases.
        """
        self.tasks = {task.question_id: task for task in tasks}
        self._store = store
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, tuple[str, float]] = {}
        #: Who answered: the annotator, and the session where it was one since this start.
        self._owners: dict[str, tuple[str, str | None]] = {
            answer.question_id: (answer.annotator, None)
            for answer in store.answers()
            if answer.question_id in self.tasks
        }

    def next(self, session: str) -> Task | None:
        """The question that the session holds, else the first free one, leased to it; None where none is free."""
        with self._lock:
            now = self._clock()
            leased = {q: owner for q, (owner, until) in self._leases.items() if until > now and q not in self._owners}
            held = next((q for q, owner in leased.items() if owner == session), None)
            free = held or next((q for q in self.tasks if q not in self._owners and q not in leased), None)
            if free is None:
                return None
            self._leases[free] = (session, now + self._lease_s)
            return self.tasks[free]

    def save(self, session: str, annotator: str, question_id: str, answers: list[str], skipped: bool) -> None:
        """Returns once the answer is on disk. The same answer sent again is acknowledged and not written again.

        Raises:
            KeyError: no such question is asked.
            TakenError: another session or person answered it.
            StorageFullError: no space is left.
        """
        with self._lock:
            if question_id not in self.tasks:
                raise KeyError(question_id)
            owner, its_session = self._owners.get(question_id, (annotator, None))
            if owner != annotator or its_session not in (None, session):
                raise TakenError(question_id)
            said = HumanAnswer(question_id, answers, annotator, datetime.now(UTC), skipped)
            before = next((row for row in self._of(annotator) if row.question_id == question_id), None)
            if before is None or (before.answers, before.skipped) != (answers, skipped):
                self._store.append(said)
            self._owners[question_id] = (annotator, session)
            self._leases.pop(question_id, None)

    def before(self, session: str, annotator: str, question_id: str | None) -> HumanAnswer | None:
        """What the person answered before the given question, or last where they have not answered that one.

        Answers that the same name gave in another browser since this start are left to that browser.
        """
        with self._lock:
            mine = [row for row in self._of(annotator) if self._owners[row.question_id][1] in (None, session)]
            at = next((i for i, row in enumerate(mine) if row.question_id == question_id), len(mine))
            return mine[at - 1] if at else None

    def progress(self, annotator: str) -> Progress:
        """How far everybody is, and the annotator alone."""
        with self._lock:
            return Progress(len(self._owners), len(self.tasks), sum(a == annotator for a, _ in self._owners.values()))

    def _of(self, annotator: str) -> list[HumanAnswer]:
        return [
            row
            for row in self._store.answers()
            if row.annotator == annotator and self._owners.get(row.question_id, ("",))[0] == annotator
        ]
