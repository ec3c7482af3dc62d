"""Hosts a local teacher: chat requests to chat completions, in the format of an endpoint."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from actors.workers.standing import StandingWorkers
from ka2l.prompts import encode_messages
from ka2l.sampling.sampler import Generation, Request, Sampler
from ka2l.teacher.local import ChatRequest, Complete

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUESTS_PER_CALL = 256


class TeacherHost:
    """One model that answers a teacher's prompts.

    Args:
        sampler: its ``max_tokens`` is the longest reply.
        tokenizer: renders and encodes conversations.
        name: of the model, for the replies.
    """

    def __init__(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.name = name

    def complete(self, requests: Sequence[ChatRequest]) -> list[dict[str, Any]]:
        """A chat completion for each request, in order; ``error`` for prompts that do not fit the model."""
        wanted = [
            Request(
                encode_messages(self.tokenizer, request.body["messages"]),
                num_samples=1,
                temperature=request.body.get("temperature", 1.0),
                seed=request.seed,
                json_schema=_schema(request.body),
            )
            for request in requests
        ]
        return [self._completion(made) for (made,) in self.sampler.generate(wanted)]

    def _completion(self, made: Generation) -> dict[str, Any]:
        if made.finish_reason == "rejected":
            return {"error": {"message": f"its {made.num_prompt_tokens} tokens and a reply do not fit the model"}}
        message = {"role": "assistant", "content": made.answer}
        return {
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": made.finish_reason}],
            "usage": {"prompt_tokens": made.num_prompt_tokens, "completion_tokens": len(made.token_ids)},
        }


def complete_with(pool: StandingWorkers) -> Complete:
    """Generates with a pool of these hosts: a few hundred requests a call, which is what an engine decodes at once."""

    def complete(requests: Sequence[ChatRequest]) -> Generator[tuple[int, Mapping[str, Any]]]:
        starts = range(0, len(requests), REQUESTS_PER_CALL)
        calls = pool.map("complete", [requests[start : start + REQUESTS_PER_CALL] for start in starts])
        with closing(calls):
            for index, replies in calls:
                for offset, reply in enumerate(replies):
                    yield starts[index] + offset, reply

    return complete


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema that a request asks for."""
    wanted = body.get("response_format")
    return None if wanted is None else wanted["json_schema"]["schema"]
