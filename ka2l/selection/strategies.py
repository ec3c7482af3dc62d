"""Query strategies choose the candidates to annotate.

A strategy is a plain function from candidates to row numbers, best first. To add one, write the function and put it
into ``STRATEGIES``. A pool comes in parts: `Shortlist` keeps of each what the strategy could choose, however good the
rest of the pool is, so that no more than that is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ka2l.errors import BudgetError, ConfigError
from ka2l.section import Section
from ka2l.selection.candidates import Candidates, Selected, join, tie_breakers, top
from ka2l.selection.diversity import badge, core_set, num_compared, prob_cover, probe_diverse, typi_clust

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "STRATEGIES",
    "Candidates",
    "Selected",
    "SelectionConfig",
    "Shortlist",
    "Strategy",
    "explored_share",
    "num_likely",
    "select",
]


Strategy = Callable[[Candidates, int, int, "SelectionConfig"], Selected]


def num_likely(candidates: Candidates) -> int:
    """Candidates that are more likely wrong than right, or, before anything is annotated, more likely unknown."""
    if candidates.p_wrong is not None:
        return int((candidates.p_wrong >= 0.5).sum())
    return int((candidates.score >= 0).sum())


def explored_share(config: SelectionConfig, num_left: int, num_likely: int) -> float:
    """Share of a round's budget to explore with: of ``config.explore`` what the likely ones leave over.

    An annotation that is spent on exploring while there are likely ones that no round will reach teaches less than one
    of those would.

    Args:
        num_left: annotations of this round and of those to come.
        num_likely: candidates left as of `num_likely`.
    """
    return min(config.explore, max(0, num_left - num_likely) / config.budget)


def random(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Uniform without replacement: the control."""
    return top(tie_breakers(candidates.question_ids, seed), candidates.question_ids, budget, seed)


