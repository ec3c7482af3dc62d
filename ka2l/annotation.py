"""Annotators: who answers the selected questions. Only what is asked of them costs annotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Literal, NamedTuple, Protocol

from pydantic import model_validator

from ka2l.section import Section
from ka2l.teacher_config import TeacherConfig

TaskFormat = Literal["jsonl", "csv", "label_studio"]


class AnnotatorConfig(Section):
    """Who answers selected questions."""

    KINDS: ClassVar[tuple[str, ...]] = ("reference", "teacher", "human")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"task_format", "batch_api"})

    kind: str = "reference"
    """``reference``: the pool's own answers, revealed only for what was selected; ``teacher``: a language model behind
    an endpoint; ``human``: the run pauses until people have answered, in a file or on a local web page;
    ``module:Class``: an annotator of your own."""
    task_format: TaskFormat = "jsonl"
    """Of the file that people fill in: ``jsonl``, ``csv`` (spreadsheets) or ``label_studio``."""
    teacher: TeacherConfig | None = None
    """Which model is asked, and how; for ``teacher``."""
    batch_api: bool = False
    """Hand questions in through the endpoint's Batch API, which is cheaper: the run pauses until they are answered."""

    @model_validator(mode="after")
    def _has_teacher(self) -> AnnotatorConfig:
        if self.kind == "teacher" and self.teacher is None:
            raise ValueError("kind teacher needs annotator.teacher.model, and base_url where that is not OpenAI's")
        return self


class Annotation(NamedTuple):
    """One answer that was asked for (records.ANNOTATIONS)."""

    question_id: str
    question: str
    answers: list[str]
    annotator: str
    annotated_at: datetime
    prompt_sha256: str | None
    cost: float


class Annotator(Protocol):
    """Answers questions by id; asking for the same id again must give the same answer and cost nothing more."""

    batch_size: int
    """Questions that are asked for together: each batch's answers are kept before the next is asked."""

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """Annotations for a batch of question id -> question; questions that are refused are left out."""


class ReferenceAnnotator:
    """Reveals the pool's own answers.

    Args:
        reveal: looks up the reference answers of the given question ids, and of those alone.
    """

    batch_size = 256

    def __init__(self, reveal: Callable[[Sequence[str]], Mapping[str, list[str]]]) -> None:
        self.reveal = reveal

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """One annotation for each question that has a reference answer."""
        answers = self.reveal(list(questions))
        now = datetime.now(UTC)
        return [
            Annotation(question_id, question, answers[question_id], "reference", now, None, 0.0)
            for question_id, question in questions.items()
            if answers.get(question_id)
        ]
