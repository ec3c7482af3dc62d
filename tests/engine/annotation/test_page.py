"""The annotation page over HTTP: who may speak to it, who gets which question, when an answer is acknowledged."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from engine.annotation.answers import AnswerStore
from engine.annotation.page import make_app, serve
from ka2l.annotation.people import Task
from ka2l.errors import ConfigError, RunInUseError

TOKEN = "a-token-that-nobody-guesses"
BASE = "http://127.0.0.1:8123"
TASKS = [Task(f"q{i}", f"<b>What</b> is {i}?", [("secret guess", 4)], 0.75, 0.5) for i in range(3)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Browser:
    """One browser session at the page."""

    def __init__(self, app: Any, name: str | None = "anna", **jar: str) -> None:
        self.client = TestClient(app, base_url=BASE, follow_redirects=False, raise_server_exceptions=False, cookies=jar)
        if not jar:
            self.client.get("/", params={"token": TOKEN})
        if name:
            assert self.post("name", name=name).status_code == 200

    def post(self, path: str, origin: str | None = BASE, **body: Any) -> Any:
        return self.client.post(f"/api/{path}", json=body, headers={"Origin": origin} if origin else {})

    def next(self) -> str | None:
        question = self.post("next").json()["question"]
        return question and question["question_id"]

    def answer(self, question_id: str, text: str = "", **more: Any) -> Any:
        return self.post("answer", question_id=question_id, text=text, **more)


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    return AnswerStore(tmp_path / "answers.jsonl")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def app(store: AnswerStore, clock: Clock) -> Any:
    return make_app(TASKS, store, TOKEN, lease_s=60, clock=clock)


@pytest.fixture
def browser(app: Any) -> Callable[..., Browser]:
    return lambda *args, **jar: Browser(app, *args, **jar)


def test_the_token_moves_from_the_address_into_a_strict_cookie(app: Any) -> None:
    client = TestClient(app, base_url=BASE, follow_redirects=False)
    moved = client.get("/", params={"token": TOKEN})
    assert (moved.status_code, moved.headers["location"]) == (303, "/")
    set_cookies = moved.headers.get_list("set-cookie")
    assert len(set_cookies) == 2
    assert all("HttpOnly" in c and "SameSite=strict" in c and "Domain" not in c for c in set_cookies)
    page = client.get("/")
    assert page.status_code == 200
    assert TOKEN not in page.text


@pytest.mark.parametrize(
    "path", ["/", "/?token=", "/?token=wrong", "/?token=%ff", "/docs", "/openapi.json", "/nowhere"]
)
def test_without_the_token_there_is_nothing(app: Any, path: str) -> None:
    reply = TestClient(app, base_url=BASE).get(path)
    assert reply.status_code == 401
    assert "question" not in reply.text.lower()


@pytest.mark.parametrize("path", ["name", "next", "answer", "back", "model"])
def test_posts_without_the_token_or_from_another_page_are_refused(
    app: Any, browser: Callable[..., Browser], store: AnswerStore, path: str
) -> None:
    body = {"question_id": "q0", "text": "x", "name": "eve"}
    assert TestClient(app, base_url=BASE).post(f"/api/{path}", json=body, headers={"Origin": BASE}).status_code == 401
    # Not even with the token in the address.
    guest = TestClient(app, base_url=BASE)
    assert guest.post(f"/api/{path}?token={TOKEN}", json=body, headers={"Origin": BASE}).status_code == 401
    inside = browser()
    for origin in (None, "null", "http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1:8123"):
        assert inside.post(path, origin=origin, **body).status_code == 403
    assert store.answers() == []


def test_another_host_name_is_refused(app: Any) -> None:
    reply = TestClient(app, base_url="http://evil.example").get("/", params={"token": TOKEN})
    assert reply.status_code == 400
    assert "set-cookie" not in reply.headers


def test_every_reply_has_the_security_headers(app: Any, browser: Callable[..., Browser]) -> None:
    inside = browser()
    replies = [
        inside.client.get("/"),
        inside.post("next"),
        inside.post("answer", junk=1),
        inside.client.get("/nowhere"),
    ]
    replies += [TestClient(app, base_url=BASE).get("/"), inside.post("next", origin=None)]
    for reply in replies:
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_the_page_loads_nothing_and_its_scripts_are_named_anew_each_time(browser: Callable[..., Browser]) -> None:
    inside = browser("<script>alert(1)</script>")
    first, second = inside.client.get("/"), inside.client.get("/")
    assert "http://" not in first.text
    assert "https://" not in first.text
    assert "<script>alert" not in first.text
    policies = [reply.headers["content-security-policy"] for reply in (first, second)]
    assert policies[0] != policies[1]
    assert "unsafe" not in policies[0]
    nonce = policies[0].split("'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in first.text
    assert f'<style nonce="{nonce}">' in first.text


def test_what_the_model_says_is_sent_only_when_asked_for(browser: Callable[..., Browser]) -> None:
    inside = browser()
    shown = inside.post("next")
    assert shown.json()["question"] == {"question_id": "q0", "question": "<b>What</b> is 0?"}
    assert "secret" not in shown.text + inside.client.get("/").text
    asked = inside.post("model", question_id="q0").json()
    assert asked == {"answers": [{"answer": "secret guess", "count": 4}], "p_unknown": 0.75, "semantic_entropy": 0.5}


def test_no_question_before_a_name(browser: Callable[..., Browser]) -> None:
    nameless = browser(None)
    assert nameless.post("next").status_code == 428
    assert nameless.answer("q0", "x").status_code == 428
    assert nameless.post("name", name=" \n ").status_code == 422
    assert nameless.post("name", name="Zoë; Ωμέγα").json() == {"name": "Zoë; Ωμέγα"}
    assert nameless.next() == "q0"


def test_an_acknowledged_answer_is_on_disk(browser: Callable[..., Browser], store: AnswerStore) -> None:
    inside = browser("Zoë")
    reply = inside.answer(inside.next() or "", " Paris | Paname ")
    assert reply.json() == {"progress": {"num_done": 1, "num_total": 3, "num_mine": 1}}
    inside.answer(inside.next() or "", skipped=True)
    rows = AnswerStore(store.path).answers()
    assert [(r.question_id, r.answers, r.annotator, r.skipped) for r in rows] == [
        ("q0", ["Paris", "Paname"], "Zoë", False),
        ("q1", [], "Zoë", True),
    ]


def test_an_answer_that_cannot_be_written_is_not_acknowledged(
    browser: Callable[..., Browser], store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    inside = browser()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = inside.answer("q0", "x")
    assert reply.status_code == 507
    assert "no space" in reply.json()["detail"]
    assert store.answers() == []
    assert inside.next() == "q0"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"question_id": "q0", "text": " . | "}, 422),
        ({"question_id": "q0", "text": "x" * 10_001}, 422),
        ({"question_id": "unknown", "text": "x"}, 404),
        ({"question_id": "q0", "text": "x", "annotator": "eve"}, 422),
        ({"question_id": "q0", "text": "x" * 70_000}, 413),
    ],
)
def test_an_answer_that_is_none_is_refused(
    browser: Callable[..., Browser], store: AnswerStore, body: dict[str, Any], status: int
) -> None:
    assert browser().post("answer", **body).status_code == status
    assert store.answers() == []


def test_two_browsers_never_hold_the_same_question_unless_a_lease_ran_out(
    browser: Callable[..., Browser], clock: Clock
) -> None:
    anna, ben = browser("anna"), browser("ben")
    assert [anna.next(), ben.next(), anna.next()] == ["q0", "q1", "q0"]
    clock.now = 61
    assert ben.next() == "q0"


def test_the_second_answer_to_a_question_is_refused_whoever_holds_it(
    browser: Callable[..., Browser], clock: Clock, store: AnswerStore
) -> None:
    anna, ben, other_anna = browser("anna"), browser("ben"), browser("anna")
    anna.next()
    clock.now = 61
    assert ben.next() == "q0"
    assert anna.answer("q0", "first").status_code == 200
    assert ben.answer("q0", "late").status_code == 409
    assert other_anna.answer("q0", "same name, another browser").status_code == 409
    assert ben.next() == "q1"
    assert [row.answers for row in store.answers()] == [["first"]]


def test_many_browsers_at_once_answer_each_question_once(tmp_path: Path) -> None:
    tasks = [Task(f"q{i}", "?", [], None, None) for i in range(40)]
    store = AnswerStore(tmp_path / "many.jsonl")
    app = make_app(tasks, store, TOKEN)

    def work(name: str) -> int:
        one, count = Browser(app, name), 0
        while (question_id := one.next()) is not None:
            assert one.answer(question_id, name).status_code == 200
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, ("a", "b", "c", "c")))
    assert sum(counts) == 40
    assert len(store.path.read_text(encoding="utf-8").splitlines()) == 40


def test_a_person_goes_back_and_corrects(browser: Callable[..., Browser], store: AnswerStore) -> None:
    anna, ben = browser("anna"), browser("ben")
    assert anna.post("back").json() == {"question": None}
    anna.answer("q0", "old | older")
    anna.answer("q1", skipped=True)
    assert anna.post("back", question_id="q2").json()["question"]["question_id"] == "q1"
    shown = anna.post("back", question_id="q1").json()["question"]
    assert (shown["question_id"], shown["text"]) == ("q0", "old | older")
    assert anna.post("back", question_id="q0").json() == {"question": None}
    assert ben.post("back").json() == {"question": None}
    assert anna.answer("q0", "new").json()["progress"]["num_done"] == 2
    assert [(row.question_id, row.answers) for row in store.answers()] == [("q1", []), ("q0", ["new"])]


def test_the_same_answer_sent_again_is_acknowledged_and_kept_once(
    browser: Callable[..., Browser], store: AnswerStore
) -> None:
    anna = browser()
    assert [anna.answer("q0", "x").status_code for _ in range(2)] == [200, 200]
    assert len(store.path.read_text(encoding="utf-8").splitlines()) == 1


def test_a_session_outlives_a_restart_with_the_same_token_and_no_other(
    browser: Callable[..., Browser], store: AnswerStore
) -> None:
    anna = browser("Zoë")
    anna.answer("q0", "before")
    jar = dict(anna.client.cookies)
    again = Browser(make_app(TASKS, AnswerStore(store.path), TOKEN), None, **jar)
    assert again.next() == "q1"
    assert again.answer("q1", "after").json()["progress"] == {"num_done": 2, "num_total": 3, "num_mine": 2}
    assert again.post("back", question_id="q1").json()["question"]["text"] == "before"
    other = Browser(make_app(TASKS, store, TOKEN + "-another"), None, **jar)
    assert other.post("next").status_code == 401


def test_a_short_token_is_refused(store: AnswerStore) -> None:
    with pytest.raises(ConfigError, match="token"):
        make_app(TASKS, store, "")


def test_the_server_listens_on_the_loopback_alone_and_one_process_serves_a_store(store: AnswerStore) -> None:
    seen: list[tuple[str, int]] = []

    def look(url: str) -> None:
        port = int(url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)), socket.socket() as other:
            # Were the port open on every interface, this address of the loopback would answer too.
            other.settimeout(5)
            with pytest.raises(OSError, match="refused"):
                other.connect(("127.0.0.2", port))
        with pytest.raises(RunInUseError):
            serve(TASKS, AnswerStore(store.path))
        with pytest.raises(ConfigError, match=str(port)):
            serve(TASKS, AnswerStore(store.path.with_name("other.jsonl")), port=port)
        seen.append((url, port))
        raise KeyboardInterrupt

    thread_errors: list[BaseException] = []

    def run() -> None:
        try:
            serve(TASKS, store, announce=look)
        except BaseException as error:
            thread_errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert [type(error) for error in thread_errors] == [KeyboardInterrupt]
    (url, port) = seen[0]
    assert url.startswith(f"http://127.0.0.1:{port}/?token=")
    assert len(url.split("token=")[1]) >= 40
