"""Query strategies that spread over hidden states, so that the selected represent the rest.

All of them see states that are standardised dimension by dimension: single dimensions of hidden states can outgrow all
others together. Rows are first put into the order of a hash of seed and question id, so that equal distances and random
draws, too, come out the same whatever the candidates' order. None compares more than `MAX_COMPARED` candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ka2l.errors import ConfigError
from ka2l.selection.candidates import Candidates, Selected, finite, tie_breakers, top

if TYPE_CHECKING:
    import numpy as np

    from ka2l.selection.strategies import SelectionConfig

MAX_COMPARED = 20_000
"""Candidates among which ``core_set``, ``typi_clust``, ``prob_cover`` and ``badge`` choose, at most (or the budget, if
that is more): of a larger pool a uniform draw of so many stands for all. Cost and memory grow with the square."""

MAX_CLUSTERS = 500
"""Of ``typi_clust``, as in its paper."""
_NUM_NEIGHBOURS = 20
_SMALL_CLUSTER = 5
_LARGEST_EXACT_CLUSTERING = 50

NUM_CLASSES = 2
"""Pseudo-classes of ``prob_cover``: as many as the probe tells apart, known and unknown."""
MIN_PURITY = 0.95
"""Share of ``prob_cover``'s balls that hold one pseudo-class alone, as in its paper."""


def num_compared(budget: int) -> int:
    """How many candidates are compared at most for this budget."""
    return max(MAX_COMPARED, budget)


