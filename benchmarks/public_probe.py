"""Probes side by side: ours and the public code's, fitted on the same rows and measured on the same other people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from public_procedure import ProbeRows, SwiGLUSettings, swiglu_scores, train_swiglu

from ka2l.labels import fit_threshold
from ka2l.metrics import auroc
from ka2l.probe import ProbeConfig
from ka2l.probe_training import Rows, standardisation, to_device, train_layers


class Task(NamedTuple):
    """What an arm is given."""

    states: np.ndarray
    """Shape (N, L, D)."""
    unknown: np.ndarray
    """Shape (N,)."""
    rows: Rows
    layers: list[int]
    seed: int


#: Scores of all rows, (L, N), higher for unknown.
Arm = Callable[[Task], np.ndarray]


def ours(**fields: Any) -> Arm:
    """`ka2l.probe` with these settings."""

    def scores(task: Task) -> np.ndarray:
        config = ProbeConfig(**fields)
        mean, scale = standardisation(task.states, task.rows.train)
        data = to_device(task.states, mean, scale, task.unknown, np.ones(len(task.unknown)), config)
        return train_layers(data, task.rows, task.layers, config, task.seed, untrained=False)[1]

    return scores


def public(standardised: bool = False, **fields: Any) -> Arm:
    """The public code's training, with the settings that differ from its own."""

    def scores(task: Task) -> np.ndarray:
        rows = ProbeRows(task.rows.train, task.rows.validation)
        found = []
        for index in range(task.states.shape[1]):
            states = task.states[:, index]
            if standardised:
                mean, scale = standardisation(task.states[:, [index]], rows.train)
                states = (states - mean[0]) / scale[0]
            model = train_swiglu(states, task.unknown, rows, SwiGLUSettings(**fields), task.seed)
            found.append(swiglu_scores(model, states))
        return np.stack(found)

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


def compare(file: Path, arms: Mapping[str, Arm], seeds: Sequence[int], num_fit: int) -> dict[str, Any]:
    """AUROC of every arm on the test rows, for "unknown" and for "answers wrongly".

    Args:
        file: states (N, L, D), entropies, wrong, groups, as ``public_processes.run_observe`` writes them.
        arms: by name; all see the same rows.
        seeds: of the split and of the weights.
        num_fit: rows to fit on; the threshold is of their train part.

    Returns:
        For every arm a list over seeds of the chosen layer (highest validation AUROC), its AUROCs and those by layer.
    """
    with np.load(file) as stored:
        states, entropies, wrong, groups = (stored[name] for name in ("states", "entropies", "wrong", "groups"))
    layers = list(range(1, states.shape[1]))  # the embedding of the last prompt token is the same for all
    states = np.ascontiguousarray(states[:, layers])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in seeds:
        rows = split_by_group(groups, num_fit, seed)
        unknown = entropies >= fit_threshold(entropies[rows.train])
        for name, arm in arms.items():
            scores = arm(Task(states, unknown, rows, layers, seed))
            chosen = max(range(len(layers)), key=lambda i: auroc(unknown[rows.validation], scores[i][rows.validation]))
            by_layer = [auroc(unknown[rows.test], layer[rows.test]) for layer in scores]
            found[name].append(
                {
                    "seed": seed,
                    "layer": layers[chosen],
                    "unknown": by_layer[chosen],
                    "wrong": auroc(wrong[rows.test], scores[chosen][rows.test]),
                    "by_layer": by_layer,
                }
            )
            print(f"{name}, seed {seed}: layer {layers[chosen]}, {by_layer[chosen]:.4f}", flush=True)
    return {
        "num_rows": len(groups),
        "num_fit": num_fit,
        "entropy_wrong": auroc(wrong, entropies),
        "wrong_share": float(wrong.mean()),
        "arms": found,
    }


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first - second, paired, with the 95 % interval of Student's t over seeds."""
    from scipy.stats import t

    gaps = np.subtract(first, second)
    if len(gaps) < 2:
        return float(gaps.mean()), math.nan, math.nan
    half = float(t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
    return float(gaps.mean()), float(gaps.mean()) - half, float(gaps.mean()) + half
