"""Reads a teacher's replies from the journal, and finds what is still to be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.request import TeacherPrompt, prompt_tokens_bound, request_key


class Journal(Protocol):
    """A durable memory of what was paid for. Values are JSON objects."""

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The last record put under the key, or None."""

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Store a record; returns only after it is durable. Called from several threads."""


class UnusableError(ValueError):
    """A reply was received that cannot be used. ``final``: asking again would bring nothing else."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class SampleResult(NamedTuple):
    """One sample of one prompt."""

    parsed: Any
    """A model of ``TeacherPrompt.answer``, or the text; None where refused."""
    refusal: str | None
    """Why there is no usable reply."""
    num_prompt_tokens: int
    """Over all tries, as are the next two. All three are 0 where another prompt id paid for the same text."""
    num_completion_tokens: int
    cost: float
    """Money, in the currency of the price table."""
    num_tries: int
    """Requests that were sent for it."""
    answered_at: datetime | None
    """When the last reply was received."""


class TeacherResult(NamedTuple):
    """All samples of one prompt."""

    samples: list[SampleResult]
    prompt_sha256: str

    @property
    def usable(self) -> list[Any]:
        """The parsed replies."""
        return [sample.parsed for sample in self.samples if sample.refusal is None]

    @property
    def refusal(self) -> str | None:
        """Why no sample is usable, or None."""
        return None if self.usable else self.samples[0].refusal

    @property
    def cost(self) -> float:
        """Money for all samples, unusable ones included."""
        return sum(sample.cost for sample in self.samples)

    @property
    def num_tries(self) -> int:
        """Requests sent for all samples."""
        return sum(sample.num_tries for sample in self.samples)

    @property
    def answered_at(self) -> datetime | None:
        """When the last reply was received."""
        return max((sample.answered_at for sample in self.samples if sample.answered_at), default=None)


class Usage(NamedTuple):
    """What a set of prompts has taken, whenever it was asked, each journalled answer once: usable or not, and those of
    prompts that were not asked to the end. Answers that a prompt outside the set has paid for are not counted."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    cost: float = 0.0
    """Money, in the currency of the price table."""

    def cost_items(self) -> dict[str, float]:
        """The same under the names of the ledger's items."""
        return {
            "money": self.cost,
            "tokens_prompt": float(self.num_prompt_tokens),
            "tokens_generated": float(self.num_completion_tokens),
        }


class TeacherRun(NamedTuple):
    """What came of asking a set of prompts."""

    results: dict[str, TeacherResult]
    """By prompt id, in the order asked. Prompts that were not asked to the end are left out."""
    stopped: str | None
    """``money`` where the cap let no further request through, else None."""
    num_requests: int
    """Requests sent; 0 where the journal held everything."""
    usage: Usage = Usage()
    """Of all prompts."""


def answer_record(
    config: TeacherConfig,
    prompt: TeacherPrompt,
    body: Mapping[str, Any],
    received: Mapping[str, Any] | str,
    prompt_id: str,
) -> dict[str, Any]:
    """What the journal keeps of a received answer, usable or not.

    Args:
        body: what was sent.
        received: the response's JSON object, or its text where that is none.
        prompt_id: whose cost it is. Others with the same text get the answer for nothing.

    Tokens that the endpoint does not report are taken at their upper bound, as ``usage_estimated`` says.
    """
    envelope: Mapping[str, Any] = {} if isinstance(received, str) else received
    choices = envelope.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    message = choice.get("message")
    message = message if isinstance(message, Mapping) else {}
    usage = envelope.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    num_prompt, num_completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    estimated = not (isinstance(num_prompt, int) and isinstance(num_completion, int))
    if estimated:
        num_prompt, num_completion = prompt_tokens_bound(body), config.max_tokens
    content, refusal = message.get("content"), message.get("refusal")
    return {
        "content": content if isinstance(content, str) else None,
        "finish_reason": choice.get("finish_reason"),
        "refusal": refusal if isinstance(refusal, str) else None,
        "problem": None if message else f"not a chat completion: {_cut(received)}",
        "model": envelope.get("model"),
        "prompt_sha256": prompt.sha256(),
        "prompt_id": prompt_id,
        "num_prompt_tokens": num_prompt,
        "num_completion_tokens": num_completion,
        "usage_estimated": estimated,
        "cost": config.cost(float(num_prompt or 0), float(num_completion or 0)),
        "answered_at": _now(),
    }


def unanswered_record(prompt: TeacherPrompt, problem: str, prompt_id: str, *, final: bool = False) -> dict[str, Any]:
    """What the journal keeps of a try that ended for good without an answer and without a bill. ``final``: asking again
    would bring nothing else."""
    return {
        "content": None,
        "finish_reason": None,
        "refusal": None,
        "problem": problem,
        "final": final,
        "model": None,
        "prompt_sha256": prompt.sha256(),
        "prompt_id": prompt_id,
        "num_prompt_tokens": 0,
        "num_completion_tokens": 0,
        "usage_estimated": False,
        "cost": 0.0,
        "answered_at": _now(),
    }


