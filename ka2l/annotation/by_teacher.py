"""Annotation by a teacher: short answers on which its samples agree, with provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from ka2l.annotation.annotator import Annotation, Annotator, Refusal
from ka2l.answers.clustering import cluster_answers
from ka2l.answers.equivalence import Equivalence
from ka2l.answers.normalise import surface_key
from ka2l.prompts import teacher_messages
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.reply import TeacherResult, TeacherRun, Usage
from ka2l.teacher.request import ShortAnswer, TeacherPrompt


class TeacherAnnotator(Annotator):
    """Asks a teacher for short answers.

    Args:
        config: the teacher's; ``num_samples`` and ``min_agreement`` decide when an answer is trusted.
        ask: :meth:`ka2l.teacher.endpoint.Teacher.ask`, :meth:`ka2l.teacher.local.LocalTeacher.ask`, or
            :func:`ka2l.teacher.batch.collect_batch` with all but the prompts.
        equivalence: says which samples mean the same.
        close: gives back what ``ask`` holds.

    """

    def __init__(
        self,
        config: TeacherConfig,
        ask: Callable[[Mapping[str, TeacherPrompt]], TeacherRun],
        equivalence: Equivalence,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._close = close
        self.batch_size = 64
        self.ask = ask
        self.equivalence = equivalence
        self.refusals: dict[str, Refusal] = {}
        self.usage = Usage()

    def close(self) -> None:
        """Give back what ``ask`` holds."""
        self._close()

    @property
    def cost_refused(self) -> float:
        """Money spent on refused questions; the annotations carry the rest."""
        return sum(refusal.cost for refusal in self.refusals.values())

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """One annotation for each question whose samples agree; see :class:`ka2l.annotation.annotator.Annotator`.

        Raises:
            KA2LError: as ``ask`` does; answers received until then are in its journal.
        """
        prompts = {
            question_id: TeacherPrompt(teacher_messages(question, self.config.allow_abstain), ShortAnswer)
            for question_id, question in questions.items()
        }
        run = self.ask(prompts)
        self.stopped, self.usage = run.stopped, run.usage
        annotations = []
        for question_id, result in run.results.items():
            answers = self._agreed(questions[question_id], result)
            if isinstance(answers, str):
                self.refusals[question_id] = Refusal(answers, result.cost)
                continue
            assert result.answered_at is not None
            annotations.append(
                Annotation(
                    question_id=question_id,
                    question=questions[question_id],
                    answers=answers,
                    annotator=self.config.model,
                    annotated_at=result.answered_at,
                    prompt_sha256=result.prompt_sha256,
                    cost=result.cost,
                )
            )
        return annotations

    def _agreed(self, question: str, result: TeacherResult) -> list[str] | str:
        """The accepted answers of the samples that agree, or why there are none."""
        if result.refusal is not None:
            return result.refusal
        given: list[list[str]] = []
        for reply in result.usable:
            texts = [text.strip() for text in reply.answers if text.strip()]
            if texts and not (reply.abstain and self.config.allow_abstain):
                given.append(texts)
        num_samples = len(result.samples)
        if not given:
            return "the teacher abstained"
        ids = cluster_answers([question], [[texts[0] for texts in given]], self.equivalence).ids[0]
        cluster, num_agreeing = Counter(ids).most_common(1)[0]
        if num_agreeing / num_samples < self.config.min_agreement:
            return f"no agreement: {num_agreeing} of {num_samples} samples mean the same"
        accepted = [texts for texts, owner in zip(given, ids, strict=True) if owner == cluster]
        # First answers before other wordings, each spelling once.
        ordered = [texts[0] for texts in accepted] + [text for texts in accepted for text in texts[1:]]
        spellings: dict[str, str] = {}
        for text in ordered:
            spellings.setdefault(surface_key(text), text)
        return list(spellings.values())
