"""Decides what a failed request to a teacher means: wait and try again, give this prompt up, or stop at once."""

from __future__ import annotations

from typing import Any, NamedTuple

from ka2l.errors import BudgetError, ConfigError, KA2LError
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.limits import retry_after

#: Besides 5xx: request timeout, conflict (a gateway still works on this Idempotency-Key), too early, too many requests.
_RETRYABLE = frozenset({408, 409, 425, 429})
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_SCHEMA_WORDS = ("response_format", "json_schema", "structured output", "guided")


class Fault(NamedTuple):
    """Why a request brought no answer, and what follows from that."""

    reason: str
    retryable: bool
    fatal: KA2LError | None = None
    """Raised once the requests under way are over: no other request would fare better."""
    wait_s: float | None = None
    """How long the endpoint asks to wait."""
    maybe_billed: bool = False
    """The endpoint may have worked on it."""
    received: bool = False
    """The endpoint got the prompt and failed at it: the prompt may be the reason."""
    refuses_schema: bool = False
    """It wants no ``response_format``."""


def fault_of(error: Exception, config: TeacherConfig, api_key: str) -> Fault:
    """The meaning of an exception of the openai client; raises it again where it is none of a request's."""
    import openai

    reason = redact(f"{type(error).__name__}: {error}", api_key)
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return status_fault(error.status_code, body, reason, config, error.response.headers)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault(f"no answer within {config.timeout_s:g} s", True, maybe_billed=True, received=True)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        never_sent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
        sent = not never_sent
        return Fault(redact(f"connection failed: {cause or error}", api_key), True, maybe_billed=sent, received=sent)
    raise error


def status_fault(status: int, body: dict[str, Any], reason: str, config: TeacherConfig, headers: Any = None) -> Fault:
    """The meaning of an HTTP status and the error object that came with it."""
    codes = {body.get("code"), body.get("type")}
    text = f"{body.get('message', '')} {body.get('param', '')} {reason}".lower()
    if status == 402 or codes & set(_NO_MONEY):
        hint = "Add credit to the account, then resume: answers received so far are kept."
        return Fault(reason, False, BudgetError(f"the account at {config.base_url} has no money left", hint=hint))
    if status == 429 or status in _RETRYABLE or status >= 500:
        return Fault(reason, True, wait_s=retry_after(headers or {}), received=status >= 500)
    if status in (401, 403):
        name = config.api_key_env or "none, see teacher.api_key_env"
        hint = f"Check the API key (environment variable: {name}) and what it may use."
        return Fault(reason, False, ConfigError(f"{config.base_url} refuses the API key (HTTP {status})", hint=hint))
    if status == 404 or "model_not_found" in codes:
        message = f"{config.base_url} knows no model {config.model!r}, or no /chat/completions (HTTP {status})"
        return Fault(reason, False, ConfigError(message, hint="Check teacher.base_url and teacher.model."))
    if status in (400, 422) and any(word in text for word in _SCHEMA_WORDS):
        return Fault(reason, False, refuses_schema=True)
    if codes & {"unsupported_parameter", "unsupported_value"}:
        hint = "Change teacher.token_limit_field or set teacher.temperature: null; some models take only these."
        return Fault(reason, False, ConfigError(f"{config.model!r} refuses a parameter: {reason}", hint=hint))
    return Fault(reason, False)


def redact(text: str, api_key: str) -> str:
    """The text without the key, at most 300 characters."""
    return (text.replace(api_key, "***") if api_key else text)[:300]
