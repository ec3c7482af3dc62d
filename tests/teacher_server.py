"""An OpenAI-compatible server that misbehaves on demand and keeps the books: what it billed, by Idempotency-Key."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Faults by name: HTTP status, error object, headers.
ERRORS: dict[str, tuple[int, dict[str, Any], dict[str, str]]] = {
    "429": (429, {"message": "slow down", "code": "rate_limit_exceeded"}, {}),
    "429_retry_after": (429, {"message": "slow down"}, {"Retry-After": "0.01"}),
    "429_tomorrow": (429, {"message": "daily limit"}, {"Retry-After": "86400"}),
    "no_quota": (429, {"message": "no money", "code": "insufficient_quota"}, {}),
    "500": (500, {"message": "oops"}, {}),
    "503": (503, {"message": "overloaded"}, {}),
    "400": (400, {"message": "prompt too long", "code": "context_length_exceeded"}, {}),
    "400_parameter": (400, {"message": "no max_tokens here", "code": "unsupported_parameter"}, {}),
    "401": (401, {"message": "Incorrect API key provided: sk-secret"}, {}),
    "402": (402, {"message": "pay first"}, {}),
    "403": (403, {"message": "not for you"}, {}),
    "404": (404, {"message": "no such model", "code": "model_not_found"}, {}),
}
#: Faults by name: what the billed message holds instead of the right answer.
CONTENTS: dict[str, dict[str, Any]] = {
    "malformed": {"content": '{"answers": ["Par'},
    "wrong_schema": {"content": '{"answer": "Paris"}'},
    "says_nothing": {"content": '{"answers": [" "], "abstain": false}'},
    "fenced": {"content": 'Sure!\n```json\n{"answers": ["fenced"], "abstain": false}\n```'},
    "abstain": {"content": '{"answers": [], "abstain": true}'},
    "repeats": {"content": '{"answers": ["Paris", "paris", "Paris"], "abstain": false}'},
    "refuses": {"content": None, "refusal": "I cannot help with that"},
}


def right_answer(question: str, body: Mapping[str, Any]) -> str:
    """What the teacher knows."""
    return json.dumps({"answers": [f"answer to {question}"], "abstain": False})


class TeacherServer:
    """Serves until closed; use it in a ``with``.

    Args:
        faults: number of a chat request (from 1, in order of arrival) -> fault; or a function of number and body.
        gateway: a known Idempotency-Key gets the stored answer again and no second bill.
        content: what the teacher answers to (question, body).
        without_schema: ``response_format`` is refused with 400.
        on_phase: called with (number, phase) where phase is ``received``, ``billed``, ``half_sent`` or ``sent`` of a
            chat request, ``call_received`` or ``call_answered`` of a request to the Batch API, counted for themselves.
    """

    def __init__(
        self,
        faults: Mapping[int, str] | Callable[[int, Mapping[str, Any]], str | None] | None = None,
        *,
        gateway: bool = False,
        content: Callable[[str, Mapping[str, Any]], str] = right_answer,
        without_schema: bool = False,
        on_phase: Callable[[int, str], None] | None = None,
    ) -> None:
        self.fault_of = faults if callable(faults) else lambda number, body: (faults or {}).get(number)
        self.gateway = gateway
        self.content = content
        self.without_schema = without_schema
        self.on_phase = on_phase or (lambda number, phase: None)
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """Idempotency-Key and body of every chat request, in order of arrival."""
        self.billed: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.stored: dict[str, bytes] = {}
        self.num_under_way = self.most_under_way = 0
        # Batch API
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.batch_status = "completed"
        self.batch_faults: dict[str, str] = {}
        """Question -> fault of its row; ``expired`` and ``twice`` besides those above."""
        self.cut_batch_create = False
        self.batch_calls: Counter[str] = Counter()
        self.num_calls = 0
        """Requests to the Batch API, its files included."""

        handler = type("Handler", (_Handler,), {"teacher": self})
        self.http = _Server(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> TeacherServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def completion(self, body: Mapping[str, Any], fault: str | None) -> bytes:
        """The response to a chat request that is billed."""
        question = re.findall(r"Question: (.*)", body["messages"][-1]["content"] + "\n")[-1]
        message: dict[str, Any] = {"role": "assistant", "content": self.content(question, body)}
        message |= CONTENTS.get(fault or "", {})
        finish = {"length": "length", "content_filter": "content_filter"}.get(fault or "", "stop")
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
        made = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        if fault == "duplicate":
            made["choices"] = [choice, choice | {"index": 1}]
        return json.dumps(made if fault == "no_usage" else made | {"usage": usage}).encode()

    # -- batches ------------------------------------------------------------------------------------------------------

    def create_batch(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        number = len(self.batches)
        batch = {
            "id": f"batch_{number}",
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "completion_window": "24h",
            "created_at": number,
            "input_file_id": wanted["input_file_id"],
            "metadata": wanted.get("metadata"),
            "status": "in_progress",
        }
        self.batches.insert(0, batch)
        return batch

    def seen_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ends the batch where its time has come, as ``batch_status`` says."""
        if batch["status"] == "in_progress" and self.batch_status != "in_progress":
            batch["status"] = self.batch_status
            if self.batch_status == "failed":
                batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "line 1 is wrong"}]}
            else:
                self._work_off(batch)
        return batch

    def _work_off(self, batch: dict[str, Any]) -> None:
        output, errors = [], []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            row = json.loads(line)
            key, body = row["custom_id"], row["body"]
            question = re.findall(r"Question: (.*)", body["messages"][-1]["content"])[-1]
            fault = self.batch_faults.get(question)
            if fault == "expired":
                errors.append(
                    {"custom_id": key, "response": None, "error": {"code": "batch_expired", "message": "late"}}
                )
                self.batch_faults.pop(question)
            elif self.without_schema and "response_format" in body:
                error = {"message": "response_format is not supported"}
                errors.append({"custom_id": key, "response": {"status_code": 400, "body": {"error": error}}})
            elif fault in ERRORS:
                status, error, _ = ERRORS[fault]
                errors.append({"custom_id": key, "response": {"status_code": status, "body": {"error": error}}})
            else:
                self.billed[key] += 1
                response = {"status_code": 200, "body": json.loads(self.completion(body, fault))}
                output += [{"custom_id": key, "response": response, "error": None}] * (1 + (fault == "twice"))
        for name, rows in (("output_file_id", output), ("error_file_id", errors)):
            if rows:
                file_id = f"file_{batch['id']}_{name}"
                self.files[file_id] = "".join(json.dumps(row) + "\n" for row in rows).encode()
                batch[name] = file_id


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    teacher: TeacherServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keeps tests quiet."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the client is gone

    def reply(
        self, status: int, content: bytes, headers: Mapping[str, str] | None = None, upto: int | None = None
    ) -> None:
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        # One write: two would wait for each other's acknowledgement.
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + content[:upto])

    def fail(self, name: str) -> None:
        status, error, headers = ERRORS[name]
        self.reply(status, json.dumps({"error": error}).encode(), headers)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:
            self.close_connection = True  # the client died while sending
            return
        if self.path == "/v1/chat/completions":
            with self.teacher.lock:
                self.teacher.num_under_way += 1
                self.teacher.most_under_way = max(self.teacher.most_under_way, self.teacher.num_under_way)
            try:
                self.chat(json.loads(content))
            finally:
                with self.teacher.lock:
                    self.teacher.num_under_way -= 1
        else:
            with self.counted():
                self.hand_in(content)

    def hand_in(self, content: bytes) -> None:
        if self.path == "/v1/files":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = BytesParser().parsebytes(head + content).get_payload()
            file = next(part for part in parts if part.get_filename())  # type: ignore[union-attr]
            file_id = f"file_{len(self.teacher.files)}"
            self.teacher.files[file_id] = file.get_payload(decode=True)  # type: ignore[assignment,union-attr]
            self.answer(
                {"id": file_id, "object": "file", "purpose": "batch", "filename": "x", "bytes": 1, "created_at": 0}
            )
        else:
            self.teacher.batch_calls["create"] += 1
            batch = self.teacher.create_batch(json.loads(content))
            if self.teacher.cut_batch_create:
                self.close_connection = True
                return
            self.answer(batch)

    def do_GET(self) -> None:
        with self.counted():
            self.look_up()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.teacher.lock:
            self.teacher.num_calls += 1
            number = self.teacher.num_calls
        self.teacher.on_phase(number, "call_received")
        yield
        self.teacher.on_phase(number, "call_answered")

    def look_up(self) -> None:
        path, _, _ = self.path.partition("?")
        batches = {batch["id"]: batch for batch in self.teacher.batches}
        if path == "/v1/batches":
            self.teacher.batch_calls["list"] += 1
            self.answer({"object": "list", "data": self.teacher.batches, "has_more": False})
        elif path.startswith("/v1/batches/"):
            self.answer(self.teacher.seen_batch(batches[path.rsplit("/", 1)[1]]))
        else:
            self.reply(200, self.teacher.files[path.split("/")[3]])

    def answer(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode())

    def chat(self, body: dict[str, Any]) -> None:
        teacher, key = self.teacher, self.headers.get("Idempotency-Key", "")
        with teacher.lock:
            teacher.requests.append((key, body))
            number = len(teacher.requests)
        teacher.on_phase(number, "received")
        fault = teacher.fault_of(number, body)
        if teacher.without_schema and "response_format" in body:
            self.reply(400, b'{"error": {"message": "response_format is not supported", "param": "response_format"}}')
        elif fault in ERRORS:
            self.fail(fault)
        elif fault == "error_200":
            self.answer({"error": {"message": "the provider is gone", "code": 502}})
        elif fault == "hang":
            teacher.released.wait(30)
            self.close_connection = True
        elif fault == "cut_before":
            self.close_connection = True
        else:
            self.deliver(number, key, self.bill(key, body, fault), fault)

    def bill(self, key: str, body: Mapping[str, Any], fault: str | None) -> bytes:
        teacher = self.teacher
        with teacher.lock:
            if not (teacher.gateway and key in teacher.stored):
                teacher.billed[key] += 1
                teacher.stored[key] = b"<html>oops" if fault == "garbage" else teacher.completion(body, fault)
            return teacher.stored[key]

    def deliver(self, number: int, key: str, content: bytes, fault: str | None) -> None:
        teacher = self.teacher
        teacher.on_phase(number, "billed")
        if fault == "cut_billed":
            self.close_connection = True
            return
        half = len(content) // 2
        self.reply(200, content, upto=half)
        if fault == "slow":
            time.sleep(0.05)
        teacher.on_phase(number, "half_sent")
        if fault == "cut_middle":
            self.close_connection = True
            return
        self.wfile.write(content[half:])
        with teacher.lock:
            teacher.delivered[key] += 1
        teacher.on_phase(number, "sent")
