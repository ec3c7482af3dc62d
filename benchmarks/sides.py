"""Two sides of a comparison, each in a process of its own that stays: imports and loading are done once and not timed,
and work can alternate between them. Standard library alone, since a side may be another environment's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any


class Side:
    """A process that answers requests, one after the other (see `serve`).

    Args:
        words: interpreter, script and arguments.
        log: file for what it says on stderr, and on stdout beside its answers.
    """

    def __init__(self, words: Sequence[str | Path], log: Path) -> None:
        # Another environment must not find this one's packages.
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=variables
            )

    def ask(self, **request: Any) -> Any:
        """The answer to a request; raises RuntimeError where the process has ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} has ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[..., Any]) -> None:
    """Answer each request on stdin with ``answer(**request)`` on stdout, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    for line in sys.stdin:
        replies.write(json.dumps(answer(**json.loads(line))) + "\n")
        replies.flush()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its wall-clock seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def in_turns(ours: Callable[[], Any], theirs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Each side's results of ``repeats`` rounds, ours under ``ka2l``, after one that does not count; the order turns
    round from one to the next."""
    made: dict[str, list[Any]] = {}
    sides = {"ka2l": ours} | theirs
    for turn in range(repeats + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            result = sides[name]()
            if turn:
                made.setdefault(name, []).append(result)
    return made


def speed(made: dict[str, list[Any]], peer: str, num_items: int, key: str = "seconds") -> dict[str, Any]:
    """Median seconds an item of both sides, and median and range of the ratio peer / ours within a round.

    Args:
        made: what `in_turns` returns.
        num_items: what a side's seconds are divided by.
        key: where a result holds its seconds.
    """
    seconds = {side: [result[key] / num_items for result in made[side]] for side in ("ka2l", peer)}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ka2l"], seconds[peer], strict=True)]
    return {
        "seconds": {side: median(values) for side, values in seconds.items()},
        "peer_over_ka2l": median(ratios),
        "peer_over_ka2l_range": [min(ratios), max(ratios)],
    }
