"""One request to a teacher: its prompt, its body and its journal key.

All of it is values in, values out; the live path (:mod:`ka2l.teacher.endpoint`), the batch path
(:mod:`ka2l.teacher.batch`) and the local one (:mod:`ka2l.teacher.local`) share it, so an answer received on one is
known to the others. What comes back is in :mod:`ka2l.teacher.reply`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from ka2l.prompts import json_instruction
from ka2l.teacher.config import TeacherConfig

#: Tokens that a chat template adds around a message, at most.
_TOKENS_PER_MESSAGE = 8


class ShortAnswer(BaseModel):
    """What the annotator wants of a teacher."""

    model_config = ConfigDict(extra="forbid", strict=True)

    answers: list[str]
    abstain: bool

    @model_validator(mode="after")
    def _says_something(self) -> ShortAnswer:
        if not self.abstain and not any(answer.strip() for answer in self.answers):
            raise ValueError("no answers, and not abstained")
        return self


class TeacherPrompt(NamedTuple):
    """One thing to ask."""

    messages: Sequence[Mapping[str, str]]
    """``{"role": ..., "content": ...}`` each."""
    answer: type[BaseModel] | None = None
    """What the reply must be: a pydantic model, sent as a JSON schema; None for free text. Fields of a model need
    ``extra="forbid"`` and no defaults to suit strict endpoints."""

    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the reply."""
        return None if self.answer is None else _schema(self.answer)

    def sha256(self) -> str:
        """Hash of messages and schema."""
        return _sha256({"messages": [dict(message) for message in self.messages], "schema": self.schema()})


def request_body(config: TeacherConfig, prompt: TeacherPrompt, plain: bool) -> dict[str, Any]:
    """The body for ``/chat/completions``. ``plain``: the schema is written into the prompt, not ``response_format``."""
    messages = [dict(message) for message in prompt.messages]
    body: dict[str, Any] = {"model": config.model, "messages": messages, config.token_limit_field: config.max_tokens}
    if config.temperature is not None:
        body["temperature"] = config.temperature
    if prompt.answer is not None:
        schema = prompt.schema()
        if plain:
            messages[-1]["content"] += "\n\n" + json_instruction(json.dumps(schema))
        else:
            named = {"name": prompt.answer.__name__, "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
    return body


def request_key(config: TeacherConfig, prompt: TeacherPrompt, sample: int, attempt: int, plain: bool) -> str:
    """Journal key and ``Idempotency-Key``: SHA-256 of model, messages, schema, sampling parameters, sample, try."""
    parts = {
        "model": config.model,
        "prompt": prompt.sha256(),
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "sample": sample,
        "try": attempt,
        "plain": plain and prompt.answer is not None,
    }
    return _sha256(parts)


def plain_key(config: TeacherConfig) -> str:
    """Journal key of the note that the endpoint refuses ``response_format`` for this model."""
    return _sha256({"response_format_refused": [config.base_url, config.model]})


def given_up_key(config: TeacherConfig, prompt: TeacherPrompt) -> str:
    """Journal key of the note that the endpoint took this prompt and failed at it as often as it was tried."""
    return _sha256({"given_up": [config.base_url, config.model, prompt.sha256()]})


def prompt_tokens_bound(body: Mapping[str, Any]) -> int:
    """Prompt tokens of a body, estimated from above: UTF-8 bytes / 3, so that scripts of one token a character are
    covered, the schema included."""
    texts = [message["content"] for message in body["messages"]]
    if "response_format" in body:
        texts.append(json.dumps(body["response_format"]))
    return sum(ceil(len(text.encode()) / 3) for text in texts) + _TOKENS_PER_MESSAGE * len(body["messages"])


def cost_bound(config: TeacherConfig, body: Mapping[str, Any]) -> float:
    """Most money that a request can cost."""
    return config.cost(prompt_tokens_bound(body), config.max_tokens)


@lru_cache
def _schema(answer: type[BaseModel]) -> dict[str, Any]:
    return answer.model_json_schema()


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
