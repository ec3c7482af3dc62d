"""Probes side by side: ours and the public code's, fitted on the same rows and measured on the same other people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from public_procedure import ProbeRows, SwiGLUSettings, swiglu_scores, train_swiglu

from ka2l.evaluation.statistics import auroc
from ka2l.knowledge.labels import fit_threshold
from ka2l.knowledge.probe import ProbeConfig
from ka2l.knowledge.probe_training import Rows, standardisation, to_device, train_layers

NUM_FOLDS = 5


class Task(NamedTuple):
    """What an arm is given."""

    states: np.ndarray
    """Shape (N, L, D)."""
    unknown: np.ndarray
    """Shape (N,)."""
    rows: Rows
    layers: list[int]
    seed: int


#: Scores of all rows, higher for unknown: (L, N), or fewer rows for the upper layers alone.
Arm = Callable[[Task], np.ndarray]


def ours(**fields: Any) -> Arm:
    """`ka2l.knowledge.probe` with these settings."""

    def scores(task: Task) -> np.ndarray:
        config = ProbeConfig(**fields)
        mean, scale = standardisation(task.states, task.rows.train)
        data = to_device(task.states, mean, scale, task.unknown, np.ones(len(task.unknown)), config)
        return train_layers(data, task.rows, task.layers, config, task.seed, untrained=False)[1]

    return scores


def public(standardised: bool = False, **fields: Any) -> Arm:
    """The public code's training on the top layer, which it uses, with the settings that differ from its own."""

    def scores(task: Task) -> np.ndarray:
        rows = ProbeRows(task.rows.train, task.rows.validation)
        states = task.states[:, -1]
        if standardised:
            mean, scale = standardisation(task.states[:, -1:], rows.train)
            states = (states - mean[0]) / scale[0]
        model = train_swiglu(states, task.unknown, rows, SwiGLUSettings(**fields), task.seed)
        return swiglu_scores(model, states)[None]

    return scores


def split_by_group(groups: np.ndarray, num_fit: int, seed: int) -> Rows:
    """``num_fit`` rows to fit on, a fifth of them for validation; all others are the test. Nobody is in two parts."""
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    position = {group: index for index, group in enumerate(order)}
    rows = np.argsort([position[group] for group in groups], kind="stable")
    ends = []
    for wanted in (round(0.8 * num_fit), num_fit):
        end = wanted
        while end < len(rows) and groups[rows[end]] == groups[rows[end - 1]]:
            end += 1
        ends.append(end)
    return Rows(*np.split(rows, ends))


def cross_fitted(arm: Arm, task: Task, groups: np.ndarray) -> dict[str, list[float]]:
    """AUROC and loss of each layer over all rows to fit on, each scored by a probe that has not seen its person."""
    fit = np.union1d(task.rows.train, task.rows.validation)
    people = np.random.default_rng(task.seed).permutation(np.unique(groups[fit]))
    fold_of = {person: index % NUM_FOLDS for index, person in enumerate(people)}
    folds = np.array([fold_of[group] for group in groups[fit]])
    scores = np.empty(task.states.shape[1::-1])
    for fold in range(NUM_FOLDS):
        rows = Rows(fit[folds != fold], fit[folds == fold], task.rows.test)
        scores[:, rows.validation] = arm(task._replace(rows=rows))[:, rows.validation]
    return {
        "crossed_auroc": [auroc(task.unknown[fit], layer[fit]) for layer in scores],
        "crossed_loss": [_loss(task.unknown[fit], layer[fit]) for layer in scores],
    }


def _loss(unknown: np.ndarray, scores: np.ndarray) -> float:
    """Cross-entropy of log-odds, nats."""
    return float(np.logaddexp(0, np.where(unknown, -1, 1) * scores).mean())


def compare(
    file: Path, arms: Mapping[str, Arm], seeds: Sequence[int], num_fit: int, crossed: Sequence[str] = ()
) -> dict[str, Any]:
    """AUROC of every arm on the test rows, for "unknown" and for "answers wrongly".

    Args:
        file: states (N, L, D), entropies, wrong, groups, as ``public_processes.run_observe`` writes them.
        arms: by name; all see the same rows.
        seeds: of the split and of the weights.
        num_fit: rows to fit on; the threshold is of their train part.
        crossed: arms that are fitted in folds, too, for the rule ``crossed``.

    Returns:
        For every arm a list over seeds of figures by layer: AUROC and loss on the validation rows, by which `chosen`
        takes one, and AUROC on the test rows.
    """
    with np.load(file) as stored:
        states, entropies, wrong, groups = (stored[name] for name in ("states", "entropies", "wrong", "groups"))
    layers = list(range(1, states.shape[1]))  # the embedding of the last prompt token is the same for all
    states = np.ascontiguousarray(states[:, layers])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in seeds:
        rows = split_by_group(groups, num_fit, seed)
        unknown = entropies >= fit_threshold(entropies[rows.train])
        if len(np.unique(unknown[rows.validation])) < 2:  # as `fit_probe` does
            rows = rows._replace(validation=np.concatenate([rows.validation, rows.train]))
        at = rows.validation
        for name, arm in arms.items():
            task = Task(states, unknown, rows, layers, seed)
            scores = arm(task)
            figures = {
                "validation_auroc": [auroc(unknown[at], layer[at]) for layer in scores],
                "validation_loss": [_loss(unknown[at], layer[at]) for layer in scores],
                "unknown": [auroc(unknown[rows.test], layer[rows.test]) for layer in scores],
                "wrong": [auroc(wrong[rows.test], layer[rows.test]) for layer in scores],
            }
            if name in crossed:
                figures |= cross_fitted(arm, task, groups)
            found[name].append({"seed": seed, "layers": layers[-len(scores) :]} | figures)
            print(f"{name}, seed {seed}: {[round(value, 4) for value in figures['unknown']]}", flush=True)
    return {
        "num_rows": len(groups),
        "num_fit": num_fit,
        "entropy_wrong": auroc(wrong, entropies),
        "wrong_share": float(wrong.mean()),
        "arms": found,
    }


def chosen(run: Mapping[str, Any], rule: str) -> int:
    """Index of the layer by a rule on the validation rows alone: ``auroc`` (the lower loss decides ties), ``loss``,
    ``crossed``: the same as ``auroc`` with `cross_fitted`'s figures; or ``top``, the last layer."""
    indices = range(len(run["layers"]))
    if rule == "top":
        return indices[-1]
    source = "crossed" if rule == "crossed" else "validation"
    loss = run[f"{source}_loss"]
    return min(indices, key=lambda i: (0.0 if rule == "loss" else -run[f"{source}_auroc"][i], loss[i]))


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first - second, paired, with the 95 % interval of Student's t over seeds."""
    from scipy.stats import t

    gaps = np.subtract(first, second)
    if len(gaps) < 2:
        return float(gaps.mean()), math.nan, math.nan
    half = float(t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
    return float(gaps.mean()), float(gaps.mean()) - half, float(gaps.mean()) + half
