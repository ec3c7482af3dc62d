"""Query strategies: which candidates are worth an annotation.

A strategy is a plain function from candidates to row numbers, best first. To add one, write the function and put it
into ``STRATEGIES``.
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
    from scipy.special import expit

    num_explored = round(config.explore * budget)
    ranked_by = candidates.score if candidates.p_wrong is None else candidates.p_wrong
    order = _top(ranked_by, candidates.question_ids, len(candidates.question_ids), seed).indices
    best, rest = order[: budget - num_explored], order[budget - num_explored :]
    # Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis 2006).
    draws = np.log(_tie_breakers([candidates.question_ids[row] for row in rest], seed + 1) + 2.0**-64)
    weights = expit(-np.asarray(candidates.score, dtype=np.float64))
    if candidates.p_wrong is not None:
        weights = weights * np.maximum(candidates.p_wrong, 2.0**-64)
    keys = draws / weights[rest]
    explored = rest[np.argsort(-keys, kind="stable")[:num_explored]]
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (best, explored)])
    indices = np.concatenate([best, explored])[np.argsort(places, kind="stable")]
    return Selected(indices, ranked_by[indices])


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
    indices = np.lexsort((_tie_breakers(question_ids, seed), values))[::-1][:num_wanted]
    return Selected(indices, values[indices])


def _tie_breakers(question_ids: list[str], seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each question, from the seed and its id alone. Shape (N,)."""
    import numpy as np

    digests = b"".join(hashlib.blake2b(f"{seed}\x1f{id_}".encode(), digest_size=8).digest() for id_ in question_ids)
    return np.frombuffer(digests, dtype="<u8") / 2.0**64