def probe(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The most evidence for unknown (KA2L, arXiv 2603.17566)."""
    return top(candidates.score, candidates.question_ids, budget, seed)


def known(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The least evidence for unknown: what the model knows best, the control that should help least."""
    indices = top(-candidates.score, candidates.question_ids, budget, seed).indices
    return Selected(indices, candidates.score[indices])


def semantic_entropy(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The highest semantic entropy of the model's own answers: what the probe predicts, measured."""
    return _highest("semantic_entropy", candidates.entropy, "sampled answers", candidates, budget, seed)


def entropy(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The highest predictive entropy of the model's own answers (Malinin and Gales 2021, arXiv 2002.07650).

    Unlike semantic entropy it counts other wordings of the same answer as doubt, and longer answers as more of it.
    """
    return _highest("entropy", candidates.predictive_entropy, "sampled answers", candidates, budget, seed)


def perplexity(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The highest perplexity of the question's own text: what the model has not read the like of, whatever the answer
    (Marion et al. 2023, arXiv 2309.04564, rank training texts so)."""
    return _highest("perplexity", candidates.perplexity, "the perplexity", candidates, budget, seed)


def _highest(
    kind: str, values: np.ndarray | None, needed: str, candidates: Candidates, budget: int, seed: int
) -> Selected:
    if values is None:
        raise ConfigError(
            f"selection.kind {kind} needs {needed} of all candidates, and there are none",
            hint="Use selection.kind probe, which needs samples of the seed questions only.",
        )
    return top(values, candidates.question_ids, budget, seed)


def two_axis(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """The most likely answered wrongly, and a share of the budget drawn from what looks known.

    Before anything is annotated, the most evidence for unknown stands in. The explored questions are drawn without
    replacement, each with a weight of P(known), later P(known) P(wrong), as active testing draws in proportion to the
    expected loss (Kossen et al. 2021, arXiv 2103.05331), and spread over the ranks.
    """
    import numpy as np

    num_explored = round(config.explore * budget)
    ranked_by = candidates.score if candidates.p_wrong is None else candidates.p_wrong
    order = top(ranked_by, candidates.question_ids, len(candidates.question_ids), seed).indices
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
    draws: np.ndarray = np.log(tie_breakers(candidates.question_ids, seed + 1) + 2.0**-64)
    return draws / np.maximum(weights, np.finfo(np.float64).tiny)


#: kind -> strategy.
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "probe": probe,
    "known": known,
    "semantic_entropy": semantic_entropy,
    "entropy": entropy,
    "perplexity": perplexity,
    "probe_diverse": probe_diverse,
    "two_axis": two_axis,
    "core_set": core_set,
    "typi_clust": typi_clust,
    "prob_cover": prob_cover,
    "badge": badge,
}


class SelectionConfig(Section):
    """Which candidates are annotated in a round."""

    KINDS: ClassVar[tuple[str, ...]] = tuple(STRATEGIES)
    SAMPLED: ClassVar[tuple[str, ...]] = ("semantic_entropy", "entropy")
    """Kinds that need sampled answers of all candidates."""
    COMPARED: ClassVar[tuple[str, ...]] = ("core_set", "typi_clust", "prob_cover", "badge")
    """Kinds that compare the hidden states of all candidates, or of a uniform draw from a large pool
    (`ka2l.selection.diversity.MAX_COMPARED`)."""

    kind: str = "two_axis"
    """``probe`` takes what is most likely unknown, by the probe and, where answers were sampled, by their disagreement.
    ``two_axis`` begins as ``probe``; from the second round on it takes what is most likely answered wrongly,
    with doubt or without, as annotation has shown so far (rehearsal draws the answers that show it). ``known`` is the
    opposite of ``probe``, and ``random`` takes any: the controls. ``semantic_entropy`` takes what the model's own
    answers disagree about most and ``entropy`` what they are least likely of (samples of all candidates are needed);
    ``perplexity`` the questions whose own wording the model finds hardest (a forward pass over all candidates);
    ``probe_diverse`` spreads over the likely unknown. ``core_set``, ``typi_clust`` and ``prob_cover`` spread over the
    hidden states of all candidates, whatever is known of them, and ``badge`` over those on which the probe is
    undecided. ``module:function`` is a strategy of your own."""
    budget: int = Field(150, ge=1)
    """Questions a round."""
    pool_factor: float = Field(3.0, ge=1)
    """``probe_diverse`` chooses among this many times the budget of the most likely unknown, of those that are more
    likely unknown than known where they fill the budget."""
    explore: float = Field(0.2, ge=0, le=1)
    """Most of a round's budget that ``two_axis`` draws from what looks known, since nothing else shows what has been
    learnt wrongly: as much as the rounds to come will have left over beside what looks unknown. The last round does not
    explore."""

    @property
    def samples_candidates(self) -> bool:
        """Whether sampled answers of all candidates are needed."""
        return self.kind in self.SAMPLED


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
        self.num_likely = 0
        """Of them, as of `num_likely`."""

    def add(self, part: Candidates) -> None:
        """Take in a part of the pool; parts have the same columns."""
        if not part.question_ids:
            return
        self.num_seen += len(part.question_ids)
        self.num_likely += num_likely(part)
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
        joined = join(self._kept)
        self._kept, self._num_kept = [], 0
        self._keep(joined.take(self._rows(joined)))

    def _most(self) -> int:
        if self._config.kind in self._config.COMPARED:
            return num_compared(self._config.budget)
        factor = self._config.pool_factor if self._config.kind == "probe_diverse" else 1.0
        return round(factor * self._config.budget)

    def _rows(self, part: Candidates) -> np.ndarray:
        """Rows of a part that may be chosen: by each of the strategy's orders as many as it takes in all."""
        import numpy as np

        ids, most = part.question_ids, min(self._most(), len(part.question_ids))
        match self._config.kind:
            case "random":
                keys = [tie_breakers(ids, self._seed)]
            case kind if kind in self._config.COMPARED:  # a uniform draw
                keys = [tie_breakers(ids, self._seed)]
            case "known":
                keys = [-part.score]
            case "semantic_entropy" if part.entropy is not None:
                keys = [part.entropy]
            case "entropy" if part.predictive_entropy is not None:
                keys = [part.predictive_entropy]
            case "perplexity" if part.perplexity is not None:
                keys = [part.perplexity]
            case "two_axis":
                ranked_by = part.score if part.p_wrong is None else part.p_wrong
                keys = [ranked_by, _exploration_keys(part, self._seed)]
            case "probe" | "probe_diverse":
                keys = [part.score]
            case _:
                return np.arange(len(ids))
        return np.unique(np.concatenate([top(key, ids, most, self._seed).indices for key in keys]))
