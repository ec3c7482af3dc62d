"""Asks a teacher that runs on the run's own machines, with the prompts, journal and keys of an endpoint.

What generates is handed in as a function, so this module knows no engine. A reply's random seed is made from its
journal key: where and in which order a request is worked on does not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from ka2l.seeds import row_seed
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import check_cap, count_paid
from ka2l.teacher.limits import MoneyCap
from ka2l.teacher.reply import (
    Journal,
    SampleState,
    TeacherRun,
    answer_record,
    finished_results,
    open_states,
    sample_states,
    unanswered_record,
    usage,
)
from ka2l.teacher.request import TeacherPrompt, cost_bound, request_body


class ChatRequest(NamedTuple):
    """One reply wanted of a local model."""

    body: Mapping[str, Any]
    """As for ``/chat/completions``."""
    seed: int
    """What its random numbers derive from."""


#: Requests -> (their position, a chat completion as an endpoint would send it), in the order they end; in place of a
#: completion ``{"error": {"message": ...}}`` for a prompt that the model cannot take.
Complete = Callable[[Sequence[ChatRequest]], Generator[tuple[int, Mapping[str, Any]]]]


class LocalTeacher:
    """Asks prompts of a local model, all at once.

    Args:
        config: ``model`` is the name in provenance and keys; what concerns an endpoint is left aside.
        complete: generates.
        journal: what was answered before, and where new replies go, each as it comes.
        cap: most money to spend, where the config has prices.
        plain: the schema is written into the prompt: for engines that cannot hold a model to one.
        run_seed: the run's.
    """

    def __init__(
        self,
        config: TeacherConfig,
        complete: Complete,
        journal: Journal,
        cap: MoneyCap | None = None,
        *,
        plain: bool = False,
        run_seed: int = 0,
    ) -> None:
        # A greedy reply that cannot be used would come again.
        self.config = config.model_copy(update={"max_malformed": 0}) if config.temperature == 0 else config
        self.complete = complete
        self.journal = journal
        self.cap = check_cap(config, cap)
        self.plain = plain
        self.run_seed = run_seed

    def ask(self, prompts: Mapping[str, TeacherPrompt]) -> TeacherRun:
        """Replies to prompts by id; what the journal holds is not generated again.

        Raises:
            KA2LError: as ``complete`` does; asking again goes on where it ended.
        """
        states = sample_states(self.config, prompts, self.journal)
        count_paid(self.cap, states)
        stopped, num_requests = None, 0
        while stopped is None and (todo := open_states(states)):
            num_asked = self._ask_once(todo)
            num_requests += num_asked
            stopped = "money" if num_asked == 0 else None
        return TeacherRun(finished_results(states), stopped, num_requests, usage(states))

    def _ask_once(self, states: Sequence[SampleState]) -> int:
        """One try of each sample that fits under the cap; returns how many were asked."""
        asked: list[tuple[SampleState, str, ChatRequest]] = []
        bounds: list[float] = []
        for state in states:
            key, body = state.key(self.plain), request_body(self.config, state.prompt, self.plain)
            bound = cost_bound(self.config, body)
            if not self.cap.reserve(bound):
                break
            bounds.append(bound)
            asked.append((state, key, ChatRequest(body, row_seed(self.run_seed, 0, "annotate", key))))
        try:
            # Closed at once where a record cannot be written: engines then work on nothing that is thrown away.
            with closing(self.complete([request for *_, request in asked])) as replies:
                for index, received in replies:
                    state, key, request = asked[index]
                    record = self._record(state, request, received)
                    self.journal.put(key, record)
                    self.cap.count(key, record["cost"])
                    state.records.append((key, record))
        finally:
            for bound in bounds:
                self.cap.release(bound)
        return len(asked)

    def _record(self, state: SampleState, request: ChatRequest, received: Mapping[str, Any]) -> dict[str, Any]:
        if "error" in received:
            reason = f"{self.config.model} cannot take the prompt: {received['error']['message']}"
            return unanswered_record(state.prompt, reason, state.prompt_id, final=True)
        return answer_record(self.config, state.prompt, request.body, received, state.prompt_id)