def parse_record(prompt: TeacherPrompt, record: Mapping[str, Any]) -> Any:
    """The usable reply in a journal record; raises UnusableError."""
    if record.get("problem"):
        raise UnusableError(record["problem"], final=record.get("final", False))
    if record["refusal"]:
        raise UnusableError(f"the teacher refused: {_cut(record['refusal'])}", final=True)
    if record["finish_reason"] == "content_filter":
        raise UnusableError("stopped by the endpoint's content filter", final=True)
    if record["finish_reason"] == "length":
        raise UnusableError("cut off at max_tokens")
    content = (record["content"] or "").strip()
    if not content:
        raise UnusableError("an empty reply")
    if prompt.answer is None:
        return content
    try:
        return prompt.answer.model_validate_json(_json_object(content))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise UnusableError(f"not the JSON asked for: {problem['msg']}") from error


def _json_object(text: str) -> str:
    """The JSON object in a reply, without the reasoning and code fences that some models put around it."""
    text = re.sub(r"^.*</think>", "", text, flags=re.DOTALL)
    start, end = text.find("{"), text.rfind("}")
    return text[start : end + 1] if 0 <= start < end else text


class SampleState:
    """One sample of one prompt: the answers in the journal, one a try, and what follows from them."""

    def __init__(self, config: TeacherConfig, prompt: TeacherPrompt, sample: int, prompt_id: str) -> None:
        self.config = config
        self.prompt = prompt
        self.sample = sample
        self.prompt_id = prompt_id
        """The first prompt id of this text: whose cost a new answer is."""
        self.records: list[tuple[str, Mapping[str, Any]]] = []
        """Journal key and record of each try so far."""
        self.num_faults = 0
        """Requests that brought no answer."""
        self.refusal: str | None = None
        """Why no answer can be had."""

    def load(self, journal: Journal) -> None:
        """Read the tries that the journal holds."""
        forms = (False, True) if self.prompt.answer is not None else (False,)
        while self.result() is None:
            keys = [self.key(plain) for plain in forms]
            found = next(((key, record) for key in keys if (record := journal.get(key)) is not None), None)
            if found is None:
                return
            self.records.append(found)

    def key(self, plain: bool) -> str:
        """Journal key of the next try."""
        return request_key(self.config, self.prompt, self.sample, len(self.records), plain)

    def result(self, prompt_id: str | None = None) -> SampleResult | None:
        """The outcome, or None while there is something left to ask.

        Args:
            prompt_id: count tokens and cost that are this prompt id's; None counts all.
        """
        parsed, refusal = None, self.refusal
        if self.records and refusal is None:
            try:
                parsed = parse_record(self.prompt, self.records[-1][1])
            except UnusableError as error:
                if not error.final and len(self.records) <= self.config.max_malformed:
                    return None
                refusal = str(error) if error.final else f"{len(self.records)} unusable replies, the last {error}"
        elif refusal is None:
            return None
        records = [record for _, record in self.records]
        own = [record for record in records if prompt_id in (None, record.get("prompt_id", self.prompt_id))]
        return SampleResult(
            parsed=parsed,
            refusal=refusal,
            num_prompt_tokens=sum(record["num_prompt_tokens"] for record in own),
            num_completion_tokens=sum(record["num_completion_tokens"] for record in own),
            cost=sum(record["cost"] for record in own),
            num_tries=len(records) + self.num_faults,
            answered_at=datetime.fromisoformat(records[-1]["answered_at"]) if records else None,
        )


def sample_states(
    config: TeacherConfig, prompts: Mapping[str, TeacherPrompt], journal: Journal
) -> dict[str, list[SampleState]]:
    """Every sample of every prompt as the journal knows it. Prompts of the same text share their states: they are
    asked, and paid, once, and the cost is that of the id that was asked first."""
    by_text: dict[str, list[SampleState]] = {}
    states = {}
    for prompt_id, prompt in prompts.items():
        text = prompt.sha256()
        if text not in by_text:
            by_text[text] = [SampleState(config, prompt, sample, prompt_id) for sample in range(config.num_samples)]
            for state in by_text[text]:
                state.load(journal)
        states[prompt_id] = by_text[text]
    return states


def any_answered(states: Mapping[str, Sequence[SampleState]]) -> bool:
    """Whether the journal holds any reply to these prompts, usable or not."""
    records = (record for state in distinct_states(states) for _, record in state.records)
    return any(record["num_completion_tokens"] > 0 for record in records)


def distinct_states(states: Mapping[str, Sequence[SampleState]]) -> list[SampleState]:
    """Every sample once, in order: prompts of the same text share theirs."""
    return list({id(state): state for samples in states.values() for state in samples}.values())


def open_states(states: Mapping[str, Sequence[SampleState]]) -> list[SampleState]:
    """The distinct samples that are still to be asked, in order."""
    return [state for state in distinct_states(states) if state.result() is None]


def usage(states: Mapping[str, Sequence[SampleState]]) -> Usage:
    """What the answers so far have taken."""
    records = [
        record
        for state in distinct_states(states)
        for _, record in state.records
        if record.get("prompt_id", state.prompt_id) in states
    ]
    return Usage(
        sum(record["num_prompt_tokens"] for record in records),
        sum(record["num_completion_tokens"] for record in records),
        sum(record["cost"] for record in records),
    )


def finished_results(states: Mapping[str, Sequence[SampleState]]) -> dict[str, TeacherResult]:
    """Results of the prompts whose samples are all done."""
    results = {}
    for prompt_id, samples in states.items():
        done = [result for state in samples if (result := state.result(prompt_id)) is not None]
        if len(done) == len(samples):
            results[prompt_id] = TeacherResult(done, samples[0].prompt.sha256())
    return results


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _cut(value: Any, length: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[:length] + " ..."
