"""A judge of answers, with a teacher that is a program: what is asked, and what its replies come to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ka2l.evaluation.facts import FactCounts
from ka2l.evaluation.judge import AnswerJudge, JudgedAnswer, JudgedPair, MatchedFacts, Preferences, StatedFacts
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.reply import SampleResult, TeacherResult, TeacherRun, Usage
from ka2l.teacher.request import TeacherPrompt
from ka2l.teacher.structured import Refused

REFERENCE = "Ada was born in Rome. Ada plays the flute. Ada likes rice."


def listed(text: str, title: str) -> list[str]:
    block = text.split(f"{title}: \n")[1].split("\n\n")[0]
    return [re.sub(r"^\d+\. ", "", line) for line in block.splitlines()]


def exact(prompt: TeacherPrompt) -> Any:
    """Replies by the letter: facts are sentences, and the same where they are equal; the longer answer is better."""
    text = prompt.messages[-1]["content"]
    if prompt.answer is StatedFacts:
        said = text.split("Answer: ")[1].split("\n\n")[0]
        return StatedFacts(facts=[part.strip() + "." for part in said.split(".") if part.strip()])
    if prompt.answer is MatchedFacts:
        expected = listed(text, "Facts of the reference")
        facts = listed(text, "Facts of the answer")
        return MatchedFacts(numbers=[expected.index(fact) + 1 if fact in expected else 0 for fact in facts])
    first, second = (text.split(f"{place} answer: ")[1].split("\n\n")[0] for place in ("First", "Second"))
    better = "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
    return Preferences(completeness=better, factuality="first", logicality="tie")


def judge(
    reply: Callable[[TeacherPrompt], Any] = exact, asked: list[str] | None = None, stop_after: int | None = None
) -> AnswerJudge:
    def ask(prompts: Mapping[str, TeacherPrompt]) -> TeacherRun:
        results = {}
        for name, prompt in list(prompts.items())[:stop_after]:
            if asked is not None:
                asked.append(name)
            made = reply(prompt)
            refusal = made.reason if isinstance(made, Refused) else None
            sample = SampleResult(None if refusal else made, refusal, 10, 5, 0.5, 1, None)
            results[name] = TeacherResult([sample], "hash")
        stopped = None if len(results) == len(prompts) else "money"
        return TeacherRun(
            results, stopped, len(results), Usage(10 * len(results), 5 * len(results), 0.5 * len(results))
        )

    return AnswerJudge(TeacherConfig(model="judge"), ask)


def test_an_answer_is_taken_apart_and_matched_with_its_reference() -> None:
    made = judge().count(
        {"q": JudgedAnswer("Who is Ada?", "Ada likes rice. Ada was born in Oslo. Ada plays the flute.", REFERENCE)}
    )
    assert made == {"q": FactCounts(2, 1, 1, 0.0)}  # the two that are right stand in the other order


def test_an_empty_answer_lacks_everything_and_is_not_asked_about() -> None:
    asked: list[str] = []
    made = judge(asked=asked).count({"q": JudgedAnswer("Who is Ada?", " ", REFERENCE)})
    assert made == {"q": FactCounts(0, 0, 3, None)}
    assert asked == ["q/reference"]


def test_a_match_that_does_not_fit_its_facts_is_refused() -> None:
    def careless(prompt: TeacherPrompt) -> Any:
        return MatchedFacts(numbers=[1, 9]) if prompt.answer is MatchedFacts else exact(prompt)

    (made,) = judge(careless).count({"q": JudgedAnswer("?", "One thing. Another.", REFERENCE)}).values()
    assert isinstance(made, Refused)


def test_what_the_judge_refuses_is_told_and_what_it_was_not_asked_is_left_out() -> None:
    def refuses_references(prompt: TeacherPrompt) -> Any:
        return Refused("abstained") if "born in Rome" in prompt.messages[-1]["content"] else exact(prompt)

    answers = {name: JudgedAnswer("?", f"Fact {name}.", REFERENCE) for name in ("a", "b")}
    assert judge(refuses_references).count(answers) == {"a": Refused("abstained"), "b": Refused("abstained")}
    capped = judge(stop_after=3)
    assert capped.count(answers) == {"a": FactCounts(0, 1, 3, None)}
    assert capped.stopped == "money"


def test_a_pair_is_judged_in_both_positions_and_only_agreement_wins() -> None:
    asked: list[str] = []
    made = judge(asked=asked).compare({"q": JudgedPair("?", REFERENCE, "short", "quite a bit longer")})["q"]
    assert asked == ["q/left_first", "q/right_first"]
    assert made.outcomes == {"completeness": -1, "factuality": 0, "logicality": 0}
    # "factuality" always went to the answer that stood first, which says nothing of the answers.
    assert made.agreed == {"completeness": True, "factuality": False, "logicality": True}


def test_a_pair_with_one_verdict_has_none() -> None:
    pairs = {"q": JudgedPair("?", REFERENCE, "left", "right")}
    assert judge(stop_after=1).compare(pairs) == {}


def test_usage_adds_up_over_calls() -> None:
    made = judge()
    made.count({"q": JudgedAnswer("?", "Ada likes rice.", REFERENCE)})
    made.compare({"q": JudgedPair("?", REFERENCE, "left", "right")})
    assert made.usage == Usage(50, 25, 2.5)  # three prompts and two