def probe_diverse(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Greedy k-centre (CoreSet, Sener and Savarese 2018, arXiv 1708.00489) among the most likely unknown.

    Starts from the most likely unknown question and then takes, time and again, the one whose hidden state is farthest
    from all taken so far. What is more likely known is left out while the rest fills the budget: outliers come first,
    and in a small pool most of them would be known.
    """
    import numpy as np
    from skactiveml.pool import CoreSet

    num_likely = min(len(candidates.question_ids), round(config.pool_factor * budget))
    likely = top(candidates.score, candidates.question_ids, num_likely, seed).indices
    likely = likely[: max(budget, np.count_nonzero(candidates.score[likely] > 0))]
    states = _standardised(_states(candidates, "probe_diverse")[likely])[0]
    centre = np.full(len(likely), np.nan)
    centre[0] = 1.0
    chosen = np.zeros(1, dtype=int)
    if budget > 1:
        # ``likely`` is ordered by score and hash, so equal distances, too, are settled whatever the input's order.
        queried = CoreSet(random_state=seed).query(states, centre, batch_size=budget - 1)
        chosen = np.concatenate([chosen, queried])
    indices = likely[chosen]
    return Selected(indices, candidates.score[indices])


def core_set(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Greedy k-centre (CoreSet, Sener and Savarese 2018, arXiv 1708.00489) among all candidates.

    Time and again the candidate whose state is farthest from all that has been asked, in earlier rounds too. The first
    question of all is drawn. Time grows with candidates times budget. (scikit-activeml's CoreSet chooses the same in
    ten times the time for 10,000 states of 4,096 dimensions, and holds budget x candidates numbers.)
    """
    compared = _compared(candidates, budget, seed, "core_set")
    return compared.selected(candidates, _farthest_first(compared.states, compared.asked, budget))


def typi_clust(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Typical questions of clusters not asked about yet (TypiClust, Hacohen et al. 2022, arXiv 2202.02794).

    K-means into as many clusters as questions have been asked and are to be, at most `MAX_CLUSTERS`; then in turn from
    the clusters with the fewest asked questions, the largest first, the question nearest to its 20 nearest neighbours
    of the cluster. Clusters of fewer than five candidates come last. (scikit-activeml's TypiClust does the same with as
    many clusters as questions, which takes long for thousands, and repeats itself where a cluster is empty.)
    """
    import numpy as np

    compared = _compared(candidates, budget, seed, "typi_clust")
    num_candidates, num_asked = len(compared.states), len(compared.asked)
    points = np.concatenate([compared.states, compared.asked])
    clusters = _clusters(points, min(num_asked + budget, MAX_CLUSTERS), seed)
    num_asked_of = np.bincount(clusters[num_candidates:], minlength=clusters.max() + 1)
    clusters = clusters[:num_candidates]
    sizes = np.bincount(clusters, minlength=len(num_asked_of))
    turns = np.empty(num_candidates, dtype=int)
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        order = members[np.argsort(_mean_neighbour_distances(compared.states[members]), kind="stable")]
        turns[order] = num_asked_of[cluster] + np.arange(len(members))
    size = sizes[clusters]
    chosen = np.lexsort((np.arange(num_candidates), -size, turns, size < _SMALL_CLUSTER))[:budget]
    return compared.selected(candidates, chosen)


def prob_cover(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Questions whose neighbourhoods cover most (ProbCover, Yehuda et al. 2022, arXiv 2205.11320).

    Time and again the candidate with the most candidates within a radius that no asked question, of earlier rounds
    too, has within the same radius. The radius is the largest at which `MIN_PURITY` of all balls hold one pseudo-class
    alone; pseudo-classes are `NUM_CLASSES` clusters of k-means. Where all is covered, the rest is drawn. Memory: a byte
    for each pair of candidates. (scikit-activeml's ProbCover goes over all pairs for every question.)
    """
    import numpy as np

    compared = _compared(candidates, budget, seed, "prob_cover")
    states = compared.states
    radius = _pure_radius(states, _clusters(states, NUM_CLASSES, seed))
    covers = np.empty((len(states), len(states)), dtype=bool)
    for rows, distances in _distance_blocks(states):
        covers[rows] = distances <= radius
    covered = _distances_to_nearest(states, compared.asked) <= radius
    num_new = covers.sum(axis=0, where=~covered[:, None])
    chosen = np.empty(budget, dtype=int)
    for place in range(budget):
        chosen[place] = best = int(np.argmax(num_new))  # the first of equals: rows are in a random order
        new = covers[:, best] & ~covered
        num_new -= covers[new].sum(axis=0)
        num_new[best] = -len(states)
        covered |= new
    return compared.selected(candidates, chosen)


def badge(candidates: Candidates, budget: int, seed: int, config: SelectionConfig) -> Selected:
    """Doubtful questions that differ (BADGE, Ash et al. 2020, arXiv 1906.03671).

    Draws by k-means++ among gradient embeddings: the gradient, by the weights of a logistic output on the state, of the
    loss at the likelier of known and unknown, which is (P(unknown) - that label) x state. Its length is the probe's
    doubt, so it is the questions on which the probe is undecided that are asked, not the unknown ones. The longest
    comes first. What earlier rounds asked is not looked at. (scikit-activeml's Badge can repeat itself where states are
    equal.)
    """
    import numpy as np

    compared = _compared(candidates, budget, seed, "badge")
    p_unknown = finite(candidates.p_unknown, candidates.question_ids)[compared.rows]
    gradients = ((p_unknown - (p_unknown >= 0.5))[:, None] * compared.states).astype(np.float32)
    return compared.selected(candidates, _k_means_plus_plus(gradients, budget, seed))


class _Compared(NamedTuple):
    """The candidates that a strategy compares, in an order of their own."""

    rows: np.ndarray
    """Row numbers in all candidates, shape (N,)."""
    states: np.ndarray
    """Standardised, shape (N, D)."""
    asked: np.ndarray
    """Standardised in the same way, shape (M, D); M is 0 in a first round."""

    def selected(self, candidates: Candidates, chosen: np.ndarray) -> Selected:
        indices = self.rows[chosen]
        return Selected(indices, candidates.score[indices])


def _compared(candidates: Candidates, budget: int, seed: int, kind: str) -> _Compared:
    states = _states(candidates, kind)
    ids = candidates.question_ids
    rows = top(tie_breakers(ids, seed), ids, num_compared(budget), seed).indices
    return _Compared(rows, *_standardised(states[rows], candidates.asked_states))


def _states(candidates: Candidates, kind: str) -> np.ndarray:
    if candidates.states is None:
        raise ConfigError(
            f"selection.kind {kind} needs the hidden states of all candidates, and there are none",
            hint="Use selection.kind probe.",
        )
    return candidates.states


def _standardised(states: np.ndarray, others: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """States, and others by the same means and spreads."""
    import numpy as np
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    made = scaler.fit_transform(states.astype(np.float32))
    if others is None or not len(others):
        return made, made[:0]
    return made, scaler.transform(others.astype(np.float32))


def _clusters(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster of each point by k-means, shape (num_points,). Many clusters are found in mini-batches."""
    import numpy as np
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    num_clusters = min(num_clusters, len(points))
    made = (
        KMeans(num_clusters, n_init=1, random_state=seed)
        if num_clusters <= _LARGEST_EXACT_CLUSTERING
        else MiniBatchKMeans(num_clusters, batch_size=5000, n_init=1, random_state=seed)
    )
    # Threads add up in the order in which they end, so that more of them than one would make sums differ.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        return np.asarray(made.fit_predict(points))


def _mean_neighbour_distances(states: np.ndarray) -> np.ndarray:
    """Mean distance to the nearest others, shape (num_states,): the inverse of typicality."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    num_neighbours = min(_NUM_NEIGHBOURS, len(states) - 1)
    if num_neighbours == 0:
        return np.zeros(1)
    found = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(states).kneighbors()[0]
    return np.asarray(found.mean(axis=1))


def _distance_blocks(states: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Distances of some of the states at a time to all of them, shape (num_of_block, num_states)."""
    from sklearn.metrics import pairwise_distances_chunked

    end = 0
    for block in pairwise_distances_chunked(states, working_memory=256):
        yield slice(end, end + len(block)), block
        end += len(block)


def _pure_radius(states: np.ndarray, classes: np.ndarray) -> float:
    """The largest radius at which a share of `MIN_PURITY` of the balls around states hold no state of another class.

    A ball is pure up to the nearest state of another class, so that no radius has to be tried.
    """
    import numpy as np

    nearest_other = np.concatenate(
        [
            np.where(classes[rows, None] == classes, np.inf, block).min(axis=1)
            for rows, block in _distance_blocks(states)
        ]
    )
    limit = np.sort(nearest_other)[int((1 - MIN_PURITY) * len(states))]
    return float(np.nextafter(limit, -np.inf))


def _distances_to_nearest(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each state from the nearest of the others, shape (num_states,); infinite where there are none."""
    import numpy as np
    from sklearn.metrics import pairwise_distances_argmin_min

    if not len(others):
        return np.full(len(states), np.inf)
    return np.asarray(pairwise_distances_argmin_min(states, others)[1])


def _farthest_first(points: np.ndarray, asked: np.ndarray, num_wanted: int) -> np.ndarray:
    """Different rows, each the farthest from its nearest among ``asked`` and the rows before it (Gonzalez 1985), the
    first of equals. Shape (num_wanted,)."""
    import numpy as np

    squares = np.einsum("nd,nd->n", points, points)
    distances = np.square(_distances_to_nearest(points, asked))
    chosen = np.empty(num_wanted, dtype=int)
    for place in range(num_wanted):
        chosen[place] = last = int(np.argmax(distances))
        distances = np.minimum(distances, _squared_distances(points, squares, last))
        distances[last] = -np.inf
    return chosen


def _squared_distances(points: np.ndarray, squares: np.ndarray, row: int) -> np.ndarray:
    """Squared distances of all points, of which the squared lengths are given, from one of them."""
    import numpy as np

    found: np.ndarray = np.maximum(squares + squares[row] - 2 * points @ points[row], 0)
    return found


def _k_means_plus_plus(points: np.ndarray, num_wanted: int, seed: int) -> np.ndarray:
    """Different rows, the longest first and then each with a probability in proportion to its squared distance from the
    nearest row so far (Arthur and Vassilvitskii 2007). Shape (num_wanted,)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    squares = np.einsum("nd,nd->n", points, points)
    chosen = np.empty(num_wanted, dtype=int)
    chosen[0] = np.argmax(squares)
    distances = np.full(len(points), np.inf)
    left = np.ones(len(points), dtype=bool)
    for place in range(1, num_wanted):
        last = chosen[place - 1]
        left[last] = False
        distances = np.minimum(distances, _squared_distances(points, squares, last))
        weights = np.where(left, distances, 0).astype(np.float64)
        total = weights.sum()
        # Equal rows alone are left: any of them.
        chosen[place] = rng.choice(len(points), p=weights / total if total > 0 else left / left.sum())
    return chosen
