"""Knowledge writers take answers apart and put them together again for KnowTuning: a teacher, or exact programs.

Four tasks (arXiv 2402.11176, Section 3): `Extract` atomic facts, `Rewrite` a question so that it asks for some of them,
`Revise` facts into wrong ones, `Rephrase` facts into one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from ka2l.prompts import extract_messages, rephrase_messages, revise_messages, rewrite_messages
from ka2l.teacher.reply import Usage
from ka2l.teacher.request import TeacherPrompt
from ka2l.teacher.structured import Refused, TeacherClient


class Extract(NamedTuple):
    """To the answer's atomic facts: ``list[str]``."""

    question: str
    answer: str


class Rewrite(NamedTuple):
    """To a question about these facts, and its answer: ``(question, answer)``."""

    question: str
    facts: list[str]


class Revise(NamedTuple):
    """To as many facts that look alike and are wrong: ``list[str]``."""

    question: str
    facts: list[str]


class Rephrase(NamedTuple):
    """To one answer that states these facts and no others, in their order: ``str``."""

    question: str
    facts: list[str]


Task = Extract | Rewrite | Revise | Rephrase


class KnowledgeWriter(Protocol):
    """Does tasks by id; asking for the same task again must give the same and cost nothing more."""

    batch_size: int
    """Answers that are worked on together: what each batch comes to is kept before the next is begun."""

    @property
    def stopped(self) -> str | None:
        """``money`` once the cap was reached."""

    @property
    def usage(self) -> Usage | None:
        """Tokens and money of all its calls' tasks; None where they cost nothing."""

    def close(self) -> None:
        """Give back the cores and GPUs it holds."""

    def write(self, tasks: Mapping[str, Task]) -> Mapping[str, Any]:
        """What each task came to, or `Refused`; tasks that were not asked to the end are left out."""


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AtomicFacts(_Reply):
    """Reply to `Extract` and `Revise`."""

    facts: list[str]

    @model_validator(mode="after")
    def _says_something(self) -> AtomicFacts:
        if not self.facts or not all(fact.strip() for fact in self.facts):
            raise ValueError("no facts, or an empty one")
        return self


class QuestionAndAnswer(_Reply):
    """Reply to `Rewrite`."""

    question: str
    answer: str

    @model_validator(mode="after")
    def _says_something(self) -> QuestionAndAnswer:
        if not (self.question.strip() and self.answer.strip()):
            raise ValueError("no question or no answer")
        return self


class LongAnswer(_Reply):
    """Reply to `Rephrase`."""

    answer: str

    @model_validator(mode="after")
    def _says_something(self) -> LongAnswer:
        if not self.answer.strip():
            raise ValueError("no answer")
        return self


def task_prompt(task: Task) -> TeacherPrompt:
    """What a teacher is asked for a task."""
    match task:
        case Extract(question, answer):
            return TeacherPrompt(extract_messages(question, answer), AtomicFacts)
        case Rewrite(question, facts):
            return TeacherPrompt(rewrite_messages(question, facts), QuestionAndAnswer)
        case Revise(question, facts):
            return TeacherPrompt(revise_messages(question, facts), AtomicFacts)
        case Rephrase(question, facts):
            return TeacherPrompt(rephrase_messages(question, facts), LongAnswer)


def task_result(task: Task, reply: Any) -> Any:
    """What a teacher's reply to a task comes to, or `Refused`."""
    match task, reply:
        case Extract(), AtomicFacts(facts=facts):
            return list(dict.fromkeys(fact.strip() for fact in facts))
        case Revise(_, asked), AtomicFacts(facts=facts):
            if len(facts) != len(asked):
                return Refused(f"{len(facts)} revised facts for {len(asked)}")
            return [fact.strip() for fact in facts]
        case Rewrite(), QuestionAndAnswer(question=question, answer=answer):
            return question.strip(), answer.strip()
        case Rephrase(), LongAnswer(answer=answer):
            return answer.strip()
    raise TypeError(f"{reply!r} is not a reply to {task!r}")


class TeacherWriter(TeacherClient):
    """Asks a teacher, one prompt a task."""

    batch_size = 64

    def write(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """See `KnowledgeWriter`.

        Raises:
            KA2LError: as ``ask`` does; answers received until then are in its journal.
        """
        replies = self.replies({name: task_prompt(task) for name, task in tasks.items()})
        return {
            name: reply if isinstance(reply, Refused) else task_result(tasks[name], reply)
            for name, reply in replies.items()
        }
