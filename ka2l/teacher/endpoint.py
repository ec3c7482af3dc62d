"""Asks a language model behind an OpenAI-compatible endpoint so that no answer is paid twice.

Every answer goes into a journal before anything else is done with it, usable or not. What the journal holds is never
asked again, after a kill neither. A request's ``Idempotency-Key`` is its journal key, so a gateway that honours it can
hand out an answer again that was cut on its way. Endpoints that do not may bill a request twice that was under way when
the process died or the line broke: at most ``concurrency`` of them a kill.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ka2l.errors import ConfigError, EngineError, KA2LError
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.faults import Fault, fault_of, redact, status_fault
from ka2l.teacher.limits import MoneyCap, RateLimit, backoff
from ka2l.teacher.reply import (
    Journal,
    SampleState,
    TeacherRun,
    answer_record,
    any_answered,
    distinct_states,
    finished_results,
    open_states,
    sample_states,
    unanswered_record,
    usage,
)
from ka2l.teacher.request import (
    TeacherPrompt,
    cost_bound,
    given_up_key,
    plain_key,
    prompt_tokens_bound,
    request_body,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

#: Prompts in a row without any answer, each tried ``max_retries`` times, after which the endpoint counts as down; and
#: prompts that are refused, where none was ever answered, after which it is the config that counts as wrong.
NUM_TO_BLAME_ENDPOINT = 3


def check_cap(config: TeacherConfig, cap: MoneyCap | None) -> MoneyCap:
    """The cap, or one without a limit; raises ConfigError where a limit is given and no price table."""
    if cap is not None and cap.limit is not None and config.prices is None:
        raise ConfigError("a cap on money needs the teacher's prices", hint="Set teacher.prices, per million tokens.")
    return cap or MoneyCap()


def count_paid(cap: MoneyCap, states: Mapping[str, Sequence[SampleState]]) -> None:
    """Count what the answers so far have cost, each once however often it is counted."""
    for state in distinct_states(states):
        for key, record in state.records:
            cap.count(key, record["cost"])


def refuses_all(config: TeacherConfig, num_refused: int, problem: str) -> ConfigError:
    """The error where every prompt was refused and none was ever answered."""
    return ConfigError(
        f"{config.base_url} refused all {num_refused} prompts; {problem}",
        hint="Correct what it says in annotator.teacher or at the endpoint, then resume: nothing was paid for.",
    )


class Teacher:
    """Asks prompts one request each, many at once.

    Args:
        api_key: the key itself; empty for endpoints that ask for none.
        journal: what was answered before, and where new answers go.
        cap: most money to spend; it may be shared and carries over from call to call.
        on_result: called with the number of prompts' samples that are done, after each.
    """

    def __init__(
        self,
        config: TeacherConfig,
        api_key: str,
        journal: Journal,
        cap: MoneyCap | None = None,
        on_result: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.api_key = api_key
        self.journal = journal
        self.cap = check_cap(config, cap)
        self.on_result = on_result
        self.has_answered = False
        """Whether the endpoint has answered anything so far, a kill ago included."""

    def ask(self, prompts: Mapping[str, TeacherPrompt]) -> TeacherRun:
        """Replies to prompts by id; what the journal holds is not asked. Not for use inside an event loop.

        Raises:
            ConfigError: the endpoint refuses the key or every prompt, or knows no such model.
            BudgetError: the account at the endpoint has no money left.
            EngineError: the endpoint is down. After each of these, asking again goes on where it ended.
        """
        return asyncio.run(self.ask_async(prompts))

    async def ask_async(self, prompts: Mapping[str, TeacherPrompt]) -> TeacherRun:
        """:meth:`ask` inside an event loop."""
        states = sample_states(self.config, prompts, self.journal)
        count_paid(self.cap, states)
        self.has_answered = self.has_answered or any_answered(states)
        todo = open_states(states)
        asking = _SampleWorkers(self, todo)
        if todo:
            await asking.work()
        return TeacherRun(finished_results(states), asking.stopped, asking.num_requests, usage(states))


class _SampleWorkers:
    """One call of :meth:`Teacher.ask`: workers that take samples from one list."""

    def __init__(self, teacher: Teacher, states: list[SampleState]) -> None:
        self.teacher = teacher
        self.config = teacher.config
        self.journal = teacher.journal
        self.cap = teacher.cap
        self.api_key = teacher.api_key
        self.on_result = teacher.on_result
        self.states = states
        self.plain = self.journal.get(plain_key(self.config)) is not None
        self.stopped: str | None = None
        self.error: KA2LError | None = None
        self.num_requests = 0
        self.num_done = 0
        self.failed_in_row: set[str] = set()
        self.refused: list[tuple[str, SampleState]] = []
        """Samples that the endpoint refuses, with the key of the try; not in the journal yet."""
        names = {given_up_key(self.config, state.prompt) for state in states}
        self.num_prompts = len(names)
        self.given_up_before = {name for name in names if self.journal.get(name) is not None}
        self.limits = (RateLimit(self.config.requests_per_minute), RateLimit(self.config.tokens_per_minute))
        self.settled = asyncio.Condition()

    @property
    def halted(self) -> bool:
        return self.error is not None or self.stopped is not None

    async def work(self) -> None:
        from openai import AsyncOpenAI

        num_workers = min(self.config.concurrency, len(self.states))
        async with AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self.api_key or "none",
            max_retries=0,
            timeout=self.config.timeout_s,
        ) as client:
            states = iter(self.states)
            ended = await asyncio.gather(
                *(self._worker(client, states) for _ in range(num_workers)), return_exceptions=True
            )
        for outcome in ended:
            if isinstance(outcome, BaseException):
                raise outcome
        if self.error is None and self.stopped is None:
            await self._judge_refusals()
        if self.error is not None:
            raise self.error

    async def _worker(self, client: AsyncOpenAI, states: Iterator[SampleState]) -> None:
        # Where one worker stops the run, the others end the request they are at: its answer is paid for.
        try:
            for state in states:
                while not self.halted and state.result() is None:
                    await self._try(client, state)
                if self.halted:
                    return
                self.num_done += 1
                if self.on_result is not None:
                    self.on_result(self.num_done)
        except Exception:
            self.stopped = "fault"
            raise
        finally:
            async with self.settled:
                self.settled.notify_all()

    async def _try(self, client: AsyncOpenAI, state: SampleState) -> None:
        """Send one try of a sample until an answer arrives; the answer is in the journal on return."""
        plain = self.plain
        key, body = state.key(plain), request_body(self.config, state.prompt, plain)
        bound = cost_bound(self.config, body)
        for num_faults in range(1, self.config.max_retries + 2):
            await self._wait_turn(body)
            if not await self._reserve(bound):
                return
            fault: Fault | None = None
            try:
                self.num_requests += 1
                received, fault = await self._post(client, key, body)
                if fault is None:
                    record = answer_record(self.config, state.prompt, body, received, state.prompt_id)
                    await asyncio.to_thread(self.journal.put, key, record)
                    self.cap.count(key, record["cost"])
            finally:
                await self._release(bound, lost=fault is not None and fault.maybe_billed)
            if fault is None:
                state.records.append((key, record))
                self.failed_in_row.clear()
                if not self.teacher.has_answered:
                    self.teacher.has_answered = True
                    await self._keep_refusals()
                return
            if fault.refuses_schema and not plain and state.prompt.answer is not None:
                state.num_faults += 1
                await self._fall_back()
                return
            if fault.fatal is not None:
                self.error = self.error or fault.fatal
                return
            if not fault.retryable:
                await self._refuse(key, state, fault)
                return
            state.num_faults += 1
            if num_faults > self.config.max_retries:
                await self._give_up(state, fault)
                return
            await self._wait_after(fault, num_faults)

    async def _reserve(self, bound: float) -> bool:
        """Set money aside for one request; False where no request may be sent any more."""
        async with self.settled:
            # A request under way costs less than its bound, as a rule: what it gives back may be enough.
            while not self.halted and not self.cap.reserve(bound):
                if self.cap.reserved == 0:
                    self.stopped = "money"
                    self.settled.notify_all()
                else:
                    await self.settled.wait()
            return not self.halted

    async def _release(self, bound: float, lost: bool) -> None:
        async with self.settled:
            self.cap.release(bound, lost=lost)
            self.settled.notify_all()

    async def _post(self, client: AsyncOpenAI, key: str, body: dict[str, Any]) -> tuple[Any, Fault | None]:
        """The response's JSON object, or its text where that is none; or the fault."""
        from openai import OpenAIError

        try:
            async with asyncio.timeout(self.config.timeout_s):
                raw = await client.chat.completions.with_raw_response.create(
                    **body, extra_headers={"Idempotency-Key": key}
                )
            text = raw.http_response.text
        except (OpenAIError, TimeoutError) as error:
            return None, fault_of(error, self.config, self.api_key)
        try:
            received = json.loads(text)
        except ValueError:
            return text, None
        if not isinstance(received, dict):
            return text, None
        if isinstance(error_body := received.get("error"), dict) and not received.get("choices"):
            # Some gateways report the failure of a provider behind them with status 200.
            status = error_body["code"] if isinstance(error_body.get("code"), int) else 500
            return None, status_fault(status, error_body, redact(json.dumps(error_body), self.api_key), self.config)
        return received, None

    async def _wait_turn(self, body: dict[str, Any]) -> None:
        now = asyncio.get_running_loop().time()
        requests, tokens = self.limits
        waits = requests.reserve(1, now), tokens.reserve(prompt_tokens_bound(body) + self.config.max_tokens, now)
        if max(waits) > 0:
            await asyncio.sleep(max(waits))

    async def _wait_after(self, fault: Fault, num_faults: int) -> None:
        asked = fault.wait_s or 0.0
        if asked > self.config.max_retry_after_s:
            self.error = self.error or EngineError(
                f"{self.config.base_url} asks to wait {asked:.0f} s: {fault.reason}",
                hint="Resume later; answers received so far are kept.",
            )
            return
        if asked:
            self.limits[0].pause(asyncio.get_running_loop().time() + asked)
        await asyncio.sleep(asked + backoff(num_faults, self.config.backoff_base_s, self.config.backoff_cap_s))

    async def _fall_back(self) -> None:
        if not self.plain:
            self.plain = True
            await asyncio.to_thread(self.journal.put, plain_key(self.config), {"response_format": "refused"})

    async def _refuse(self, key: str, state: SampleState, fault: Fault) -> None:
        """Not asked again: the journal holds the refusal, once it is known that the endpoint answers others."""
        reason = f"the endpoint refuses the request: {fault.reason}"
        state.records.append((key, unanswered_record(state.prompt, reason, state.prompt_id, final=True)))
        self.refused.append((key, state))
        if self.teacher.has_answered:
            await self._keep_refusals()

    async def _keep_refusals(self) -> None:
        kept, self.refused = self.refused, []
        for key, state in kept:
            await asyncio.to_thread(self.journal.put, key, state.records[-1][1])

    async def _judge_refusals(self) -> None:
        """Where the endpoint has refused all and answered nothing, a wrong setting is likelier than wrong prompts; what
        is refused then is not for ever."""
        num_refused = len({state.prompt.sha256() for _, state in self.refused})
        if num_refused >= NUM_TO_BLAME_ENDPOINT:
            self.error = refuses_all(self.config, num_refused, self.refused[0][1].records[-1][1]["problem"])
        else:
            await self._keep_refusals()

    async def _give_up(self, state: SampleState, fault: Fault) -> None:
        """The prompt is refused, unless no other fares better: then it is the endpoint that is at fault. A prompt that
        an earlier run has given up is refused all the same, or it would end every run."""
        state.refusal = f"no answer after {self.config.max_retries + 1} tries: {fault.reason}"
        name = given_up_key(self.config, state.prompt)
        self.failed_in_row.add(name)
        if fault.received:
            if name in self.given_up_before:
                return
            await asyncio.to_thread(self.journal.put, name, {"given_up": state.refusal})
        if len(self.failed_in_row) >= min(NUM_TO_BLAME_ENDPOINT, self.num_prompts):
            self.error = self.error or EngineError(
                f"the teacher at {self.config.base_url} gives no answers: {fault.reason}",
                hint="Resume when it is up again; answers received so far are kept.",
            )
