"""The annotation page: a small web server on this machine alone, for people who answer selected questions.

Imports FastAPI at the top, since FastAPI reads the handlers' annotations: import this module only where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field

from engine.annotation.answers import AnswerStore
from engine.annotation.queue import TakenError, TaskQueue
from ka2l.annotation.people import HumanAnswer, Task
from ka2l.annotation.task_cells import join_answers, split_answers
from ka2l.answers.normalise import surface_key
from ka2l.errors import ConfigError, KA2LError, RunInUseError

_LOOPBACK = ("127.0.0.1", "localhost")
_MAX_BODY = 64 * 1024
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class NameBody(BaseModel):
    """Who sits at this browser."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)
    name: str = Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")


class QuestionBody(BaseModel):
    """The question that the page shows, if any."""

    model_config = ConfigDict(extra="forbid")
    question_id: str | None = None


class AnswerBody(BaseModel):
    """What the person said; ``text`` may hold several answers, as :func:`ka2l.annotation.task_cells.split_answers`
    reads."""

    model_config = ConfigDict(extra="forbid")
    question_id: str
    text: str = Field(default="", max_length=10_000)
    skipped: bool = False


def make_app(
    tasks: Sequence[Task],
    store: AnswerStore,
    token: str,
    lease_s: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The page and what it talks to.

    Args:
        tasks: what is asked; ids are unique.
        store: where answers go; every answer is there before it is acknowledged.
        token: the secret that opens the page; every request is checked for it.
        lease_s: seconds for which a question that one browser shows is kept from others.
        clock: seconds, for the leases.

    A browser keeps token, session and annotator in cookies of its own, named after the token, so that they outlive a
    restart of the server with the same token, and two servers do not take each other's.

    Raises:
        ConfigError: the token is too short to be a secret.
    """
    if len(token) < 16:
        raise ConfigError("the token of the annotation page is shorter than 16 characters", hint="Leave it out.")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    visitor = _Visitor(token)
    _add_guards(app, visitor)
    _add_page(app, visitor)
    _add_questions(app, visitor, TaskQueue(tasks, store, lease_s, clock))
    return app


class _Visitor:
    """What the cookies of a browser say: which session it is, and who answers."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.cookies = "ka2l_" + hashlib.sha256(token.encode()).hexdigest()[:12]

    def session(self, request: Request) -> str:
        return request.cookies.get(f"{self.cookies}_session", "")

    def name(self, request: Request) -> str | None:
        return unquote(request.cookies.get(f"{self.cookies}_name", "")) or None

    def required_name(self, request: Request) -> str:
        name = self.name(request)
        if name is None or not self.session(request):
            raise HTTPException(428, "Say who you are first.")
        return name


def _add_guards(app: FastAPI, visitor: _Visitor) -> None:
    """Check every request for the token, and say what failed on storage."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _refusal(request, visitor.token, visitor.cookies) or await call_next(request)
        for name, value in _HEADERS.items():
            response.headers[name] = value
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        return response

    @app.exception_handler(KA2LError)
    async def say_what_failed(_: Request, error: KA2LError) -> JSONResponse:
        return JSONResponse({"detail": error.message}, status_code=507)


def _add_page(app: FastAPI, visitor: _Visitor) -> None:
    """The page itself, and the annotator's name."""

    @app.get("/")
    def page(request: Request) -> Response:
        if "token" in request.query_params:
            # The cookies take over, so that the token leaves the address bar.
            moved: Response = RedirectResponse("/", status_code=303)
            _set_cookie(moved, visitor.cookies, quote(visitor.token, safe=""))
            if f"{visitor.cookies}_session" not in request.cookies:
                _set_cookie(moved, f"{visitor.cookies}_session", secrets.token_urlsafe(16))
            return moved
        return _page(visitor.name(request) or "")

    @app.post("/api/name")
    def set_name(body: NameBody) -> Response:
        response = JSONResponse({"name": body.name})
        _set_cookie(response, f"{visitor.cookies}_name", quote(body.name, safe=""))
        return response


def _add_questions(app: FastAPI, visitor: _Visitor, queue: TaskQueue) -> None:
    """Questions and answers."""

    @app.post("/api/next")
    def next_question(request: Request) -> dict[str, Any]:
        name = visitor.required_name(request)
        task = queue.next(visitor.session(request))
        return _shown(task) | {"progress": queue.progress(name)._asdict()}

    @app.post("/api/answer")
    def answer(body: AnswerBody, request: Request) -> dict[str, Any]:
        name = visitor.required_name(request)
        answers = [] if body.skipped else [text for text in split_answers(body.text) if surface_key(text)]
        if not answers and not body.skipped:
            raise HTTPException(422, "The answer is empty.")
        try:
            queue.save(visitor.session(request), name, body.question_id, answers, body.skipped)
        except KeyError:
            raise HTTPException(404, "This question is not asked.") from None
        except TakenError:
            raise HTTPException(409, "Someone else has answered this question.") from None
        return {"progress": queue.progress(name)._asdict()}

    @app.post("/api/back")
    def back(body: QuestionBody, request: Request) -> dict[str, Any]:
        said = queue.before(visitor.session(request), visitor.required_name(request), body.question_id)
        return _shown(queue.tasks[said.question_id] if said else None, said)

    @app.post("/api/model")
    def model(body: QuestionBody) -> dict[str, Any]:
        task = queue.tasks.get(body.question_id or "")
        if task is None:
            raise HTTPException(404, "This question is not asked.")
        return {
            "answers": [{"answer": text, "count": count} for text, count in task.own_answers],
            "p_unknown": task.p_unknown,
            "semantic_entropy": task.semantic_entropy,
        }


def serve(
    tasks: Sequence[Task],
    store: AnswerStore,
    port: int = 0,
    token: str | None = None,
    lease_s: float = 600.0,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve the page on 127.0.0.1 until the process is interrupted (Ctrl-C).

    Args:
        tasks: what is asked; ids are unique.
        store: where answers go.
        port: 0 takes a free one.
        token: the secret in the address; with None a new one. A restart with the same token and port keeps every open
            page working.
        lease_s: seconds for which a question that one browser shows is kept from others.
        announce: takes the address once the port is open; with None the address is printed.

    Raises:
        ConfigError: the port is in use.
        RunInUseError: another process serves the same store.
    """
    import uvicorn
    from rich.console import Console

    token = token or secrets.token_urlsafe(32)
    with _held(store.path), _listen(port) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={quote(token, safe='')}"
        say = announce or (lambda text: Console().print(text, markup=False, highlight=False, soft_wrap=True))
        say(url)
        # No access log: it would hold the token.
        config = uvicorn.Config(
            make_app(tasks, store, token, lease_s),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=3,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            return


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keeps other processes from serving the same answers; the system lets go when the process ends, however."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunInUseError(
            f"another process serves {path}", hint="Use the page that it printed, or end it first."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot open port {port}: {error.strerror}", hint="Choose another --port.") from error
    return listening


def _refusal(request: Request, token: str, cookies: str) -> Response | None:
    """What a request gets that may not pass; None for one that may."""
    host = request.headers.get("host", "")
    if urlsplit(f"//{host}").hostname not in _LOOPBACK:
        return PlainTextResponse("This page is for its own machine alone.", 400)
    given = request.query_params.get("token") if request.method == "GET" else None
    if given is None:
        given = unquote(request.cookies.get(cookies, ""))
    if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
        return PlainTextResponse("The key is missing or wrong. Open the address that the program printed.", 401)
    if request.method not in ("GET", "HEAD"):
        origin = request.headers.get("origin", "")
        if origin != f"http://{host}":
            return PlainTextResponse("Requests from other pages are refused.", 403)
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > _MAX_BODY:
            return PlainTextResponse("The request is too long.", 413)
    return None


def _set_cookie(response: Response, name: str, value: str) -> None:
    response.set_cookie(name, value, httponly=True, samesite="strict", path="/")


def _page(name: str) -> Response:
    import jinja2

    template = (files("engine.templates") / "annotate.html.j2").read_text(encoding="utf-8")
    nonce = secrets.token_urlsafe(16)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    response = HTMLResponse(environment.from_string(template).render(nonce=nonce, name=name))
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return response


def _shown(task: Task | None, said: HumanAnswer | None = None) -> dict[str, Any]:
    """What the page gets to see of a question: not what the model made of it."""
    if task is None:
        return {"question": None}
    question = {"question_id": task.question_id, "question": task.question}
    if said is not None:
        question |= {"text": join_answers(said.answers)}
    return {"question": question}
