"""People as annotators of a run: writes their task files, reads their answers, decides whether the run can go on.

Everything lies in ``RUN_DIR/annotation/round-NNN/``: ``tasks.*`` for people, ``tasks.jsonl`` for us, ``answers.jsonl``
with every answer that came in, from the page or from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.annotation.answers import AnswerStore
from engine.store.run_directory import RunDirectory
from ka2l.annotation.annotator import Annotation, Annotator, TaskFormat
from ka2l.annotation.people import Merged, Problem, Task, merge
from ka2l.annotation.task_files import read_answers, read_tasks, write_tasks
from ka2l.answers.equivalence import Equivalence
from ka2l.errors import AnnotationsPending, RunDirectoryError

_ENDINGS = {"jsonl": ".jsonl", "csv": ".csv", "label_studio": ".json"}
_OUR_TASKS = "tasks.jsonl"
_ANSWERS = "answers.jsonl"


def annotation_folder(run: RunDirectory, round_index: int) -> Path:
    """Where people's tasks and answers of a round lie. Raises RunDirectoryError behind a URL."""
    if not run.is_local:
        raise RunDirectoryError(
            "annotator.kind human needs a run directory on a local disk",
            hint="Annotate in a local run directory, or import answers through a reference pool.",
        )
    return Path(run.path) / "annotation" / f"round-{round_index:03d}"


class HumanAnnotator(Annotator):
    """Pauses the run until people have answered.

    Args:
        folder: of `annotation_folder`.
        task_format: of the file that people get.
        make_tasks: the tasks of some question ids, in their order; called once, when the file is written.
        equivalence: decides whether two people's answers mean the same.
    """

    batch_size = 2**31
    """People get all questions of a round at once."""

    def __init__(
        self,
        run: RunDirectory,
        round_index: int,
        task_format: TaskFormat,
        make_tasks: Callable[[Sequence[str]], list[Task]],
        equivalence: Equivalence,
    ) -> None:
        self.run = run
        self.folder = annotation_folder(run, round_index)
        self.task_format = task_format
        self.make_tasks = make_tasks
        self.equivalence = equivalence

    def annotate(self, questions: Mapping[str, str]) -> list[Annotation]:
        """What people agree on; skipped and disputed questions are left out.

        Raises:
            AnnotationsPending: some question has no answer yet.
        """
        ours = self.folder / _OUR_TASKS
        theirs = self.folder / f"tasks{_ENDINGS[self.task_format]}"
        if not ours.exists() or not theirs.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            tasks = self.make_tasks(list(questions))
            write_tasks(theirs, tasks)
            write_tasks(ours, tasks)
        merged = merged_answers(self.folder, self.equivalence)
        if merged.missing:
            raise AnnotationsPending(
                f"{len(merged.missing):,} of {len(questions):,} questions wait for people's answers",
                hint=f"Answer in the browser: ka2l annotate {self.run.url} serve. Or fill in {theirs} and "
                f"ka2l annotate {self.run.url} import FILE. Then: ka2l resume {self.run.url}",
            )
        return merged.annotations


def merged_answers(folder: Path, equivalence: Equivalence) -> Merged:
    """What has come in for a round so far."""
    store = AnswerStore(folder / _ANSWERS)
    try:
        return merge(read_tasks(folder / _OUR_TASKS), store.answers(), equivalence)
    finally:
        store.close()


def pending_round(run: RunDirectory) -> Path:
    """The folder of the round that waits for answers; raises RunDirectoryError where none does."""
    for index in reversed(range(run.num_rounds_begun())):
        folder = annotation_folder(run, index)
        if (folder / _OUR_TASKS).exists() and run.stage("annotate", index).manifest() is None:
            return folder
    raise RunDirectoryError(
        f"{run.url} waits for no annotation",
        hint="A run waits for people when annotator.kind is human and it has selected questions.",
    )


def import_answers(
    folder: Path, files: Sequence[Path], annotator: str, equivalence: Equivalence
) -> tuple[list[Problem], Merged]:
    """Take answers from files into the round's store; what cannot be used is handed back with its place and reason.

    All lines of the store are kept: a person's later answer replaces the earlier one on reading. A file that is
    imported again adds nothing.
    """
    read = read_answers(list(files), annotator)
    tasks = read_tasks(folder / _OUR_TASKS)
    known = {task.question_id for task in tasks}
    store = AnswerStore(folder / _ANSWERS)
    try:
        there = store.answers()
        for answer in read.answers:
            if answer.question_id in known and (answer.skipped or answer.answers) and answer not in there:
                store.append(answer)
    finally:
        store.close()
    problems = merge(tasks, read.answers, equivalence, read.places).problems
    return [*read.problems, *problems], merged_answers(folder, equivalence)


def tasks_of(folder: Path) -> list[Task]:
    """What people are asked in a round."""
    return read_tasks(folder / _OUR_TASKS)


def open_store(folder: Path) -> AnswerStore:
    """Where people's answers of a round go."""
    return AnswerStore(folder / _ANSWERS)
