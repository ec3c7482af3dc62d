"""Asks a teacher through OpenAI's Batch API: half the price at many endpoints, within a day.

A batch is known by the hash of the prompts it is for. Its id goes into the journal as soon as it exists; where the
process dies between the two, the next one finds the batch at the endpoint by that hash (``metadata.ka2l_key``). Answers
get the same journal keys as on the live path (https://platform.openai.com/docs/guides/batch).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import AnnotationsPending, EngineError, KA2LError
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import NUM_TO_BLAME_ENDPOINT, check_cap, count_paid, refuses_all
from ka2l.teacher.faults import fault_of, redact, status_fault
from ka2l.teacher.limits import MoneyCap
from ka2l.teacher.reply import (
    Journal,
    TeacherRun,
    answer_record,
    any_answered,
    finished_results,
    open_states,
    sample_states,
    unanswered_record,
    usage,
)
from ka2l.teacher.request import TeacherPrompt, cost_bound, plain_key, request_body, request_key

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

#: The endpoint's own limit.
MAX_REQUESTS = 50_000
#: The endpoint's own limit is 200 MB.
MAX_BYTES = 150_000_000
_METADATA_KEY = "ka2l_key"
_UNDER_WAY = frozenset({"validating", "in_progress", "finalizing", "cancelling"})


class _Job(NamedTuple):
    """One batch, before or after it exists at the endpoint. A set of prompts has one at a time."""

    set_key: str
    """Journal key of the set of prompts; its record holds the last batch of them."""
    number: int
    """Batches of this set that were collected before."""
    batch_id: str | None
    """None before the batch is known to exist."""
    num_requests: int
    bodies: dict[str, dict[str, Any]]
    """Journal key of each request to hand in -> its body; empty once the batch exists."""

    @property
    def key(self) -> str:
        """What the batch is called in its metadata. The requests do not enter: a batch that was handed in just before
        a kill is found whatever a cap would let through now."""
        return hashlib.sha256(f"{self.set_key} {self.number}".encode()).hexdigest()

    def record(self, *, collected: bool) -> dict[str, Any]:
        return {
            "batch_id": self.batch_id,
            "number": self.number,
            "num_requests": self.num_requests,
            "collected": collected,
        }


def submit_batch(
    config: TeacherConfig,
    api_key: str,
    journal: Journal,
    prompts: Mapping[str, TeacherPrompt],
    cap: MoneyCap | None = None,
) -> str | None:
    """Hand in what the journal holds no answer to, as one batch; a batch of the same prompts under way is found again.

    Args:
        cap: only as many requests are handed in as surely fit under it.

    Returns:
        The batch's id at the endpoint; None where nothing is left to ask or nothing more fits under the cap.

    Raises:
        ConfigError, BudgetError: as :meth:`ka2l.teacher.endpoint.Teacher.ask`.
        EngineError: the endpoint cannot be reached; calling again is safe.
    """
    job = _next_job(config, journal, prompts, check_cap(config, cap))
    if job is None or job.batch_id is not None:
        return job and job.batch_id
    with _client(config, api_key) as client:
        return _submit(client, journal, job).batch_id


def collect_batch(
    config: TeacherConfig,
    api_key: str,
    journal: Journal,
    prompts: Mapping[str, TeacherPrompt],
    cap: MoneyCap | None = None,
    *,
    wait_s: float = 0.0,
    poll_s: float = 10.0,
) -> TeacherRun:
    """Results of all prompts, through as many batches as it takes: unusable replies and expired requests go into
    another one. Prompts under way must be asked for as the set that was handed in, or they are handed in again.

    Args:
        wait_s: how long to wait for batches here, seconds.
        poll_s: how often to look, seconds.

    Raises:
        AnnotationsPending: a batch is under way; call again later with the same prompts.
        EngineError: the endpoint refused the batch as a whole, or cannot be reached.
        ConfigError, BudgetError: as :meth:`ka2l.teacher.endpoint.Teacher.ask`.
    """
    cap = check_cap(config, cap)
    deadline = time.monotonic() + wait_s
    num_requests = 0
    while (job := _next_job(config, journal, prompts, cap)) is not None:
        with _client(config, api_key) as client:
            job = _submit(client, journal, job)
            assert job.batch_id is not None
            batch = client.batches.retrieve(job.batch_id)
            while batch.status in _UNDER_WAY:
                if time.monotonic() + poll_s > deadline:
                    raise _pending(batch)
                time.sleep(poll_s)
                batch = client.batches.retrieve(batch.id)
            _collect(config, client, journal, prompts, job, batch)
        num_requests += job.num_requests
    states = sample_states(config, prompts, journal)
    stopped = "money" if open_states(states) else None
    return TeacherRun(finished_results(states), stopped, num_requests, usage(states))


def _next_job(
    config: TeacherConfig, journal: Journal, prompts: Mapping[str, TeacherPrompt], cap: MoneyCap
) -> _Job | None:
    """The batch under way, else the one to hand in next, else None."""
    states = sample_states(config, prompts, journal)
    count_paid(cap, states)
    texts = {prompt.sha256(): prompt for prompt in prompts.values()}.values()
    first_keys = sorted(request_key(config, prompt, i, 0, False) for prompt in texts for i in range(config.num_samples))
    set_key = hashlib.sha256(f"batch {config.base_url} {' '.join(first_keys)}".encode()).hexdigest()
    last = journal.get(set_key)
    if last is not None and not last["collected"]:
        return _Job(set_key, last["number"], last["batch_id"], last["num_requests"], {})

    plain = journal.get(plain_key(config)) is not None
    bodies: dict[str, dict[str, Any]] = {}
    num_bytes = 0
    bounds: list[float] = []
    for state in open_states(states):
        body = request_body(config, state.prompt, plain)
        num_bytes += len(json.dumps(body)) + 200
        bound = cost_bound(config, body)
        if len(bodies) == MAX_REQUESTS or num_bytes > MAX_BYTES or not cap.reserve(bound):
            break
        bounds.append(bound)
        bodies[state.key(plain)] = body
    for bound in bounds:
        cap.release(bound)
    return _Job(set_key, 0 if last is None else last["number"] + 1, None, len(bodies), bodies) if bodies else None


def _submit(client: OpenAI, journal: Journal, job: _Job) -> _Job:
    """The job with its batch, found or made; the batch's id is in the journal on return."""
    if job.batch_id is not None:
        return job
    found = (
        batch
        for batch in client.batches.list(limit=100)
        if (batch.metadata or {}).get(_METADATA_KEY) == job.key and batch.status != "failed"
    )
    batch = next(found, None)
    if batch is None:
        content = "".join(
            json.dumps({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
            for key, body in job.bodies.items()
        )
        file = client.files.create(file=(f"{job.key[:16]}.jsonl", io.BytesIO(content.encode())), purpose="batch")
        # No retries here: a second batch would be a second bill. One that was made but not reported back is found by
        # the look-up above.
        batch = client.with_options(max_retries=0).batches.create(
            completion_window="24h",
            endpoint="/v1/chat/completions",
            input_file_id=file.id,
            metadata={_METADATA_KEY: job.key},
            extra_headers={"Idempotency-Key": job.key},
        )
    job = job._replace(batch_id=batch.id)
    journal.put(job.set_key, job.record(collected=False))
    return job


def _collect(
    config: TeacherConfig,
    client: OpenAI,
    journal: Journal,
    prompts: Mapping[str, TeacherPrompt],
    job: _Job,
    batch: Batch,
) -> None:
    """Put every answer of a batch that has ended into the journal, then note that it is collected."""
    asked: dict[str, tuple[TeacherPrompt, str, bool]] = {}
    for prompt_id, prompt in prompts.items():
        for sample in range(config.num_samples):
            for attempt in range(config.max_malformed + 1):
                for plain in (False, True):
                    asked.setdefault(request_key(config, prompt, sample, attempt, plain), (prompt, prompt_id, plain))
    fatal: KA2LError | None = None
    refused: dict[str, dict[str, Any]] = {}
    for file_id in (batch.output_file_id, batch.error_file_id):
        for row in _rows(client.files.content(file_id).text) if file_id else ():
            key = row.get("custom_id")
            if key not in asked or journal.get(key) is not None:  # some endpoints give a row twice
                continue
            made = _journal_row(config, journal, key, *asked[key], row)
            if isinstance(made, dict):
                refused[key] = made
            else:
                fatal = made or fatal
    answered = any_answered(sample_states(config, prompts, journal))
    num_refused = len({record["prompt_sha256"] for record in refused.values()})
    if not answered and num_refused >= NUM_TO_BLAME_ENDPOINT:
        fatal = fatal or refuses_all(config, num_refused, next(iter(refused.values()))["problem"])
    else:
        for key, record in refused.items():
            journal.put(key, record)
    journal.put(job.set_key, job.record(collected=True) | {"status": batch.status})
    if fatal is not None:
        raise fatal
    if batch.status == "failed":
        problems = "; ".join(str(problem.message) for problem in (batch.errors and batch.errors.data) or [])
        raise EngineError(
            f"{config.base_url} refused batch {batch.id}: {problems[:300] or 'no reason given'}",
            hint="Correct what it says; resuming hands the questions in again.",
        )


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise EngineError(
                f"line {number} of a batch's answers is not JSON", hint="Resume to download the file again."
            ) from error


def _journal_row(
    config: TeacherConfig,
    journal: Journal,
    key: str,
    prompt: TeacherPrompt,
    prompt_id: str,
    plain: bool,
    row: Mapping[str, Any],
) -> KA2LError | dict[str, Any] | None:
    """Keep one row of a batch's files; returns the error where no other row would fare better, or the record of a
    refusal, which the caller keeps."""
    response, error = row.get("response") or {}, row.get("error") or {}
    if response.get("status_code") == 200 and response.get("body"):
        sent = request_body(config, prompt, plain)
        journal.put(key, answer_record(config, prompt, sent, response["body"], prompt_id))
        return None
    if error.get("code") in ("batch_expired", "batch_cancelled"):
        return None  # never worked on: it goes into the next batch
    body = response.get("body")
    problem = (body.get("error") if isinstance(body, dict) else None) or error
    status = response.get("status_code") or 500
    fault = status_fault(status, problem, f"HTTP {status}: {json.dumps(problem)[:200]}", config)
    if fault.refuses_schema and not plain:
        if journal.get(plain_key(config)) is None:
            journal.put(plain_key(config), {"response_format": "refused"})
    elif fault.fatal is None and fault.retryable:
        # Counted as a try, so that a request that fails in every batch comes to an end.
        journal.put(key, unanswered_record(prompt, fault.reason, prompt_id))
    elif fault.fatal is None:
        return unanswered_record(prompt, f"the endpoint refuses the request: {fault.reason}", prompt_id, final=True)
    return fault.fatal


def _pending(batch: Batch) -> AnnotationsPending:
    counts = batch.request_counts
    done = f", {counts.completed} of {counts.total} answered" if counts else ""
    return AnnotationsPending(
        f"batch {batch.id} at the teacher is {batch.status}{done}", hint="Run `ka2l resume` later; it may take a day."
    )


@contextlib.contextmanager
def _client(config: TeacherConfig, api_key: str) -> Iterator[OpenAI]:
    """A client whose own retries are harmless, since all but one of these calls are free and repeatable."""
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(
            base_url=config.base_url,
            api_key=api_key or "none",
            max_retries=config.max_retries,
            timeout=config.timeout_s,
        ) as client:
            yield client
    except OpenAIError as error:
        fault = fault_of(error, config, api_key)
        raise fault.fatal or EngineError(
            f"the Batch API at {config.base_url} fails: {redact(fault.reason, api_key)}",
            hint="Resume later: a batch that was handed in is found again.",
        ) from error
