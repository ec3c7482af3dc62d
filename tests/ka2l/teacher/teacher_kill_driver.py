"""Annotates questions in processes that may be killed at any moment: ``python teacher_kill_driver.py JOB.json``.

For every line on its input it forks a worker and writes the worker's process id, then its exit status. Imports happen
once, before the first fork, so a worker lives for milliseconds. JOB.json holds ``config``, ``questions``, ``journal``
and ``batch`` (whether to go through the Batch API); a worker that reaches the end writes its annotations to ``out``. A
line ``torn N`` makes the worker die half way through writing the N-th record of its own to the journal; any other line
starts a plain worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openai.resources.batches
import openai.resources.chat.completions
import openai.resources.files
import openai.types.chat  # noqa: F401 - loaded here rather than in every worker

from engine.store.journal import FileJournal
from ka2l.annotation.by_teacher import TeacherAnnotator
from ka2l.answers.equivalence import LexicalEquivalence
from ka2l.teacher.batch import collect_batch
from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.endpoint import Teacher


def tear_put(number: int) -> None:
    """Die by SIGKILL with half of the N-th line written."""
    write = os.write
    left = number

    def write_half(file: int, content: bytes) -> int:
        nonlocal left
        if content.startswith(b'{"key"'):
            left -= 1
            if left == 0:
                write(file, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(file, content)

    os.write = write_half


def work(job: dict[str, Any]) -> None:
    config = TeacherConfig.model_validate(job["config"])
    journal = FileJournal(job["journal"])
    ask = partial(collect_batch, config, "", journal) if job["batch"] else Teacher(config, "", journal).ask
    annotator = TeacherAnnotator(config, ask, LexicalEquivalence())
    made = annotator.annotate(job["questions"])
    rows = [row._asdict() | {"annotated_at": row.annotated_at.isoformat()} for row in made]
    Path(job["out"]).write_text(json.dumps({"rows": rows, "refusals": annotator.refusals}))


def main() -> None:
    for line in sys.stdin:
        kind, _, number = line.strip().partition(" ")
        job = json.loads(Path(sys.argv[1]).read_text())
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if kind == "torn":
                    tear_put(int(number))
                work(job)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
