"""What a query strategy is given and returns, and a ranking that does not depend on row order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Candidates(NamedTuple):
    """What a strategy may look at, a row a question; ``asked_states`` alone is of other questions."""

    question_ids: list[str]
    score: np.ndarray
    """Evidence for unknown over all model states so far, shape (N,)."""
    p_unknown: np.ndarray
    """Probability of unknown under this round's model state, shape (N,)."""
    entropy: np.ndarray | None = None
    """Semantic entropy, nats, shape (N,); None where candidates were not sampled."""
    states: np.ndarray | None = None
    """Hidden states, shape (N, D)."""
    p_wrong: np.ndarray | None = None
    """Probability that the base model answers wrongly, shape (N,); None before anything has been annotated."""
    predictive_entropy: np.ndarray | None = None
    """Minus the mean log-probability of the sampled answers, nats, shape (N,); None where candidates were not
    sampled."""
    perplexity: np.ndarray | None = None
    """Mean negative log-likelihood of the question's own text, nats a token, shape (N,); None where not measured."""
    asked_states: np.ndarray | None = None
    """Hidden states, under the same model state, of questions asked in earlier rounds, shape (M, D); None for none."""

    def take(self, rows: np.ndarray) -> Candidates:
        """Some of the rows, in that order."""
        ids = [self.question_ids[row] for row in rows.tolist()]
        columns = {name: None if column is None else column[rows] for name, column in self._columns()}
        return Candidates(ids, **columns, asked_states=self.asked_states)  # type: ignore[arg-type]

    def _columns(self) -> list[tuple[str, np.ndarray | None]]:
        other = ("question_ids", "asked_states")
        return [(name, column) for name, column in self._asdict().items() if name not in other]


class Selected(NamedTuple):
    """The chosen rows, best first, and what they were ranked by."""

    indices: np.ndarray
    """Row numbers in the candidates, shape (budget,)."""
    scores: np.ndarray
    """Shape (budget,). Of strategies that spread over hidden states: the evidence for unknown."""


def join(parts: Sequence[Candidates]) -> Candidates:
    """Parts with the same columns as one; asked states are the first part's."""
    import numpy as np

    of_parts = [dict(part._columns()) for part in parts]
    columns = {name: None if first is None else np.concatenate([part[name] for part in of_parts])
               for name, first in of_parts[0].items()}  # fmt: skip
    ids = [name for part in parts for name in part.question_ids]
    return Candidates(ids, **columns, asked_states=parts[0].asked_states)  # type: ignore[arg-type]


def top(values: np.ndarray, question_ids: list[str], num_wanted: int, seed: int) -> Selected:
    """The highest ``values`` (N,), ties broken by the seed and the question's id.

    Raises:
        ValueError: a value is not finite.
    """
    import numpy as np

    values = finite(values, question_ids)
    rows = np.arange(len(values))
    if 0 < num_wanted < len(values):  # a hash a row is what takes time: only for those that may be among the highest
        place = len(values) - num_wanted
        rows = np.flatnonzero(values >= np.partition(values, place)[place])
    ties = tie_breakers([question_ids[row] for row in rows.tolist()], seed)
    indices = rows[np.lexsort((ties, values[rows]))[::-1][:num_wanted]]
    return Selected(indices, values[indices])


def finite(values: np.ndarray, question_ids: list[str]) -> np.ndarray:
    """The values as float64; raises ValueError that names the first question without one to rank by."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"the value of question {question_ids[bad[0]]!r} is {values[bad[0]]}, which cannot be ranked")
    return values


def tie_breakers(question_ids: list[str], seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each question, from the seed and its id alone. Shape (N,)."""
    import numpy as np

    digests = b"".join(hashlib.blake2b(f"{seed}\x1f{id_}".encode(), digest_size=8).digest() for id_ in question_ids)
    return np.frombuffer(digests, dtype="<u8") / 2.0**64
