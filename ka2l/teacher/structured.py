"""Asks a teacher for one structured reply to each prompt, and counts tokens and money."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ka2l.teacher.config import TeacherConfig
from ka2l.teacher.reply import TeacherRun, Usage
from ka2l.teacher.request import TeacherPrompt


class Refused(NamedTuple):
    """What was asked for and came to nothing."""

    reason: str


class TeacherClient:
    """Puts prompts to a teacher.

    Args:
        config: the teacher's; of several samples the first usable one counts.
        ask: as for `ka2l.annotation.by_teacher.TeacherAnnotator`.
        close: gives back what ``ask`` holds.

    Attributes:
        stopped: ``money`` once the cap was reached.
        usage: tokens and money of the prompts of all calls, whenever they were paid for.
    """

    def __init__(
        self,
        config: TeacherConfig,
        ask: Callable[[Mapping[str, TeacherPrompt]], TeacherRun],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.ask = ask
        self._close = close
        self.stopped: str | None = None
        self.usage = Usage()

    def close(self) -> None:
        """Give back what ``ask`` holds."""
        self._close()

    def replies(self, prompts: Mapping[str, TeacherPrompt]) -> dict[str, Any]:
        """A reply, or `Refused`, to each prompt that was asked to the end.

        Raises:
            KA2LError: as ``ask`` does; replies received until then are in its journal.
        """
        if not prompts:
            return {}
        run = self.ask(prompts)
        self.stopped = self.stopped or run.stopped
        self.usage = Usage(
            self.usage.num_prompt_tokens + run.usage.num_prompt_tokens,
            self.usage.num_completion_tokens + run.usage.num_completion_tokens,
            self.usage.cost + run.usage.cost,
        )
        return {
            name: result.usable[0] if result.refusal is None else Refused(result.refusal)
            for name, result in run.results.items()
        }
