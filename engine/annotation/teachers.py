"""Makes teachers that share the journal and the cap on money of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine.annotation.context import AnnotationContext
from engine.build import teacher_host
from engine.store.journal import open_journal
from ka2l.annotation.annotator import AnnotatorConfig
from ka2l.errors import ConfigError
from ka2l.model.loading import model_name
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.limits import MoneyCap

if TYPE_CHECKING:
    from engine.store.journal import FileJournal, RemoteJournal
    from ka2l.teacher.reply import TeacherRun
    from ka2l.teacher.request import TeacherPrompt


class AskedTeacher(NamedTuple):
    """A teacher, ready to be asked."""

    config: TeacherConfig
    ask: Callable[[Mapping[str, TeacherPrompt]], TeacherRun]
    batch_size: int
    """Prompts that are asked together."""
    close: Callable[[], None] = lambda: None
    """Gives back what it holds."""


def asked_teacher(
    config: AnnotatorConfig, context: AnnotationContext, *, local: bool, batch_api: bool = False
) -> AskedTeacher:
    """A teacher whose answers and bills are kept in the run's journal, over all rounds and whatever it is asked.

    Raises:
        ConfigError: no teacher is named, or its key is missing.
    """
    if config.teacher is None:
        raise ConfigError(
            "there is no teacher to ask", hint="Set annotator.teacher.model, and base_url or a directory."
        )
    return _local_teacher(config, context) if local else _endpoint(config, context, batch_api)


def _endpoint(config: AnnotatorConfig, context: AnnotationContext, batch_api: bool) -> AskedTeacher:
    from ka2l.teacher.batch import collect_batch
    from ka2l.teacher.endpoint import Teacher

    assert config.teacher is not None
    key = os.environ.get(config.teacher.api_key_env, "") if config.teacher.api_key_env else ""
    if config.teacher.api_key_env and not key:
        raise ConfigError(
            f"environment variable {config.teacher.api_key_env} is empty",
            hint="annotator.teacher.api_key_env names it; null for an endpoint that asks for no key.",
        )
    journal = open_journal(context.run, "teacher")
    cap = _money_cap(context.money, journal)
    if batch_api:
        one_job = 2**31
        return AskedTeacher(config.teacher, partial(collect_batch, config.teacher, key, journal, cap=cap), one_job)
    return AskedTeacher(config.teacher, Teacher(config.teacher, key, journal, cap).ask, 64)


def _local_teacher(config: AnnotatorConfig, context: AnnotationContext) -> AskedTeacher:
    """A teacher on this run's own workers. They start with the first question that the journal holds no answer to."""
    from actors.teacher import REQUESTS_PER_CALL, complete_with
    from actors.workers.standing import StandingWorkers
    from ka2l.teacher.local import LocalTeacher

    assert config.teacher is not None
    engine = config.engine
    pool = context.shared_teacher or StandingWorkers(
        partial(teacher_host, config),
        placement=context.placement,
        cpus=engine.cpus_per_replica,
        gpus=engine.gpus_per_replica,
        log_path=context.log_path,
        faults=context.faults,
        tags=context.tags,
    )
    named = config.teacher.model_copy(update={"model": model_name(config.teacher.model)})
    journal = open_journal(context.run, "teacher")
    # Without prices it costs nothing, whatever the cap.
    cap = _money_cap(context.money if named.prices else None, journal)
    teacher = LocalTeacher(
        named,
        complete_with(pool),
        journal,
        cap,
        plain=engine.kind != "vllm",
        run_seed=context.run_seed,
    )
    return AskedTeacher(named, teacher.ask, REQUESTS_PER_CALL * engine.replicas, pool.close)


def _money_cap(limit: float | None, journal: FileJournal | RemoteJournal) -> MoneyCap:
    """A cap that knows what was spent in earlier rounds."""
    cap = MoneyCap(limit)
    for name, record in journal.items():
        cap.count(name, record.get("cost", 0.0))
    return cap
