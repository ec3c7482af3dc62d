"""The local teacher: the endpoint teacher's prompts, journal and rules, with replies that are generated here."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest
from journals import Killed, Memory

from ka2l.annotation.by_teacher import TeacherAnnotator
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.errors import ConfigError
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.limits import MoneyCap
from ka2l.teacher.local import ChatRequest, LocalTeacher
from ka2l.teacher.reply import Usage
from ka2l.teacher.request import cost_bound

PRICES = {"input_per_million": 1.0, "output_per_million": 2.0}
COST = (20 * 1.0 + 10 * 2.0) / 1e6


class Model:
    """Answers with what ``reply`` makes of a question; keeps what it was asked. The last request is ready first."""

    def __init__(self, reply: Callable[[str, int], str | None]) -> None:
        self.reply = reply
        self.requests: list[ChatRequest] = []
        self.num_closed = 0

    def complete(self, requests: Sequence[ChatRequest]) -> Generator[tuple[int, Mapping[str, Any]]]:
        try:
            for index, request in reversed(list(enumerate(requests))):
                self.requests.append(request)
                question = request.body["messages"][-1]["content"].split("Question: ")[1].split("\n")[0]
                content = self.reply(question, request.seed)
                if content is None:
                    yield index, {"error": {"message": "too long"}}
                    continue
                usage = {"prompt_tokens": 20, "completion_tokens": 10}
                message = {"role": "assistant", "content": content}
                yield index, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage, "model": "m"}
        finally:
            self.num_closed += 1


def says(*answers: str) -> str:
    return json.dumps({"answers": answers, "abstain": not answers})


def right(question: str, seed: int) -> str:
    return says(f"answer to {question}")


def annotator(model: Model, journal: Memory, cap: MoneyCap | None = None, **fields: Any) -> TeacherAnnotator:
    plain = fields.pop("plain", False)
    config = TeacherConfig.model_validate({"model": "tiny@abc"} | fields)
    teacher = LocalTeacher(config, model.complete, journal, cap, plain=plain)
    return TeacherAnnotator(config, teacher.ask, LexicalEquivalence())


QUESTIONS = {f"q{i}": f"What is {i}?" for i in range(4)}


def test_annotations_carry_their_provenance_cost_nothing_and_their_tokens_are_counted() -> None:
    asked = annotator(Model(right), Memory(), num_samples=3, temperature=1.0)
    made = asked.annotate(QUESTIONS)
    assert {row.question_id: row.answers for row in made} == {
        name: [f"answer to {question}"] for name, question in QUESTIONS.items()
    }
    assert {(row.annotator, row.cost) for row in made} == {("tiny@abc", 0.0)}
    assert len({row.prompt_sha256 for row in made}) == 4
    assert asked.usage == Usage(4 * 3 * 20, 4 * 3 * 10)


def test_samples_of_a_question_have_seeds_of_their_own_that_placement_does_not_change() -> None:
    def seeds(questions: Mapping[str, str]) -> dict[str, set[int]]:
        model = Model(right)
        annotator(model, Memory(), num_samples=3, temperature=1.0).annotate(questions)
        found: dict[str, set[int]] = {}
        for request in model.requests:
            found.setdefault(request.body["messages"][-1]["content"], set()).add(request.seed)
        return found

    everything = seeds(QUESTIONS)
    assert len(set().union(*everything.values())) == 4 * 3
    assert seeds({"other id": QUESTIONS["q2"]}).items() <= everything.items()


def test_samples_that_disagree_and_abstentions_are_refused_with_their_reason() -> None:
    def reply(question: str, seed: int) -> str:
        return says() if "1" in question else says(str(seed)) if "2" in question else right(question, seed)

    asked = annotator(Model(reply), Memory(), num_samples=3, temperature=1.0)
    assert [row.question_id for row in asked.annotate(QUESTIONS)] == ["q0", "q3"]
    assert {name: refusal.reason for name, refusal in asked.refusals.items()} == {
        "q1": "the teacher abstained",
        "q2": "no agreement: 1 of 3 samples mean the same",
    }


def test_a_prompt_that_does_not_fit_is_refused_for_good() -> None:
    model, journal = Model(lambda question, seed: None if "1" in question else right(question, seed)), Memory()
    asked = annotator(model, journal)
    assert len(asked.annotate(QUESTIONS)) == 3
    assert asked.refusals["q1"].reason == "tiny@abc cannot take the prompt: too long"
    annotator(model, journal).annotate(QUESTIONS)
    assert len(model.requests) == 4


def test_an_unusable_reply_is_drawn_again_from_another_seed_and_a_greedy_one_is_not() -> None:
    seen: set[int] = set()

    def first_time_wrong(question: str, seed: int) -> str:
        known = len(seen) >= len(QUESTIONS)
        seen.add(seed)
        return right(question, seed) if known else '{"answers": ["Par'

    model = Model(first_time_wrong)
    made = annotator(model, Memory(), temperature=1.0).annotate(QUESTIONS)
    assert len(made) == 4
    assert len({request.seed for request in model.requests}) == len(model.requests) == 8
    greedy = Model(lambda question, seed: "no JSON")
    asked = annotator(greedy, Memory())
    assert asked.annotate(QUESTIONS) == []
    assert asked.refusals["q0"].reason.startswith("1 unusable replies, the last not the JSON asked for")
    assert len(greedy.requests) == 4


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_killed_at_any_reply_nothing_that_was_kept_is_generated_again(dies_at: int) -> None:
    fields = {"num_samples": 2, "temperature": 1.0}
    undisturbed = annotator(Model(right), Memory(), **fields).annotate(QUESTIONS)
    model, journal = Model(right), Memory()
    journal.dies_at = dies_at
    with pytest.raises(Killed):
        annotator(model, journal, **fields).annotate(QUESTIONS)
    assert model.num_closed == 1
    kept = set(journal)
    assert len(kept) == dies_at - 1
    model.requests.clear()
    made = annotator(model, journal, **fields).annotate(QUESTIONS)
    assert len(model.requests) == 8 - len(kept)
    assert kept < set(journal)
    when = made[0].annotated_at
    assert [row._replace(annotated_at=when) for row in made] == [row._replace(annotated_at=when) for row in undisturbed]


def test_an_engine_without_schemas_is_asked_in_words() -> None:
    model = Model(right)
    annotator(model, Memory(), plain=True).annotate(QUESTIONS)
    assert all("response_format" not in request.body for request in model.requests)
    assert all('"abstain"' in request.body["messages"][-1]["content"] for request in model.requests)


def test_with_prices_a_cap_is_kept_and_what_was_not_asked_is_not_refused() -> None:
    model, journal = Model(right), Memory()
    annotator(model, Memory(), prices=PRICES).annotate({"a": QUESTIONS["q0"]})
    bound = cost_bound(TeacherConfig.model_validate({"model": "m", "prices": PRICES}), model.requests[0].body)
    cap = MoneyCap(bound + 2.5 * COST)
    asked = annotator(model, journal, cap, prices=PRICES)
    made = asked.annotate({f"q{i}": f"What is {i}?" for i in range(9)})
    assert [row.cost for row in made] == [pytest.approx(COST)] * 3
    assert (asked.stopped, asked.refusals) == ("money", {})
    assert cap.spent == pytest.approx(3 * COST)
    assert cap.reserved == pytest.approx(0, abs=1e-12)


def test_a_cap_without_prices_is_refused() -> None:
    with pytest.raises(ConfigError, match="prices"):
        annotator(Model(right), Memory(), MoneyCap(1.0))
