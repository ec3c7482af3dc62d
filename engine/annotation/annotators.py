"""Makes the annotator, the knowledge writer and the judge that the config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine import build
from engine.annotation.context import AnnotationContext
from engine.annotation.teachers import asked_teacher
from ka2l.annotation.annotator import Annotator, AnnotatorConfig, ReferenceAnnotator
from ka2l.errors import ConfigError

if TYPE_CHECKING:
    from engine.config import RunConfig
    from ka2l.evaluation.judge import AnswerJudge
    from ka2l.tuning.knowledge_writer import KnowledgeWriter


def _teacher_annotator(config: AnnotatorConfig, context: AnnotationContext, *, local: bool) -> Annotator:
    from ka2l.annotation.by_teacher import TeacherAnnotator

    asked = asked_teacher(config, context, local=local, batch_api=config.batch_api)
    made = TeacherAnnotator(asked.config, asked.ask, build.equivalence(context.equivalence), asked.close)
    made.batch_size = asked.batch_size
    return made


def knowledge_writer(config: RunConfig, context: AnnotationContext) -> KnowledgeWriter:
    """Who takes annotated answers apart for ``tuning.kind: knowtuning``: ``tuning.knowtuning.writer``."""
    kind = config.tuning.knowtuning.writer
    if kind == "testbed":
        from ka2l.testbed.lives import LifeWriter

        return LifeWriter(config.testbed, config.seed)
    from ka2l.tuning.knowledge_writer import TeacherWriter

    asked = asked_teacher(config.annotator, context, local=kind == "local_teacher")
    made = TeacherWriter(asked.config, asked.ask, asked.close)
    made.batch_size = asked.batch_size
    return made


def answer_judge(config: RunConfig, context: AnnotationContext) -> AnswerJudge:
    """The judge of ``evaluation.facts`` and ``evaluation.pairs``: what annotator.teacher names."""
    from ka2l.evaluation.judge import AnswerJudge

    asked = asked_teacher(config.annotator, context, local=config.evaluation.judge == "local_teacher")
    return AnswerJudge(asked.config, asked.ask, asked.close)


def annotator(config: AnnotatorConfig, context: AnnotationContext) -> Annotator:
    """The annotator of ``annotator.kind``."""
    match config.kind:
        case "reference":
            from ka2l.annotation.reference_table import read_reference_table

            table = None
            if context.reference_table is not None:
                table = read_reference_table(context.reference_table, config.reference_similarity)
            return ReferenceAnnotator(context.reveal, table)
        case "teacher":
            return _teacher_annotator(config, context, local=False)
        case "local_teacher":
            return _teacher_annotator(config, context, local=True)
        case "human":
            from engine.annotation.human import HumanAnnotator

            return HumanAnnotator(
                context.run,
                context.round_index,
                config.task_format,
                context.make_tasks,
                build.equivalence(context.equivalence),
            )
        case kind:
            return annotator_class(kind)(config)


def annotator_class(kind: str) -> Callable[[AnnotatorConfig], Annotator]:
    """The annotator that ``annotator.kind: module:Class`` names.

    Raises:
        ConfigError: it cannot be imported, or is not a subclass of `ka2l.annotation.annotator.Annotator`.
    """
    found = build.plugin(kind)
    if not (isinstance(found, type) and issubclass(found, Annotator)):
        raise ConfigError(
            f"annotator.kind {kind!r} is not an annotator",
            hint="Make it a subclass of ka2l.annotation.annotator.Annotator.",
        )
    made: Callable[[AnnotatorConfig], Annotator] = found
    return made
