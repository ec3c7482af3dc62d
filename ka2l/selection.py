"""Query strategies: which candidates are worth an annotation.

A strategy is a plain function from candidates to row numbers, best first. To add one, write the function and put it
into ``STRATEGIES``. A pool comes in parts: `Shortlist` keeps of each what the strategy could choose, however good the
rest of the pool is, so that no more than that is ever held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from ka2l.errors import BudgetError, ConfigError
from ka2l.section import Section

if TYPE_CHECKING:
    import numpy as np


class SelectionConfig(Section):
    """Which candidates are annotated in a round."""

    KINDS: ClassVar[tuple[str, ...]] = ("random", "probe", "semantic_entropy", "probe_diverse", "two_axis")

    kind: str = "probe"
    """``probe`` takes what the probe holds most likely unknown; ``semantic_entropy`` what the model's own answers
    disagree about most (samples of all candidates are needed); ``probe_diverse`` spreads over the likely unknown;
    ``two_axis`` takes what is most likely answered wrongly, with doubt or without, as annotation has shown so far;
    ``random`` is the control; ``module:function`` is a strategy of your own."""
    budget: int = Field(150, ge=1)
    """Questions a round."""
    pool_factor: float = Field(3.0, ge=1)
    """``probe_diverse`` chooses among this many times the budget of the most likely unknown."""
    explore: float = Field(0.1, ge=0, le=1)
    """Share of a round's budget that ``two_axis`` draws from what looks known, since nothing else shows what has been
    learnt wrongly. The last round does not explore."""


class Candidates(NamedTuple):
    """What a strategy may look at, a row a question."""

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

    def take(self, rows: np.ndarray) -> Candidates:
        """Some of the rows, in that order."""
        ids = [self.question_ids[row] for row in rows.tolist()]
        return Candidates(ids, *(None if column is None else column[rows] for column in self[1:]))  # type: ignore[arg-type]


class Selected(NamedTuple):
    """The chosen rows, best first, and what they were ranked by."""

    indices: np.ndarray
    """Row numbers in the candidates, shape (budget,)."""
    scores: np.ndarray
    """Shape (budget,)."""


Strategy = Callable[[Candidates, int, int, SelectionConfig], Selected]


def select(candidates: Candidates, config: SelectionConfig, seed: int, strategy: Strategy | None = None) -> Selected:
    """The ``config.budget`` candidates to annotate. The order of the candidates never matters.

    Args:
        strategy: instead of the one that ``config.kind`` names; called with (candidates, budget, seed, config).

    Raises:
        BudgetError: the budget is larger than the number of candidates.
        ConfigError: an unknown kind, one that needs what the candidates do not have, or a ``strategy`` that chose
            another number of questions than the budget, or one twice.
        ValueError: a question id twice, or a value to rank by that is not finite.
    """
    num_candidates = len(candidates.question_ids)
    if strategy is None and config.kind not in STRATEGIES:
        raise ConfigError(f"selection.kind {config.kind!r} is not known", hint=f"Use one of {', '.join(STRATEGIES)}.")
    if config.budget > num_candidates:
        raise BudgetError(
            f"selection.budget asks for {config.budget} questions, but {num_candidates} candidates are left",
            hint="Lower selection.budget or rounds, or give a larger pool.",
        )
    if len(set(candidates.question_ids)) < num_candidates:
        raise ValueError("a question_id occurs twice among the candidates")
    chosen = (strategy or STRATEGIES[config.kind])(candidates, config.budget, seed, config)
    if len(chosen.indices) != config.budget or len(set(chosen.indices)) != config.budget:
        raise ConfigError(
            f"selection.kind {config.kind!r} chose {len(set(chosen.indices))} questions, and not {config.budget}",
            hint="A strategy returns as many different row numbers as its budget says.",
        )
    return chosen


class Shortlist:
    """Goes through a pool part by part and keeps the rows among which ``strategy`` would choose.

    What is chosen from the rows kept is what would be chosen from all, whatever the parts and their order. A strategy
    of your own sees all rows, so all are kept.

    Args:
        config: ``budget`` is this round's.
        seed: of the selection.
    """

    def __init__(self, config: SelectionConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._kept: list[Candidates] = []
        self._num_kept = 0
        self.num_seen = 0

    def add(self, part: Candidates) -> None:
        """Take in a part of the pool; parts have the same columns."""
        if not part.question_ids:
            return
        self.num_seen += len(part.question_ids)
        self._keep(part.take(self._rows(part)))
        if self._num_kept > 4 * self._most() + 4096:
            self._keep_best()

    def candidates(self) -> Candidates:
        """The rows kept."""
        if not self._kept:
            raise ValueError("no candidate has been added")
        self._keep_best()
        return self._kept[0]

    def _keep(self, part: Candidates) -> None:
        self._kept.append(part)
        self._num_kept += len(part.question_ids)

    def _keep_best(self) -> None:
        joined = _joined(self._kept)
        self._kept, self._num_kept = [], 0
        self._keep(joined.take(self._rows(joined)))

    def _most(self) -> int:
        factor = self._config.pool_factor if self._config.kind == "probe_diverse" else 1.0
        return round(factor * self._config.budget)

    def _rows(self, part: Candidates) -> np.ndarray:
        """Rows of a part that may be chosen: by each of the strategy's orders as many as it takes in all."""
        import numpy as np

        ids, most = part.question_ids, min(self._most(), len(part.question_ids))
        match self._config.kind:
            case "random":
                keys = [_tie_breakers(ids, self._seed)]
            case "semantic_entropy" if part.entropy is not None:
                keys = [part.entropy]
            case "two_axis":
                ranked_by = part.score if part.p_wrong is None else part.p_wrong
                keys = [ranked_by, _exploration_keys(part, self._seed)]
            case "probe" | "probe_diverse":
                keys = [part.score]
            case _:
                return np.arange(len(ids))
        return np.unique(np.concatenate([_top(key, ids, most, self._seed).indices for key in keys]))


