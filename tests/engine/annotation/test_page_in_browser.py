"""The annotation page in real browsers, by keyboard alone: several at once, cut off, and over a kill of the server."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.annotation.answers import AnswerStore
from ka2l.annotation.people import HumanAnswer, Task
from ka2l.annotation.task_files import write_tasks

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN = "one-token-for-every-start"
SERVE = """
import sys
from pathlib import Path
from engine.annotation.page import serve
from engine.annotation.answers import AnswerStore
from ka2l.annotation.task_files import read_tasks
folder, port, token = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
serve(read_tasks(folder / "tasks.jsonl"), AnswerStore(folder / "answers.jsonl"), port, token,
      announce=lambda url: print(url, flush=True))
"""
#: Does something in a browser whose sessions are made by the function given.
Visit = Callable[[Callable[[], Awaitable[Any]]], Awaitable[None]]


class Server:
    """`serve` in a process of its own, which may be killed and started again on the same port."""

    def __init__(self, folder: Path, tasks: list[Task]) -> None:
        write_tasks(folder / "tasks.jsonl", tasks)
        self.folder = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.folder), str(self.port), TOKEN]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:")
        self.port = int(self.url.split(":")[2].split("/")[0])

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)

    def answers(self) -> list[HumanAnswer]:
        store = AnswerStore(self.folder / "answers.jsonl")
        store.close()
        return store.answers()

    def num_lines(self) -> int:
        return len((self.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[list[Task]], Server]]:
    made: list[Server] = []

    def make(tasks: list[Task]) -> Server:
        made.append(Server(tmp_path, tasks))
        return made[-1]

    yield make
    for server in made:
        if server.process.poll() is None:
            server.end()


def questions(count: int) -> list[Task]:
    return [Task(f"q{i:03d}", f"What is number {i}?", [("a guess", 3)], 0.9, 0.4) for i in range(count)]


def in_browser(visit: Visit) -> None:
    async def run() -> None:
        async with playwright.async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox"])

            async def new_session() -> Any:
                context = await browser.new_context()
                context.set_default_timeout(60_000)
                page = await context.new_page()
                page.faults = []
                page.on("pageerror", lambda error: page.faults.append(str(error)))
                page.on("dialog", lambda dialog: page.faults.append(dialog.message))
                return page

            try:
                await visit(new_session)
            finally:
                await browser.close()

    asyncio.run(run())


async def enter(page: Any, url: str, name: str) -> None:
    """Opens the page and types a name; the field has the focus, so nothing is clicked."""
    await page.goto(url)
    await page.wait_for_selector("#name-form:not([hidden])")
    await page.keyboard.type(name)
    await page.keyboard.press("Enter")


async def shown_after(page: Any, question_id: str | None) -> str | None:
    """The id of the question that follows; None on the page that says that all is done."""
    reply = await page.wait_for_function(
        """before => {
          if (!document.getElementById("done").hidden) return {id: null};
          const form = document.getElementById("answer-form"), field = document.getElementById("answer");
          const ready = !form.hidden && !field.readOnly && document.activeElement === field;
          return ready && form.dataset.questionId !== before && {id: form.dataset.questionId};
        }""",
        arg=question_id,
        polling=10,
    )
    found: str | None = (await reply.json_value())["id"]
    return found


async def answer_all(page: Any, name: str, acknowledged: dict[str, str], each: Any = None) -> None:
    """Types and presses Enter until all is done.

    The page goes on only after an acknowledgement, or with a notice that somebody else was faster.
    """
    question_id = await shown_after(page, None)
    while question_id is not None:
        text = f"{name} {question_id}"
        await page.keyboard.type(text)
        await page.keyboard.press("Enter")
        following = await shown_after(page, question_id)
        if "Someone else answered" not in await page.inner_text("#notice"):
            assert question_id not in acknowledged
            acknowledged[question_id] = text
        if each is not None:
            await each()
        question_id = following


@pytest.mark.slow
def test_two_browsers_at_once_answer_200_questions_each_exactly_once(make_server: Any) -> None:
    server = make_server(questions(200))
    acknowledged: dict[str, str] = {}
    counts: list[int] = []

    async def visit(new_session: Any) -> None:
        async def person(name: str) -> None:
            page = await new_session()
            await enter(page, server.url, name)
            await answer_all(page, name, acknowledged)
            assert page.faults == []
            assert "200 of 200 done" in await page.inner_text("#progress-text")
            counts.append(sum(text.startswith(name) for text in acknowledged.values()))

        await asyncio.gather(person("anna"), person("ben"))

    in_browser(visit)
    rows = server.answers()
    assert Counter(row.question_id for row in rows) == Counter(task.question_id for task in questions(200))
    assert {row.question_id: row.answers for row in rows} == {q: [text] for q, text in acknowledged.items()}
    assert server.num_lines() == 200
    assert min(counts) > 20  # both took part all along


@pytest.mark.slow
def test_a_killed_server_loses_no_acknowledged_answer_and_open_pages_go_on(make_server: Any) -> None:
    server = make_server(questions(40))
    acknowledged: dict[str, str] = {}
    kills: list[int] = []

    async def visit(new_session: Any) -> None:
        async def kill_at_times() -> None:
            if len(acknowledged) >= 12 * (len(kills) + 1) and len(kills) < 2:
                kills.append(server.end())
                before = dict(acknowledged)
                kept = {row.question_id: row.answers for row in server.answers()}
                assert {q: [text] for q, text in before.items()}.items() <= kept.items()
                # The other browser presses Enter meanwhile, and has to say so and keep its text.
                await asyncio.sleep(1.0)
                server.start()

        async def person(name: str) -> None:
            page = await new_session()
            await enter(page, server.url, name)
            await answer_all(page, name, acknowledged, kill_at_times)
            assert page.faults == []

        await asyncio.gather(person("anna"), person("ben"))

    in_browser(visit)
    assert kills == [-signal.SIGKILL] * 2
    rows = server.answers()
    assert {row.question_id: row.answers for row in rows} == {q: [text] for q, text in acknowledged.items()}
    assert len(rows) == 40 == server.num_lines()


@pytest.mark.slow
def test_html_in_a_question_or_an_answer_is_shown_as_text_and_not_run(make_server: Any) -> None:
    attack = "<img src=x onerror=alert(1)><script>window.ran = 1</script>& <b>bold</b>"
    server = make_server([Task("</script>q", attack, [(attack, 2)], 0.5, 0.1), *questions(1)])

    async def visit(new_session: Any) -> None:
        page = await new_session()
        outside: list[str] = []
        page.on("request", lambda request: outside.append(request.url))
        await enter(page, server.url, "<i>anna</i>")
        await shown_after(page, None)
        assert await page.inner_text("#question") == attack
        await page.keyboard.press("Alt+m")
        await page.wait_for_selector("#model:not([hidden])")
        assert attack in await page.inner_text("#model")
        await page.keyboard.type(attack)
        await page.keyboard.press("Enter")
        await shown_after(page, "</script>q")
        await page.keyboard.press("Alt+b")
        await shown_after(page, "q000")
        assert await page.input_value("#answer") == attack
        assert await page.evaluate("window.ran") is None
        assert await page.locator("main img, main b, main i, header i").count() == 0
        assert await page.inner_text("#who") == "<i>anna</i>"
        assert page.faults == []
        assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:")) for url in outside)
        assert TOKEN not in page.url

    in_browser(visit)
    assert [row.answers for row in server.answers()] == [[attack]]


@pytest.mark.slow
def test_the_keys_skip_go_back_and_show_the_model_and_a_reload_keeps_the_text(make_server: Any) -> None:
    server = make_server(questions(3))

    async def visit(new_session: Any) -> None:
        page = await new_session()
        await enter(page, server.url, "anna")
        assert await shown_after(page, None) == "q000"
        assert not await page.locator("#model").is_visible()
        assert "guess" not in await page.content()
        await page.keyboard.press("Alt+m")
        await page.wait_for_selector("#model:not([hidden])")
        assert "a guess · 3×" in await page.inner_text("#model")
        # Typing goes on in the answer's field; an empty answer is not saved.
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#notice:not([hidden])")
        await page.keyboard.type("first try")
        await page.reload()
        await shown_after(page, None)
        assert await page.input_value("#answer") == "first try"
        await page.keyboard.press("Enter")
        assert await shown_after(page, "q000") == "q001"
        assert not await page.locator("#model").is_visible()
        # Text in the field is not dropped by one press.
        await page.keyboard.type("hm")
        await page.keyboard.press("Alt+n")
        await page.wait_for_selector("#notice:not([hidden])")
        assert await page.input_value("#answer") == "hm"
        await page.keyboard.press("Alt+n")
        assert await shown_after(page, "q001") == "q002"
        await page.keyboard.press("Alt+b")
        assert await shown_after(page, "q002") == "q001"
        await page.keyboard.press("Alt+b")
        assert await shown_after(page, "q001") == "q000"
        await page.keyboard.press("ControlOrMeta+a")
        await page.keyboard.type("second try")
        await page.keyboard.press("Enter")
        assert await shown_after(page, "q000") == "q002"
        await page.keyboard.press("Alt+n")
        assert await shown_after(page, "q002") is None
        assert page.faults == []

    in_browser(visit)
    said = {row.question_id: (row.answers, row.skipped) for row in server.answers()}
    assert said == {"q000": (["second try"], False), "q001": ([], True), "q002": ([], True)}


@pytest.mark.slow
def test_a_lost_connection_is_said_and_a_question_taken_meanwhile_costs_no_text(make_server: Any) -> None:
    server = make_server(questions(2))

    async def visit(new_session: Any) -> None:
        page = await new_session()
        await enter(page, server.url, "anna")
        assert await shown_after(page, None) == "q000"
        await page.context.set_offline(True)
        await page.keyboard.type("typed while cut off")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#trouble:not([hidden])")
        assert "connection is lost" in await page.inner_text("#trouble")
        assert await page.input_value("#answer") == "typed while cut off"
        # The server is started again and forgets who held what: another browser answers the question first.
        server.end()
        server.start()
        other = await new_session()
        await enter(other, server.url, "ben")
        assert await shown_after(other, None) == "q000"
        await other.keyboard.type("faster")
        await other.keyboard.press("Enter")
        assert await shown_after(other, "q000") == "q001"
        await page.context.set_offline(False)
        await page.wait_for_selector("#waiting:not([hidden])")
        assert "typed while cut off" in await page.inner_text("#notice")
        assert not await page.locator("#trouble").is_visible()
        await other.keyboard.press("Alt+n")
        await page.wait_for_selector("#done:not([hidden])")
        assert page.faults + other.faults == []

    in_browser(visit)
    assert [(row.question_id, row.answers) for row in server.answers()] == [("q000", ["faster"]), ("q001", [])]
    assert server.end(signal.SIGINT) == 0
