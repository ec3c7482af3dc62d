"""The live path: what a teacher is asked, what its faults lead to, and that nothing is paid twice."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from journals import Memory
from pydantic import ValidationError

from engine.store.journal import FileJournal
from ka2l.annotation.by_teacher import TeacherAnnotator
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.errors import BudgetError, ConfigError, EngineError, KA2LError
from ka2l.prompts import teacher_messages
from ka2l.teacher.config import Prices, TeacherConfig
from ka2l.teacher.endpoint import Teacher
from ka2l.teacher.limits import MoneyCap, RateLimit, backoff, retry_after
from ka2l.teacher.reply import TeacherRun, Usage
from ka2l.teacher.request import ShortAnswer, TeacherPrompt, cost_bound, request_body, request_key

REPOSITORY = Path(__file__).resolve().parents[3]
Servers = Callable[..., Any]


def configured(server: Any, **fields: Any) -> TeacherConfig:
    values = {"base_url": server.url, "model": "m", "backoff_base_s": 0.0, "concurrency": 1, "max_retries": 2}
    return TeacherConfig.model_validate(
        values | {"prices": {"input_per_million": 1.0, "output_per_million": 2.0}} | fields
    )


def prompts(num: int, kind: Any = ShortAnswer) -> dict[str, TeacherPrompt]:
    return {f"q{i}": TeacherPrompt(teacher_messages(f"What is {i}?"), kind) for i in range(num)}


def ask(server: Any, num: int = 1, journal: Any = None, cap: MoneyCap | None = None, **fields: Any) -> TeacherRun:
    journal = Memory() if journal is None else journal
    return Teacher(configured(server, **fields), "sk-secret", journal, cap).ask(prompts(num))


COST = (20 * 1.0 + 10 * 2.0) / 1e6  # of the server's usage figures

# --- answers ---------------------------------------------------------------------------------------------------------


def test_each_prompt_gets_its_parsed_answer_with_usage_cost_and_tries(teacher_server: Servers) -> None:
    run = ask(teacher_server(), 3, concurrency=2)
    assert list(run.results) == ["q0", "q1", "q2"]
    assert run.stopped is None
    assert run.num_requests == 3
    sample = run.results["q1"].samples[0]
    assert sample.parsed == ShortAnswer(answers=["answer to What is 1?"], abstain=False)
    assert (sample.num_prompt_tokens, sample.num_completion_tokens, sample.num_tries) == (20, 10, 1)
    assert sample.cost == pytest.approx(COST)


def test_free_text_is_asked_without_a_schema(teacher_server: Servers) -> None:
    server = teacher_server(content=lambda question, body: "  some text\n")
    run = Teacher(configured(server), "", Memory()).ask(prompts(1, None))
    assert run.results["q0"].usable == ["some text"]
    assert "response_format" not in server.requests[0][1]


def test_the_request_carries_schema_sampling_parameters_and_its_journal_key(teacher_server: Servers) -> None:
    server = teacher_server()
    journal = Memory()
    ask(server, journal=journal, temperature=0.7, max_tokens=99, token_limit_field="max_completion_tokens")
    key, body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("m", 0.7, 99)
    assert "max_tokens" not in body
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["answers", "abstain"]
    assert schema["additionalProperties"] is False
    assert list(journal) == [key]


def test_a_temperature_of_null_is_not_sent(teacher_server: Servers) -> None:
    server = teacher_server()
    ask(server, temperature=None)
    assert "temperature" not in server.requests[0][1]


def test_the_key_depends_on_what_changes_the_answer_and_on_nothing_else() -> None:
    config = TeacherConfig(model="m", temperature=1.0)
    one, other = prompts(2).values()
    key = request_key(config, one, 0, 0, False)
    changed = [
        request_key(config, other, 0, 0, False),
        request_key(config, one._replace(answer=None), 0, 0, False),
        request_key(config, one, 1, 0, False),
        request_key(config, one, 0, 1, False),
        request_key(config, one, 0, 0, True),
        *(
            request_key(config.model_copy(update=update), one, 0, 0, False)
            for update in ({"model": "n"}, {"temperature": 0.5}, {"max_tokens": 3})
        ),
    ]
    assert len({key, *changed}) == len(changed) + 1
    logistics = {"concurrency": 3, "timeout_s": 1.0, "prices": Prices(), "base_url": "http://elsewhere/v1"}
    assert request_key(config.model_copy(update=logistics), one, 0, 0, False) == key


def test_logistics_stay_out_of_the_fingerprint() -> None:
    fields = TeacherConfig(model="m").result_fields()
    assert set(fields) == {
        "base_url", "model", "temperature", "max_tokens", "num_samples", "min_agreement", "allow_abstain",
        "max_malformed",
    }  # fmt: skip


def test_samples_at_temperature_0_are_refused() -> None:
    with pytest.raises(ValidationError, match="temperature above 0"):
        TeacherConfig(model="m", num_samples=3)


def test_prompts_of_the_same_text_are_paid_once(teacher_server: Servers) -> None:
    server = teacher_server()
    prompt = prompts(1)["q0"]
    run = Teacher(configured(server, concurrency=4), "", Memory()).ask({"a": prompt, "b": prompt})
    assert server.num_requests == 1
    assert run.results["a"].usable == run.results["b"].usable != []
    assert (run.results["a"].cost, run.results["b"].cost) == (pytest.approx(COST), 0)
    assert run.usage == Usage(20, 10, pytest.approx(COST))


def test_a_text_that_another_prompt_has_paid_for_costs_nothing_in_a_later_run_either(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    prompt = prompts(1)["q0"]
    runs = [
        Teacher(configured(server), "", journal).ask(asked)
        for asked in ({"a": prompt}, {"b": prompt}, {"b": prompt, "a": prompt})
    ]
    assert [run.usage.num_prompt_tokens for run in runs] == [20, 0, 20]
    costs = [{name: result.cost for name, result in run.results.items()} for run in runs]
    assert costs == [{"a": pytest.approx(COST)}, {"b": 0}, {"b": 0, "a": pytest.approx(COST)}]
    assert server.num_requests == 1


# --- the journal -----------------------------------------------------------------------------------------------------


def test_what_the_journal_holds_is_not_asked_again_and_gives_the_identical_result(teacher_server: Servers) -> None:
    server = teacher_server({2: "malformed"})
    journal = Memory()
    first = ask(server, 3, journal)
    num = server.num_requests
    again = ask(server, 3, journal)
    assert again.num_requests == 0
    assert again.results == first.results
    ask(server, 5, journal)
    assert server.num_requests == num + 2


def test_an_answer_is_journalled_before_its_result_is_there(teacher_server: Servers) -> None:
    class Failing(Memory):
        def put(self, key: str, record: Mapping[str, Any]) -> None:
            super().put(key, record)
            raise OSError("gone")

    server, journal = teacher_server(), Failing()
    with pytest.raises(OSError, match="gone"):
        ask(server, 3, journal)
    assert len(journal) == 1
    run = ask(server, 3, Memory(journal))
    assert run.num_requests == 2


def test_prices_at_the_time_of_the_answer_count(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    first = ask(server, 1, journal)
    again = ask(server, 1, journal, prices={"input_per_million": 100.0})
    assert again.results["q0"].cost == first.results["q0"].cost == pytest.approx(COST)


def test_requests_under_way_end_and_are_kept_when_another_stops_the_run(teacher_server: Servers) -> None:
    arrived = queue.Queue[int]()

    def on_phase(number: int, phase: str) -> None:
        if phase == "received":
            arrived.put(number)
            while arrived.qsize() < 3:
                server.released.wait(0.005)

    server = teacher_server({1: "401", 2: "slow", 3: "slow"}, on_phase=on_phase)
    journal = Memory()
    with pytest.raises(ConfigError):
        ask(server, 9, journal, concurrency=3)
    assert server.num_requests == 3
    assert set(journal) == set(server.billed)
    assert len(journal) == 2


# --- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    ["429", "429_retry_after", "500", "503", "error_200", "cut_before", "cut_billed", "cut_middle"],
)
def test_a_passing_fault_is_tried_again_under_the_same_key(teacher_server: Servers, fault: str) -> None:
    server = teacher_server({1: fault, 2: fault}, gateway=True)
    run = ask(server)
    sample = run.results["q0"].samples[0]
    assert sample.parsed.answers == ["answer to What is 0?"]
    assert sample.num_tries == 3
    assert len({key for key, _ in server.requests}) == 1
    # The gateway handed out again what was cut on its way.
    assert list(server.billed.values()) == [1]
    assert sample.cost == pytest.approx(COST)


@pytest.mark.parametrize("fault", ["duplicate", "slow", "fenced", "repeats"])
def test_an_odd_but_whole_answer_needs_no_second_try(teacher_server: Servers, fault: str) -> None:
    run = ask(teacher_server({1: fault}))
    assert run.num_requests == 1
    assert run.results["q0"].refusal is None


def test_an_endpoint_that_hangs_is_given_up_after_the_timeout_and_asked_again(teacher_server: Servers) -> None:
    # Many retries: on a busy machine a good answer may come late too.
    server = teacher_server({1: "hang"}, gateway=True)
    run = ask(server, timeout_s=0.3, max_retries=100)
    assert run.results["q0"].samples[0].num_tries >= 2
    assert list(server.billed.values()) == [1]


def test_a_reply_that_stalls_half_way_counts_as_a_timeout(teacher_server: Servers) -> None:
    def on_phase(number: int, phase: str) -> None:
        if phase == "half_sent" and number == 1:
            server.released.wait(30)

    server = teacher_server(on_phase=on_phase, gateway=True)
    run = ask(server, timeout_s=0.3, max_retries=100)
    assert run.results["q0"].samples[0].num_tries >= 2
    assert list(server.billed.values()) == [1]


def test_a_prompt_that_always_fails_is_refused_and_the_others_go_on(teacher_server: Servers) -> None:
    server = teacher_server(lambda number, body: "500" if "What is 1?" in str(body) else None)
    run = ask(server, 3)
    assert run.results["q1"].refusal is not None
    assert "no answer after 3 tries" in run.results["q1"].refusal
    assert run.results["q1"].num_tries == 3
    assert [run.results[name].refusal for name in ("q0", "q2")] == [None, None]


def test_an_endpoint_that_answers_nobody_is_an_error_and_refuses_nothing(teacher_server: Servers) -> None:
    server, journal = teacher_server(lambda number, body: "503" if 2 < number <= 23 else None), Memory()
    for num_requests in (2 + 3 * 3, 11 + 4 * 3):  # the second time, one more than those that failed before
        with pytest.raises(EngineError, match="gives no answers"):
            ask(server, 20, journal)
        assert server.num_requests == num_requests
    assert not any(result.refusal for result in ask(server, 20, journal).results.values())
    assert server.billed.total() == 20


@pytest.mark.parametrize("fault", ["500", "cut_before"])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_prompt_that_fails_alone_ends_one_run_and_is_refused_by_the_next(
    teacher_server: Servers, fault: str, num_samples: int
) -> None:
    server, journal = teacher_server(lambda number, body: fault), Memory()
    fields = {"num_samples": num_samples, "temperature": 1.0, "max_retries": 1}
    with pytest.raises(EngineError, match="gives no answers"):
        ask(server, 1, journal, **fields)
    run = ask(server, 1, journal, **fields)
    assert "no answer after 2 tries" in str(run.results["q0"].refusal)


def test_a_prompt_that_was_given_up_and_refused_does_not_end_the_run_that_asks_it_again(
    teacher_server: Servers,
) -> None:
    server, journal = teacher_server(lambda number, body: "500" if "What is 1?" in str(body) else None), Memory()
    first = ask(server, 3, journal)
    again = ask(server, 3, journal)
    assert again.results["q1"].refusal == first.results["q1"].refusal
    assert again.num_requests == 3
    # Not for ever: the endpoint may be mended.
    server.fault_of = lambda number, body: None
    assert ask(server, 3, journal).results["q1"].refusal is None


def test_a_prompt_that_failed_before_is_not_refused_while_the_endpoint_is_away(teacher_server: Servers) -> None:
    server, journal = teacher_server(lambda number, body: "500"), Memory()
    with pytest.raises(EngineError):
        ask(server, 1, journal)
    with pytest.raises(EngineError, match="gives no answers"):
        ask(server, 1, journal, base_url="http://127.0.0.1:9/v1")
    server.fault_of = lambda number, body: "429"
    with pytest.raises(EngineError, match="gives no answers"):
        ask(server, 1, journal)


def test_no_server_at_all_is_an_error() -> None:
    config = TeacherConfig(base_url="http://127.0.0.1:9/v1", model="m", backoff_base_s=0, max_retries=1)
    cap = MoneyCap()
    with pytest.raises(EngineError, match="gives no answers"):
        Teacher(config, "", Memory(), cap).ask(prompts(2))


def test_an_endpoint_that_asks_to_wait_for_hours_ends_the_run(teacher_server: Servers) -> None:
    with pytest.raises(EngineError, match="asks to wait 86400 s"):
        ask(teacher_server({2: "429_tomorrow"}), 3)


# --- faults that stop at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("401", ConfigError, "refuses the API key"),
        ("403", ConfigError, "refuses the API key"),
        ("404", ConfigError, "knows no model 'm'"),
        ("402", BudgetError, "no money left"),
        ("no_quota", BudgetError, "no money left"),
        ("400_parameter", ConfigError, "refuses a parameter"),
    ],
)
def test_what_no_retry_can_mend_stops_at_once_and_says_what_to_do(
    teacher_server: Servers, fault: str, error: type[KA2LError], says: str
) -> None:
    server = teacher_server({2: fault})
    with pytest.raises(error, match=says) as raised:
        ask(server, 5)
    assert server.num_requests == 2
    assert raised.value.exit_code == 2
    assert raised.value.hint
    assert "sk-secret" not in str(raised.value)


def test_a_request_that_the_endpoint_refuses_is_refused_without_a_retry(teacher_server: Servers) -> None:
    server, journal = teacher_server({1: "400"}), Memory()
    run = ask(server, 2, journal)
    assert run.num_requests == 2
    assert "prompt too long" in str(run.results["q0"].refusal)
    assert (run.results["q0"].num_tries, run.results["q0"].cost) == (1, 0)
    assert run.results["q1"].refusal is None
    # Nor when the run goes on in another process.
    assert ask(server, 2, journal) == run._replace(num_requests=0)


def test_a_lone_refused_prompt_is_not_asked_again_either(teacher_server: Servers) -> None:
    server, journal = teacher_server(lambda number, body: "400"), Memory()
    run = ask(server, 1, journal)
    assert "prompt too long" in str(run.results["q0"].refusal)
    assert ask(server, 1, journal) == run._replace(num_requests=0)


def test_an_endpoint_that_refuses_everything_is_an_error_and_what_it_refused_is_asked_again(
    teacher_server: Servers,
) -> None:
    server, journal = teacher_server(lambda number, body: "400" if number <= 4 else None), Memory()
    with pytest.raises(ConfigError, match=r"refused all 4 prompts; .*prompt too long"):
        ask(server, 4, journal)
    assert not journal
    assert not any(result.refusal for result in ask(server, 4, journal).results.values())
    # Once it has answered somebody, refusals are believed, however many.
    server.fault_of = lambda number, body: "400"
    teacher = Teacher(configured(server), "", journal)
    teacher.ask(prompts(4))
    more = {f"new-{name}": prompt for name, prompt in prompts(9).items() if name > "q3"}
    assert all(result.refusal for result in teacher.ask(more).results.values())


# --- unusable answers ------------------------------------------------------------------------------------------------

UNUSABLE = ["malformed", "wrong_schema", "says_nothing", "garbage", "length"]


@pytest.mark.parametrize("fault", UNUSABLE)
def test_an_unusable_answer_is_paid_journalled_and_asked_again_under_a_new_key(
    teacher_server: Servers, fault: str
) -> None:
    server, journal = teacher_server({1: fault}, gateway=True), Memory()
    run = ask(server, 1, journal)
    sample = run.results["q0"].samples[0]
    assert sample.parsed.answers == ["answer to What is 0?"]
    assert sample.num_tries == 2
    assert len(set(journal)) == 2
    assert sample.cost == pytest.approx(sum(record["cost"] for record in journal.values()))
    assert sample.cost >= 2 * COST * 0.999
    assert ask(server, 1, journal).num_requests == 0


@pytest.mark.parametrize("fault", UNUSABLE)
def test_a_prompt_with_unusable_answers_only_is_refused_for_good(teacher_server: Servers, fault: str) -> None:
    server, journal = teacher_server(lambda number, body: fault), Memory()
    run = ask(server, 1, journal, max_malformed=1)
    assert server.num_requests == 2
    assert str(run.results["q0"].refusal).startswith("2 unusable replies, the last ")
    assert run.results["q0"].cost >= 2 * COST * 0.999
    assert ask(server, 1, journal, max_malformed=1) == run._replace(num_requests=0)


@pytest.mark.parametrize("fault", ["refuses", "content_filter"])
def test_a_refusal_by_the_model_is_final(teacher_server: Servers, fault: str) -> None:
    run = ask(teacher_server({1: fault}))
    assert run.num_requests == 1
    assert run.results["q0"].refusal
    assert run.results["q0"].cost == pytest.approx(COST)


def test_usage_that_is_not_reported_counts_at_its_upper_bound(teacher_server: Servers) -> None:
    server = teacher_server({1: "no_usage"})
    config = configured(server)
    run = ask(server)
    body = request_body(config, prompts(1)["q0"], False)
    assert run.results["q0"].cost == pytest.approx(cost_bound(config, body))


def test_an_endpoint_without_schemas_is_asked_in_words_once_and_for_all(teacher_server: Servers) -> None:
    server, journal = teacher_server(without_schema=True), Memory()
    run = ask(server, 3, journal)
    assert [result.refusal for result in run.results.values()] == [None] * 3
    assert server.num_requests == 4
    assert '"abstain"' in server.requests[1][1]["messages"][-1]["content"]
    assert ask(server, 3, journal) == run._replace(num_requests=0, results=_tries_of_one(run))
    ask(server, 4, journal)
    assert server.num_requests == 5


def _tries_of_one(run: TeacherRun) -> dict[str, Any]:
    """Faults before an answer are not remembered."""
    return {
        name: result._replace(samples=[sample._replace(num_tries=1) for sample in result.samples])
        for name, result in run.results.items()
    }


# --- money -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
def test_spending_never_passes_the_cap_and_what_was_answered_comes_back(
    teacher_server: Servers, concurrency: int
) -> None:
    server, journal = teacher_server(), Memory()
    config = configured(server)
    bound = cost_bound(config, request_body(config, prompts(1)["q0"], False))
    cap = MoneyCap(bound + 4.5 * COST)
    run = ask(server, 20, journal, cap, concurrency=concurrency)
    assert run.stopped == "money"
    # The fifth answer left room for one more request's bound only by half an answer's cost.
    assert len(run.results) == server.num_requests == 5
    assert cap.spent == pytest.approx(5 * COST)
    assert cap.reserved == pytest.approx(0, abs=1e-12)

    richer = ask(server, 20, journal, MoneyCap(1.0), concurrency=concurrency)
    assert richer.stopped is None
    assert len(richer.results) == 20
    assert server.num_requests == 20


def test_a_cap_too_small_for_one_request_sends_none(teacher_server: Servers) -> None:
    server = teacher_server()
    run = ask(server, 3, cap=MoneyCap(1e-9))
    assert run == TeacherRun({}, "money", 0)
    assert server.num_requests == 0


def test_answers_of_earlier_runs_count_against_the_cap_once(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    ask(server, 4, journal)
    cap = MoneyCap(1.0)
    for key, record in journal.items():
        cap.count(key, record["cost"])
    ask(server, 4, journal, cap)
    assert cap.spent == pytest.approx(4 * COST)


def test_a_request_that_got_lost_may_be_billed_and_counts(teacher_server: Servers) -> None:
    server = teacher_server({1: "cut_billed"})
    config = configured(server)
    cap = MoneyCap(1.0)
    ask(server, 1, cap=cap)
    assert cap.lost == pytest.approx(cost_bound(config, request_body(config, prompts(1)["q0"], False)))
    assert sum(server.billed.values()) * COST <= cap.spent + cap.lost


def test_retries_of_lost_requests_stay_under_the_cap(teacher_server: Servers) -> None:
    server = teacher_server(lambda number, body: "cut_billed")
    config = configured(server)
    bound = cost_bound(config, request_body(config, prompts(1)["q0"], False))
    run = ask(server, 5, cap=MoneyCap(2.5 * bound), max_retries=50)
    assert run == TeacherRun({}, "money", 2)


def test_a_cap_without_prices_is_refused(teacher_server: Servers) -> None:
    with pytest.raises(ConfigError, match="needs the teacher's prices"):
        ask(teacher_server(), prices=None, cap=MoneyCap(1.0))


def test_the_bound_covers_scripts_of_one_token_a_character() -> None:
    config = TeacherConfig(model="m", max_tokens=1, prices=Prices(input_per_million=1e6))
    prompt = TeacherPrompt([{"role": "user", "content": "世" * 100}])
    assert cost_bound(config, request_body(config, prompt, False)) >= 100


# --- pace ------------------------------------------------------------------------------------------------------------


def test_no_more_requests_than_allowed_are_under_way(teacher_server: Servers) -> None:
    server = teacher_server(lambda number, body: "slow")
    ask(server, 12, concurrency=3)
    assert 1 < server.most_under_way <= 3


def test_a_rate_limit_spaces_its_units() -> None:
    limit = RateLimit(60)
    assert [limit.reserve(1, now) for now in (100.0, 100.0, 100.5, 110.0, 110.0)] == [0, 1, 1.5, 0, 1]
    assert RateLimit(600).reserve(1000, 5.0) == 0
    tokens = RateLimit(600)
    assert [tokens.reserve(300, 5.0), tokens.reserve(1, 5.0)] == [0, 30]
    assert [RateLimit(None).reserve(10**9, 1.0) for _ in range(2)] == [0, 0]


def test_a_pause_holds_everybody_back() -> None:
    limit = RateLimit(None)
    limit.pause(107.0)
    assert [limit.reserve(1, 100.0), limit.reserve(1, 106.0), limit.reserve(1, 108.0)] == [7, 1, 0]


def test_the_client_waits_for_its_turn(teacher_server: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    _sleep_at_once(monkeypatch, slept)
    ask(teacher_server(), 4, requests_per_minute=1)
    assert len([seconds for seconds in slept if seconds > 30]) == 3
    ask(teacher_server(), 2, tokens_per_minute=60)
    assert slept[-1] > 256  # prompt and max_tokens at one a second


def test_retry_after_is_waited_for_by_all(teacher_server: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["teacher_server"].ERRORS, "429_retry_after", (429, {}, {"Retry-After": "7"}))
    slept: list[float] = []
    _sleep_at_once(monkeypatch, slept)
    ask(teacher_server({1: "429_retry_after"}))
    assert slept[0] == pytest.approx(7.0)


def _sleep_at_once(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    async def sleep(seconds: float, result: Any = None) -> Any:
        slept.append(seconds)
        return result

    monkeypatch.setattr("ka2l.teacher.endpoint.asyncio.sleep", sleep)


def test_backoff_grows_is_jittered_and_capped() -> None:
    for num_faults, most in ((1, 1.0), (2, 2.0), (4, 8.0), (9, 30.0)):
        waits = [backoff(num_faults, 1.0, 30.0) for _ in range(200)]
        assert 0 <= min(waits) < most / 2 < max(waits) <= most


def test_retry_after_is_read_as_seconds_milliseconds_or_date() -> None:
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}) > 1e9
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


# --- the annotator ---------------------------------------------------------------------------------------------------


def annotator(server: Any, journal: Any = None, **fields: Any) -> TeacherAnnotator:
    config = configured(server, **fields)
    teacher = Teacher(config, "", Memory() if journal is None else journal)
    return TeacherAnnotator(config, teacher.ask, LexicalEquivalence())


def in_turn(*replies: Any) -> Callable[[str, Mapping[str, Any]], str]:
    """A teacher that gives these answers (None abstains), one a request."""
    left = iter(replies)

    def content(question: str, body: Mapping[str, Any]) -> str:
        answers = next(left)
        return json.dumps({"answers": answers or [], "abstain": answers is None})

    return content


def test_annotations_carry_their_provenance_and_are_identical_after_a_restart(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    made = annotator(server, journal).annotate({"a": "Who?", "b": "When?"})
    assert [row.question_id for row in made] == ["a", "b"]
    assert made[0].answers == ["answer to Who?"]
    assert (made[0].annotator, made[0].question, made[0].cost) == ("m", "Who?", pytest.approx(COST))
    assert made[0].prompt_sha256 != made[1].prompt_sha256
    assert annotator(server, journal).annotate({"a": "Who?", "b": "When?"}) == made
    assert server.num_requests == 2


def test_samples_that_agree_give_the_answer_and_its_other_wordings(teacher_server: Servers) -> None:
    replies = (["Paris", "City of Paris"], ["Lyon"], ["paris", "Paris, France"], None)
    server = teacher_server(content=in_turn(*replies))
    row = annotator(server, num_samples=4, temperature=1.0).annotate({"a": "Capital?"})[0]
    assert row.answers[0] == "Paris"
    assert "Lyon" not in row.answers
    assert "City of Paris" in row.answers
    assert len(row.answers) == len({answer.lower() for answer in row.answers})
    assert row.cost == pytest.approx(4 * COST)


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([["1"], ["2"], ["3"], ["3"]], "no agreement: 2 of 4"),
        ([["1"], ["1"], None, None], "no agreement: 2 of 4"),
        ([None] * 4, "abstained"),
    ],
)
def test_questions_without_agreement_are_left_out_with_reason_and_cost(
    teacher_server: Servers, replies: list[Any], reason: str
) -> None:
    server = teacher_server(content=in_turn(*replies))
    asked = annotator(server, num_samples=4, temperature=1.0, min_agreement=0.75)
    assert asked.annotate({"a": "How many?"}) == []
    assert reason in asked.refusals["a"].reason
    assert asked.cost_refused == pytest.approx(4 * COST)


def test_one_failed_sample_counts_as_disagreement_only(teacher_server: Servers) -> None:
    server = teacher_server({1: "400"}, content=in_turn(["7"], ["7"]))
    asked = annotator(server, num_samples=3, temperature=1.0, min_agreement=0.6)
    assert [row.answers for row in asked.annotate({"a": "How many?"})] == [["7"]]


def test_abstaining_can_be_forbidden(teacher_server: Servers) -> None:
    content = lambda question, body: '{"answers": ["guess"], "abstain": true}'  # noqa: E731
    assert annotator(teacher_server(content=content)).annotate({"a": "Who?"}) == []
    rows = annotator(teacher_server(content=content), allow_abstain=False).annotate({"a": "Who?"})
    assert rows[0].answers == ["guess"]


def test_a_cap_leaves_the_rest_unasked_rather_than_refused(teacher_server: Servers) -> None:
    server = teacher_server()
    config = configured(server)
    bound = cost_bound(config, request_body(config, prompts(1)["q0"], False))
    teacher = Teacher(config, "", Memory(), MoneyCap(bound * 1.01))
    asked = TeacherAnnotator(config, teacher.ask, LexicalEquivalence())
    made = asked.annotate({f"q{i}": f"What is {i}?" for i in range(50)})
    assert asked.stopped == "money"
    assert 1 <= len(made) < 50
    assert not asked.refusals


# --- killed ----------------------------------------------------------------------------------------------------------

QUESTIONS = {f"q{i}": f"What is {i}?" for i in range(14)}
NUM_SAMPLES = 4
NUM_REQUESTS = len(QUESTIONS) * NUM_SAMPLES
PHASES = ("received", "billed", "half_sent", "sent")


class Killer:
    """Runs annotation in processes of its own and kills them when the server sees what it waits for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job.json"
        self.driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("teacher_kill_driver.py")), str(self.job)],
            cwd=REPOSITORY,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid: queue.Queue[int] = queue.Queue()
        self.wanted: tuple[int, str] | None = None
        self.lock = threading.Lock()
        self.num_journals = 0

    def prepare(
        self, server: Any, concurrency: int = 4, batch: bool = False, questions: Mapping[str, str] | None = None
    ) -> None:
        """A new campaign: an empty journal."""
        self.num_journals += 1
        self.journal = self.folder / f"journal-{self.num_journals}.jsonl"
        self.out = self.folder / "out.json"
        self.out.unlink(missing_ok=True)
        config = configured(server, concurrency=concurrency, num_samples=NUM_SAMPLES, temperature=1.0)
        job = {"config": config.model_dump(mode="json"), "questions": questions or QUESTIONS, "batch": batch}
        self.job.write_text(json.dumps(job | {"journal": str(self.journal), "out": str(self.out)}))

    def on_phase(self, number: int, phase: str) -> None:
        # At the number or after: the phase of that very request may not come, where its client is dead already.
        with self.lock:
            if self.wanted is None or number < self.wanted[0] or phase != self.wanted[1]:
                return
            self.wanted = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid.get(timeout=60), signal.SIGKILL)

    def run(self, line: str = "run", kill_at: tuple[int, str] | None = None) -> int:
        """One process; returns its exit status as os.waitpid gives it (9 where it was killed)."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.pid, self.wanted = queue.Queue(), kill_at
        self.driver.stdin.write(line + "\n")
        self.driver.stdin.flush()
        self.pid.put(int(self.driver.stdout.readline()))
        return int(self.driver.stdout.readline())

    def answered(self) -> set[str]:
        """Keys of the answers that the journal holds."""
        journal = FileJournal(self.journal)
        journal.close()
        return {key for key, record in journal.items() if "content" in record}


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    made = Killer(tmp_path)
    yield made
    assert made.driver.stdin is not None
    made.driver.stdin.close()
    made.driver.wait(30)
    assert made.driver.stdout is not None
    made.driver.stdout.close()


def check_books(server: Any, killer: Killer, reference: Any) -> None:
    """Every answer is there, and none was billed twice."""
    assert set(server.billed) == killer.answered()
    assert set(server.billed.values()) == {1}
    assert len(server.billed) == NUM_SAMPLES * len(reference)
    out = json.loads(killer.out.read_text())
    assert [(row["question_id"], row["answers"], row["cost"]) for row in out["rows"]] == reference
    assert not out["refusals"]


REFERENCE = [
    (name, [f"answer to {question}"], pytest.approx(NUM_SAMPLES * COST)) for name, question in QUESTIONS.items()
]


def test_a_campaign_killed_again_and_again_pays_every_answer_once(teacher_server: Servers, killer: Killer) -> None:
    """Every process dies a few requests after its first, in all phases of a request."""
    server = teacher_server(gateway=True, on_phase=killer.on_phase)
    killer.prepare(server)
    num_killed = 0
    while (status := killer.run(kill_at=(server.num_requests + 1 + num_killed % 5, PHASES[num_killed % 4]))) == 9:
        num_killed += 1
        assert num_killed < 10 * NUM_REQUESTS
    assert status == 0
    assert num_killed > NUM_REQUESTS / 8
    check_books(server, killer, REFERENCE)


@pytest.mark.slow
@pytest.mark.whole
def test_a_campaign_killed_once_at_any_request_pays_every_answer_once(teacher_server: Servers, killer: Killer) -> None:
    num_killed = 0
    for request in range(1, NUM_REQUESTS + 1):
        server = teacher_server(gateway=True, on_phase=killer.on_phase)
        killer.prepare(server)
        num_killed += killer.run(kill_at=(request, PHASES[request % 4])) == 9
        assert killer.run() == 0
        check_books(server, killer, REFERENCE)
    assert num_killed >= 50


def test_without_a_gateway_only_requests_under_way_at_the_kill_are_billed_again(
    teacher_server: Servers, killer: Killer
) -> None:
    concurrency, num_killed = 2, 0
    server = teacher_server(on_phase=killer.on_phase)
    killer.prepare(server, concurrency)
    held: set[str] = set()
    seen = 0
    status = 9
    while status == 9:
        status = killer.run(kill_at=(server.num_requests + 4 + num_killed, PHASES[num_killed % 4]))
        num_killed += status == 9
        # What the journal held when the process began was not asked for by it.
        assert not held & {key for key, _ in server.requests[seen:]}
        seen, held = server.num_requests, killer.answered()
    assert status == 0
    assert num_killed >= 4
    assert sum(server.billed.values()) <= NUM_REQUESTS + num_killed * concurrency
    assert set(server.billed) == held


def test_an_answer_cut_while_being_written_to_the_journal_is_handed_out_again(
    teacher_server: Servers, killer: Killer
) -> None:
    server = teacher_server(gateway=True)
    killer.prepare(server)
    for number in range(1, 8):
        assert killer.run(f"torn {number}") == 9
    assert killer.run() == 0
    check_books(server, killer, REFERENCE)


@pytest.mark.slow
def test_a_batch_killed_at_every_write_is_paid_once(teacher_server: Servers, killer: Killer) -> None:
    """Every process dies half way through its second record, so each record but the first is torn once."""
    server = teacher_server()
    server.batch_faults = {"What is 1?": "expired"}
    killer.prepare(server, batch=True)
    num_killed = 0
    while (status := killer.run("torn 2")) == 9:
        num_killed += 1
        assert num_killed < 10 * NUM_REQUESTS
    assert status == 0
    assert num_killed >= 50
    assert len(server.batches) == 2
    check_books(server, killer, REFERENCE)


@pytest.mark.slow
def test_a_batch_killed_at_any_call_to_the_endpoint_is_paid_once(teacher_server: Servers, killer: Killer) -> None:
    """Handing in, finding again, looking and downloading, twice over: one row expires and goes into a second batch."""
    questions = {name: QUESTIONS[name] for name in ("q0", "q1")}
    num_killed = num_calls = 0
    while num_killed == 2 * num_calls:
        num_calls += 1
        for phase in ("call_received", "call_answered"):
            server = teacher_server(on_phase=killer.on_phase)
            server.batch_faults = {"What is 1?": "expired"}
            killer.prepare(server, batch=True, questions=questions)
            num_killed += killer.run(kill_at=(num_calls, phase)) == 9
            assert killer.run() == 0
            assert len(server.batches) == 2
            check_books(server, killer, REFERENCE[:2])
    assert num_killed >= 2 * 11 - 1