def _joined(parts: list[Candidates]) -> Candidates:
    import numpy as np

    columns = [None if first is None else np.concatenate([part[index] for part in parts])
               for index, first in enumerate(parts[0]) if index]  # fmt: skip
    return Candidates([name for part in parts for name in part.question_ids], *columns)  # type: ignore[arg-type]


def random(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Uniform without replacement: the control."""
    return _top(_tie_breakers(candidates.question_ids, seed), candidates.question_ids, budget, seed)


def probe(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The most evidence for unknown (KA2L, arXiv 2603.17566)."""
    return _top(candidates.score, candidates.question_ids, budget, seed)


def semantic_entropy(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The highest semantic entropy of the model's own answers: what the probe predicts, measured."""
    if candidates.entropy is None:
        raise ConfigError(
            "selection.kind semantic_entropy needs sampled answers of all candidates, and there are none",
            hint="Use selection.kind probe, which needs samples of the seed questions only.",
        )
    return _top(candidates.entropy, candidates.question_ids, budget, seed)


def probe_diverse(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Greedy k-centre (CoreSet, Sener and Savarese 2018, arXiv 1708.00489) among the most likely unknown.

    Starts from the most likely unknown question and then takes, time and again, the one whose hidden state is farthest
    from all taken so far.
    """
    import numpy as np
    from skactiveml.pool import CoreSet
    from sklearn.preprocessing import StandardScaler

    if candidates.states is None:
        raise ConfigError(
            "selection.kind probe_diverse needs the hidden states of all candidates, and there are none",
            hint="Use selection.kind probe.",
        )
    num_likely = min(len(candidates.question_ids), round(config.pool_factor * budget))
    likely = _top(candidates.score, candidates.question_ids, num_likely, seed).indices
    # Single dimensions of hidden states can outgrow all others together.
    states = StandardScaler().fit_transform(candidates.states[likely].astype(np.float32))
    centre = np.full(num_likely, np.nan)
    centre[0] = 1.0
    chosen = np.zeros(1, dtype=int)
    if budget > 1:
        # ``likely`` is ordered by score and hash, so equal distances, too, are settled whatever the input's order.
        queried = CoreSet(random_state=seed).query(states, centre, batch_size=budget - 1)
        chosen = np.concatenate([chosen, queried])
    indices = likely[chosen]
    return Selected(indices, candidates.score[indices])


def two_axis(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The most likely answered wrongly, and a share of the budget drawn from what looks known.

    Before anything is annotated, the most evidence for unknown stands in. The explored questions are drawn without
    replacement, each with a weight of P(known), later P(known) P(wrong), as active testing draws in proportion to the
    expected loss (Kossen et al. 2021, arXiv 2103.05331), and spread over the ranks.
    """
    import numpy as np

    num_explored = round(config.explore * budget)
    ranked_by = candidates.score if candidates.p_wrong is None else candidates.p_wrong
    order = _top(ranked_by, candidates.question_ids, len(candidates.question_ids), seed).indices
    best, rest = order[: budget - num_explored], order[budget - num_explored :]
    keys = _exploration_keys(candidates, seed)[rest]
    explored = rest[np.argsort(-keys, kind="stable")[:num_explored]]
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (best, explored)])
    indices = np.concatenate([best, explored])[np.argsort(places, kind="stable")]
    return Selected(indices, ranked_by[indices])


def _exploration_keys(candidates: Candidates, seed: int) -> np.ndarray:
    """Whose largest keys are a weighted draw without replacement (Efraimidis and Spirakis 2006). Shape (N,)."""
    import numpy as np
    from scipy.special import expit

    weights = expit(-np.asarray(candidates.score, dtype=np.float64))
    if candidates.p_wrong is not None:
        weights = weights * np.maximum(candidates.p_wrong, 2.0**-64)
    draws: np.ndarray = np.log(_tie_breakers(candidates.question_ids, seed + 1) + 2.0**-64)
    return draws / np.maximum(weights, np.finfo(np.float64).tiny)


#: kind -> strategy.
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "probe": probe,
    "semantic_entropy": semantic_entropy,
    "probe_diverse": probe_diverse,
    "two_axis": two_axis,
}


def _top(values: np.ndarray, question_ids: list[str], num_wanted: int, seed: int) -> Selected:
    """The highest ``values`` (N,), ties broken by the seed and the question's id."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"the value of question {question_ids[bad[0]]!r} is {values[bad[0]]}, nothing to rank by")
    rows = np.arange(len(values))
    if 0 < num_wanted < len(values):  # a hash a row is what takes time: only for those that may be among the highest
        place = len(values) - num_wanted
        rows = np.flatnonzero(values >= np.partition(values, place)[place])
    ties = _tie_breakers([question_ids[row] for row in rows.tolist()], seed)
    indices = rows[np.lexsort((ties, values[rows]))[::-1][:num_wanted]]
    return Selected(indices, values[indices])


def _tie_breakers(question_ids: list[str], seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each question, from the seed and its id alone. Shape (N,)."""
    import numpy as np

    digests = b"".join(hashlib.blake2b(f"{seed}\x1f{id_}".encode(), digest_size=8).digest() for id_ in question_ids)
    return np.frombuffer(digests, dtype="<u8") / 2.0**64
