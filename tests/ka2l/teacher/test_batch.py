"""The Batch API path: one job at a time, found again after a kill, answers under the same keys as live."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from journals import Killed, Memory

from ka2l.annotation.by_teacher import TeacherAnnotator
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.errors import AnnotationsPending, ConfigError, EngineError
from ka2l.prompts import teacher_messages
from ka2l.teacher.batch import collect_batch, submit_batch
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import Teacher
from ka2l.teacher.limits import MoneyCap
from ka2l.teacher.reply import TeacherRun
from ka2l.teacher.request import ShortAnswer, TeacherPrompt, cost_bound, request_body

Servers = Callable[..., Any]
COST = (20 * 1.0 + 10 * 2.0) / 1e6  # of the server's usage figures


def configured(server: Any, **fields: Any) -> TeacherConfig:
    prices = {"input_per_million": 1.0, "output_per_million": 2.0}
    values = {"base_url": server.url, "model": "m", "max_retries": 0, "prices": prices}
    return TeacherConfig.model_validate(values | fields)


def prompts(num: int) -> dict[str, TeacherPrompt]:
    return {f"q{i}": TeacherPrompt(teacher_messages(f"What is {i}?"), ShortAnswer) for i in range(num)}


def collect(server: Any, num: int, journal: Memory, cap: MoneyCap | None = None, **fields: Any) -> TeacherRun:
    return collect_batch(configured(server, **fields), "", journal, prompts(num), cap)


def test_a_batch_under_way_is_pending_and_its_answers_come_later(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_status = "in_progress"
    batch_id = submit_batch(configured(server), "", journal, prompts(3))
    for _ in range(2):
        with pytest.raises(AnnotationsPending, match=f"batch {batch_id} .* in_progress"):
            collect(server, 3, journal)
    server.batch_status = "completed"
    run = collect(server, 3, journal)
    assert list(run.results) == ["q0", "q1", "q2"]
    assert run.results["q2"].usable == [ShortAnswer(answers=["answer to What is 2?"], abstain=False)]
    assert run.results["q2"].cost == pytest.approx(COST)
    assert server.batch_calls["create"] == 1
    assert collect(server, 3, journal) == run._replace(num_requests=0)
    assert submit_batch(configured(server), "", journal, prompts(3)) is None


def test_the_batch_and_the_live_path_know_each_others_answers(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    config = configured(server)
    live = Teacher(config, "", journal).ask(prompts(2))
    run = collect(server, 4, journal)
    assert sorted(server.billed.values()) == [1] * 4
    assert {name: run.results[name] for name in live.results} == live.results
    again = Teacher(config, "", journal).ask(prompts(4))
    assert again == run._replace(num_requests=0)


def test_a_batch_made_just_before_a_kill_is_found_again(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    journal.dies_at = 1
    with pytest.raises(Killed):
        submit_batch(configured(server), "", journal, prompts(3))
    assert not journal
    assert len(server.batches) == 1
    # Whatever a cap would let through now.
    assert submit_batch(configured(server), "", journal, prompts(3), MoneyCap(1.0)) == "batch_0"
    assert len(collect(server, 3, journal).results) == 3
    assert server.batch_calls["create"] == 1


def test_a_batch_whose_making_was_not_reported_back_is_found_again(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.cut_batch_create = True
    with pytest.raises(EngineError, match="Batch API"):
        submit_batch(configured(server), "", journal, prompts(3))
    assert len(collect(server, 3, journal).results) == 3
    assert sorted(server.billed.values()) == [1] * 3


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_killed_at_any_write_no_answer_is_paid_twice_or_missing(teacher_server: Servers, dies_at: int) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {"What is 1?": "malformed"}
    journal.dies_at = dies_at
    with pytest.raises(Killed):
        collect(server, 3, journal, max_malformed=1)
    run = collect(server, 3, journal, max_malformed=1)
    assert [name for name, result in run.results.items() if result.refusal] == ["q1"]
    assert run.results["q1"].cost == pytest.approx(2 * COST)
    assert set(server.billed.values()) == {1}
    assert len(server.billed) == 4
    assert server.batch_calls["create"] == len(server.batches) <= 2


def test_expired_rows_go_into_another_batch_and_repeated_rows_count_once(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {"What is 0?": "expired", "What is 1?": "twice"}
    run = collect(server, 3, journal)
    assert len(server.batches) == 2
    assert run.num_requests == 4
    assert sorted(server.billed.values()) == [1] * 3
    assert sum(result.cost for result in run.results.values()) == pytest.approx(3 * COST)


def test_unusable_rows_are_paid_asked_again_and_refused_in_the_end(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {"What is 0?": "malformed", "What is 1?": "500"}
    run = collect(server, 3, journal, max_malformed=1)
    assert len(server.batches) == 2
    assert "2 unusable replies" in str(run.results["q0"].refusal)
    assert run.results["q0"].cost == pytest.approx(2 * COST)
    assert "HTTP 500" in str(run.results["q1"].refusal)
    assert run.results["q1"].cost == 0
    assert run.results["q2"].refusal is None


def test_rows_that_the_endpoint_refuses_are_not_handed_in_again(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {"What is 0?": "400"}
    run = collect(server, 3, journal)
    assert "prompt too long" in str(run.results["q0"].refusal)
    assert run.num_requests == 3
    assert collect(server, 3, journal) == run._replace(num_requests=0)
    assert len(server.batches) == 1


def test_a_batch_of_which_every_row_is_refused_is_an_error_and_can_be_handed_in_again(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {f"What is {i}?": "400" for i in range(3)}
    with pytest.raises(ConfigError, match=r"refused all 3 prompts; .*prompt too long"):
        collect(server, 3, journal)
    server.batch_faults = {}
    assert not any(result.refusal for result in collect(server, 3, journal).results.values())


def test_an_endpoint_without_schemas_gets_a_second_batch_in_words(teacher_server: Servers) -> None:
    server, journal = teacher_server(without_schema=True), Memory()
    run = collect(server, 3, journal)
    assert [result.refusal for result in run.results.values()] == [None] * 3
    assert len(server.batches) == 2
    assert set(server.billed.values()) == {1}


def test_a_batch_that_is_refused_as_a_whole_says_why_and_can_be_handed_in_again(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_status = "failed"
    with pytest.raises(EngineError, match="line 1 is wrong"):
        collect(server, 2, journal)
    server.batch_status = "completed"
    assert len(collect(server, 2, journal).results) == 2


def test_a_row_that_shows_a_wrong_model_stops_but_keeps_the_other_answers(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    server.batch_faults = {"What is 0?": "404"}
    with pytest.raises(ConfigError, match="knows no model"):
        collect(server, 2, journal)
    server.batch_faults = {}
    assert len(collect(server, 2, journal).results) == 2
    assert sorted(server.billed.values()) == [1, 1]


def test_only_what_fits_under_the_cap_is_handed_in(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    config = configured(server)
    bound = cost_bound(config, request_body(config, prompts(1)["q0"], False))
    limit = bound + 5 * COST
    cap = MoneyCap(limit)
    run = collect(server, 40, journal, cap)
    assert run.stopped == "money"
    assert 1 <= len(run.results) == sum(server.billed.values()) < 40
    assert cap.spent <= limit
    assert cap.reserved == pytest.approx(0, abs=1e-12)


def test_an_unreachable_batch_api_is_an_error_that_says_resuming_is_safe() -> None:
    config = TeacherConfig(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    with pytest.raises(EngineError, match="Batch API") as raised:
        collect_batch(config, "", Memory(), prompts(2))
    assert "found again" in str(raised.value.hint)


def test_an_annotator_works_through_batches_alike(teacher_server: Servers) -> None:
    server, journal = teacher_server(), Memory()
    config = configured(server)
    asked = TeacherAnnotator(config, partial(collect_batch, config, "", journal), LexicalEquivalence())
    made = asked.annotate({"a": "Who?", "b": "When?"})
    assert [row.answers for row in made] == [["answer to Who?"], ["answer to When?"]]
    assert asked.annotate({"a": "Who?", "b": "When?"}) == made
    assert server.batch_calls["create"] == 1
