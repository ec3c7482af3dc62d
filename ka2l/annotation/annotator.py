"""Annotators answer the selected questions. Only a question that an annotator is asked costs annotation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from ka2l.sampling.sampler import EngineConfig
from ka2l.section import Section
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.reply import Usage

if TYPE_CHECKING:
    from ka2l.annotation.reference_table import ReferenceTable

TaskFormat = Literal["jsonl", "csv", "label_studio"]


class TeacherEngineConfig(EngineConfig):
    """What generates a local teacher's answers."""

    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16; ``auto`` is what the checkpoint was saved in, and float32 on CPUs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust the model's authors."""


class AnnotatorConfig(Section):
    """Who answers selected questions."""

    KINDS: ClassVar[tuple[str, ...]] = ("reference", "teacher", "local_teacher", "human")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"task_format", "batch_api", "reference_table"})

    kind: str = "reference"
    """``reference``: the pool's own answers, revealed only for what was selected; ``teacher``: a language model behind
    an endpoint; ``local_teacher``: a language model on this run's own machines; ``human``: the run pauses until people
    have answered, in a file or on a local web page; ``module:Class``: an annotator of your own."""
    reference_table: str | None = None
    """For ``reference``: JSON Lines or Parquet with ``question`` and ``answers``, where decoded questions are looked
    up, which the pool does not hold; ``testbed``: its facts."""
    reference_similarity: float = Field(1.0, gt=0, le=1)
    """A decoded question that is not in the table takes the answers of the most similar one there from this cosine
    similarity of character n-grams on; 1: of none."""
    task_format: TaskFormat = "jsonl"
    """Of the file that people fill in: ``jsonl``, ``csv`` (spreadsheets) or ``label_studio``."""
    teacher: TeacherConfig | None = None
    """Which model is asked, and how; for ``teacher`` and ``local_teacher``. The ``model`` of the latter is a directory
    or hub id, and what concerns an endpoint has no meaning for it."""
    engine: TeacherEngineConfig = TeacherEngineConfig()
    """What generates a ``local_teacher``'s answers."""
    batch_api: bool = False
    """Hand questions in through the endpoint's Batch API, which is cheaper: the run pauses until they are answered."""

    @model_validator(mode="after")
    def _has_teacher(self) -> AnnotatorConfig:
        if self.kind == "teacher" and self.teacher is None:
            raise ValueError("kind teacher needs annotator.teacher.model, and base_url where that is not OpenAI's")
        if self.kind == "local_teacher" and self.teacher is None:
            raise ValueError("kind local_teacher needs annotator.teacher.model, a directory or hub id")
        if self.kind == "local_teacher" and self.batch_api:
            raise ValueError("batch_api is for kind teacher: a local teacher has no Batch API")
        return self

    def result_fields(self) -> dict[str, Any]:
        """As any section's, less what has no meaning for the kind."""
        fields = super().result_fields()
        if self.kind == "local_teacher":
            del fields["teacher"]["base_url"]
        else:
            del fields["engine"]
        if self.kind in ("reference", "human"):
            del fields["teacher"]  # who may be there to take their answers apart
        return fields


class Annotation(NamedTuple):
    """One answer that was asked for (schemas.ANNOTATIONS)."""

    question_id: str
    question: str
    answers: list[str]
    annotator: str
    annotated_at: datetime
    prompt_sha256: str | None
    cost: float


class Refusal(NamedTuple):
    """A question that was asked and that got no annotation."""

    reason: str
    cost: float
    """Money spent on it all the same."""


class Annotator(ABC):
    """Answers questions by id; asking for the same id again must give the same answer and cost nothing more.

    A subclass of your own implements ``annotate``; the rest has defaults for what costs nothing and holds nothing.
    """

    batch_size: int = 64
    """Questions that are asked for together: each batch's answers are kept before the next is asked."""
    refusals: Mapping[str, Refusal] = MappingProxyType({})
    """Question id -> why no annotation came of it, over all calls."""
    stopped: str | None = None
    """``money`` once the cap was reached: questions neither annotated nor refused were not asked to the end."""
    usage: Usage | None = None
    """Tokens and money of the last call's questions, refused ones included; None: what the annotations cost is all."""

    @abstractmethod
    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """Annotations for a batch of question id -> question; questions that are refused are left out."""

    def answerable(self, questions: Mapping[str, str]) -> set[str]:
        """Ids of the decoded questions it could answer, told without cost; the others are dropped before they are
        counted against the budget."""
        return set(questions)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back the cores and GPUs it holds: tuning wants them next."""


class ReferenceAnnotator(Annotator):
    """Reveals the pool's own answers, and those of a table to questions that the pool does not hold.

    Args:
        reveal: looks up the reference answers of the given question ids, and of those alone.
        table: answers questions by their text.
    """

    batch_size = 256

    def __init__(
        self, reveal: Callable[[Sequence[str]], Mapping[str, list[str]]], table: ReferenceTable | None = None
    ) -> None:
        self.reveal = reveal
        self.table = table

    def answerable(self, questions: Mapping[str, str]) -> set[str]:
        """Ids of the questions outside the pool that it could answer; nothing is revealed by asking."""
        return set() if self.table is None else set(self.table.look_up(questions))

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """One annotation for each question that has a reference answer."""
        answers = dict(self.reveal(list(questions)))
        rest = {name: text for name, text in questions.items() if not answers.get(name)}
        if self.table is not None and rest:
            answers |= self.table.look_up(rest)
        now = datetime.now(UTC)
        return [
            Annotation(question_id, question, answers[question_id], "reference", now, None, 0.0)
            for question_id, question in questions.items()
            if answers.get(question_id)
        ]
