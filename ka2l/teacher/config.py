"""TeacherConfig: endpoint, model, sampling, prices of its tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ka2l.section import Section


class Prices(Section):
    """What tokens cost, in any one currency. Batch jobs are often cheaper: give the price of the path in use."""

    input_per_million: float = Field(0.0, ge=0)
    """A million prompt tokens."""
    output_per_million: float = Field(0.0, ge=0)
    """A million generated tokens."""


class TeacherConfig(Section):
    """A language model that answers for money, and how it is asked."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {
            "api_key_env",
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "timeout_s",
            "max_retries",
            "backoff_base_s",
            "backoff_cap_s",
            "max_retry_after_s",
            "token_limit_field",
            "prices",
        }
    )

    base_url: str = "https://api.openai.com/v1"
    """Where the endpoint is, up to ``/chat/completions``."""
    model: str
    """The model's name at the endpoint."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; null for an endpoint that asks for none."""
    temperature: float | None = Field(0.0, ge=0)
    """Null leaves it to the endpoint: some models take no other value than their own."""
    max_tokens: int = Field(256, ge=1)
    """Longest reply, tokens; reasoning counts where a model reasons."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit; OpenAI's reasoning models take only ``max_completion_tokens``."""
    num_samples: int = Field(1, ge=1)
    """Replies per prompt (self-consistency, arXiv 2203.11171)."""
    min_agreement: float = Field(0.5, ge=0, le=1)
    """Share of the replies that must mean the same; a question with less is refused."""
    allow_abstain: bool = True
    """Let the teacher say that it does not know."""
    max_malformed: int = Field(2, ge=0)
    """Unusable replies to a prompt after which it is asked again; each is paid for."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at once."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Null for no limit."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Prompt tokens (estimated) plus ``max_tokens`` of the requests sent in a minute; null for no limit."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest wait for a whole reply, seconds."""
    max_retries: int = Field(5, ge=0)
    """Further tries after overload, faults of the server, timeouts and cut connections."""
    backoff_base_s: float = Field(1.0, ge=0)
    """Longest first wait before a retry, seconds; doubles with every further one."""
    backoff_cap_s: float = Field(60.0, ge=0)
    """Longest wait that we choose, seconds. ``Retry-After`` comes on top."""
    max_retry_after_s: float = Field(600.0, ge=0)
    """An endpoint that asks to wait for longer ends the run with an error; it can be resumed later."""
    prices: Prices | None = None
    """Null: costs are counted as 0."""

    @model_validator(mode="after")
    def _samples_differ(self) -> TeacherConfig:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("num_samples above 1 needs a temperature above 0, else all samples are the same")
        return self

    def cost(self, num_prompt_tokens: float, num_completion_tokens: float) -> float:
        """Money for so many tokens."""
        if self.prices is None:
            return 0.0
        prompt, completion = self.prices.input_per_million, self.prices.output_per_million
        return (num_prompt_tokens * prompt + num_completion_tokens * completion) / 1e6
