"""The probe: from the hidden states of a question to the probability that the model does not know the answer.

All layers are trained at once, each on its own, as one batched matrix product. Weights see the train rows; early
stopping, the choice of the layer and the calibration see the validation rows; every reported figure is of test rows.
A label says whether a question is unknown, the disagreement of its answers how far it is: trained on the latter, the
probe ranks better (`benchmarks/bench_uncertainty.py` compares); calibrated and measured it is by the former. Where the
forward pass was asked how sure the model is of the first answer token, that is joined with what the states say.
Sources: KA2L (arXiv 2603.17566) for the task and the SwiGLU probe; semantic entropy probes (Kossen et al. 2024,
arXiv 2406.15927) for the linear one; Platt 1999 for calibration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ka2l.errors import PoolError
from ka2l.evaluation.statistics import auroc, auroc_with_ci, json_safe
from ka2l.knowledge.calibration import calibrated_log_odds, calibration_error, constant_calibration, fit_calibration
from ka2l.knowledge.first_token import fit_stack, stacked
from ka2l.knowledge.probe_training import (
    Rows,
    forward,
    row_slices,
    standardisation,
    to_device,
    train_layers,
    weight_shapes,
)
from ka2l.section import Section

if TYPE_CHECKING:
    import numpy as np


class ProbeConfig(Section):
    """How known is told from unknown."""

    KINDS: ClassVar[tuple[str, ...]] = ("linear", "mlp", "swiglu")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"device"})

    kind: str = "mlp"
    """``linear``, ``mlp`` (one hidden layer), or ``swiglu``, the paper's (about 176M weights a layer at width 4096)."""
    hidden: int = Field(64, ge=1)
    """Hidden units of ``mlp``."""
    swiglu_hidden: int = Field(14336, ge=1)
    """Hidden units of ``swiglu``."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW. The paper trains ``swiglu`` with 1e-5."""
    num_epochs: int = Field(60, ge=1)
    """Passes over the train rows, at most."""
    patience: int = Field(8, ge=1)
    """Epochs without a lower validation loss after which a layer is done."""
    batch_size: int = Field(64, ge=1)
    """Rows in one step."""
    weight_decay: float = Field(0.1, ge=0)
    """Of AdamW."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """In front of the output layer."""
    calibration: Literal["platt", "isotonic"] = "platt"
    """How scores become probabilities; ``isotonic`` needs many validation rows and gives ties."""
    num_bootstrap: int = Field(1000, ge=1)
    """Resamples behind the confidence intervals."""
    device: str = "auto"
    """``auto`` is a GPU where there is one, else the CPU."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe on one layer.

    Attributes:
        kind: one of ``ProbeConfig.KINDS``.
        layer: number of the chosen layer.
        layers: numbers of the layers in the states it was fitted on, shape (L,).
        metrics: JSON-safe figures of the test split, see ``fit_probe``.
        calibration: how scores become log-odds.
        stack: how scores are joined with the certainty of the first answer token; None where states are all.
        arrays: weights, standardisation (``mean``, ``scale``) and principal components of the chosen layer.
    """

    kind: str
    layer: int
    layers: list[int]
    metrics: dict[str, Any]
    calibration: dict[str, Any]
    stack: dict[str, Any] | None
    arrays: dict[str, np.ndarray]

    def predict(self, states: np.ndarray, next_token: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probability of unknown, shape (N,), as `predict_logit` takes it."""
        from scipy.special import expit

        return expit(self.predict_logit(states, next_token))

    def predict_logit(self, states: np.ndarray, next_token: np.ndarray | None = None) -> np.ndarray:
        """Calibrated log-odds of unknown, shape (N,).

        Args:
            states: (N, L, D), or (N, D) of the chosen layer.
            next_token: certainty of the first answer token, shape (N, 3); not looked at by a probe fitted without.

        Raises:
            ValueError: a shape that the probe was not fitted on, or no ``next_token`` where it was fitted with it.
        """
        import numpy as np
        import torch

        chosen = self._chosen(states)
        weights = {name: torch.from_numpy(self.arrays[name])[None] for name in weight_shapes(self.kind, 1, 1)}
        mean, scale = torch.from_numpy(self.arrays["mean"]), torch.from_numpy(self.arrays["scale"])
        scores = np.empty(len(chosen), dtype=np.float64)
        with torch.inference_mode():
            for rows in row_slices(len(chosen)):
                x = (torch.from_numpy(chosen[rows].astype(np.float32)) - mean) / scale
                scores[rows] = forward(self.kind, weights, x[None])[0].numpy()
        if self.stack is not None:
            if next_token is None:
                raise ValueError("this probe was fitted with the certainty of the first answer token; give next_token")
            scores = stacked(self.stack, scores, next_token)
        return calibrated_log_odds(self.calibration, scores)

    def pca(self, states: np.ndarray) -> np.ndarray:
        """First two principal components of the standardised states, fitted on the train rows. Shape (N, 2)."""
        import numpy as np

        chosen = self._chosen(states)
        points = np.empty((len(chosen), 2), dtype=np.float32)
        for rows in row_slices(len(chosen)):
            x = (chosen[rows].astype(np.float32) - self.arrays["mean"]) / self.arrays["scale"]
            points[rows] = x @ self.arrays["components"].T
        return points

    def save(self, path: str) -> None:
        """Write ``probe.json`` and ``probe.safetensors`` into the folder ``path``, local or remote."""
        import fsspec
        from safetensors.numpy import save

        filesystem, folder = fsspec.url_to_fs(str(path))
        filesystem.makedirs(folder, exist_ok=True)
        fields = {
            "kind": self.kind,
            "layer": self.layer,
            "layers": self.layers,
            "metrics": self.metrics,
            "calibration": self.calibration,
            "stack": self.stack,
        }
        filesystem.pipe_file(f"{folder}/probe.safetensors", save(self.arrays))
        filesystem.pipe_file(f"{folder}/probe.json", json.dumps(fields, indent=2, allow_nan=False).encode())

    def _chosen(self, states: np.ndarray) -> np.ndarray:
        width = len(self.arrays["mean"])
        if states.ndim == 3 and states.shape[1:] == (len(self.layers), width):
            return states[:, self.layers.index(self.layer)]
        if states.ndim == 2 and states.shape[1] == width:
            return states
        raise ValueError(f"states have shape {states.shape}, not (N, {len(self.layers)}, {width}) or (N, {width})")


def load_probe(path: str) -> Probe:
    """The probe that ``Probe.save`` wrote into the folder ``path``."""
    import fsspec
    from safetensors.numpy import load

    filesystem, folder = fsspec.url_to_fs(str(path))
    fields = json.loads(filesystem.cat_file(f"{folder}/probe.json"))
    return Probe(**fields, arrays=load(filesystem.cat_file(f"{folder}/probe.safetensors")))


def fit_probe(
    states: np.ndarray,
    unknown: np.ndarray,
    probe_split: Sequence[str],
    layers: Sequence[int],
    config: ProbeConfig,
    seed: int,
    sample_weight: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    next_token: np.ndarray | None = None,
) -> Probe:
    """Fit one probe a layer, choose the layer, join it with the model's certainty, calibrate it and measure it.

    The layer with the highest validation AUROC is chosen; the lower validation loss decides ties. Where the train rows
    are all known or all unknown the probe predicts the base rate, and where a split has one class its AUROC is None.

    Args:
        states: shape (N, L, D).
        unknown: labels, shape (N,), true for unknown.
        probe_split: ``train`` | ``validation`` | ``test`` of each row. Where the validation rows do not
            hold both classes, the train rows join them.
        layers: numbers of the layers in ``states``, shape (L,).
        config: what to fit and how.
        seed: of initial weights, order of rows, dropout and bootstrap.
        sample_weight: weight of each row in the loss, shape (N,).
        targets: what is trained for in place of the labels, in [0, 1], shape (N,): how far the answers disagree. NaN
            for a row's label.
        next_token: certainty of the first answer token (`ka2l.schemas.NEXT_TOKEN`), shape (N, 3); None for a
            probe of states alone.

    Returns:
        A probe whose ``metrics`` hold, on the test split: ``layer``, ``auroc``, ``auroc_ci``, ``accuracy``, ``f1``
        (both at a probability of 0.5), ``base_rate`` (share of unknown), ``num_test``, ``calibration`` (``ece``,
        ``brier``, ``bins``); and ``by_layer``, AUROC, accuracy and F1 of the states alone, layer by layer.

    Raises:
        PoolError: no train rows.
        ValueError: shapes disagree, or a state is not finite.
    """
    import numpy as np

    unknown, split = np.asarray(unknown, dtype=bool), np.asarray(probe_split)
    rows = _rows(states, unknown, split, layers)
    mean, scale = standardisation(states, rows.train)
    is_constant = bool(unknown[rows.train].all() or not unknown[rows.train].any())
    weights = np.ones(len(unknown)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    wanted = unknown if targets is None else np.where(np.isnan(targets), unknown, targets)
    data = to_device(states, mean, scale, wanted, weights, config)
    fitted, scores = train_layers(data, rows, list(layers), config, seed, untrained=is_constant)
    at = rows.validation
    if is_constant:
        calibrations = [constant_calibration(unknown[split != "test"])] * len(layers)
    else:
        calibrations = [fit_calibration(config.calibration, layer[at], unknown[at]) for layer in scores]
    by_layer = [
        {"layer": int(layer)} | _measure(scores[index], calibrations[index], unknown, weights, rows, config, seed)
        for index, layer in enumerate(layers)
    ]
    best = _best(by_layer)
    chosen, joined, calibration = by_layer[best], scores[best], calibrations[best]
    stack = None
    if next_token is not None and not is_constant:
        stack = fit_stack(joined[at], next_token[at], wanted[at].astype(np.float64), weights[at])
        joined = stacked(stack, joined, next_token)
        calibration = fit_calibration(config.calibration, joined[at], unknown[at])
        chosen = {"layer": chosen["layer"]} | _measure(joined, calibration, unknown, weights, rows, config, seed)
    probabilities = _probabilities(calibration, joined[rows.test])
    metrics = _test_metrics(chosen, unknown[rows.test], probabilities) | {"by_layer": by_layer}
    arrays = {name: value[best] for name, value in fitted.items()} | {"mean": mean[best], "scale": scale[best]}
    arrays["components"] = _principal_components((states[rows.train, best] - mean[best]) / scale[best], seed)
    return Probe(config.kind, chosen["layer"], list(map(int, layers)), metrics, calibration, stack, _float32(arrays))


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import numpy as np

    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in arrays.items()}


def _rows(states: np.ndarray, unknown: np.ndarray, split: np.ndarray, layers: Sequence[int]) -> Rows:
    """Numbers of the rows of each split; raises ValueError and PoolError as `fit_probe` does."""
    import numpy as np

    if states.ndim != 3 or not len(states) == len(unknown) == len(split) or states.shape[1] != len(layers):
        raise ValueError(
            f"states {states.shape}, unknown {unknown.shape}, split {split.shape} and {len(layers)} layers disagree"
        )
    rows = Rows(*(np.flatnonzero(split == name) for name in ("train", "validation", "test")))
    if not len(rows.train):
        raise PoolError("no seed question is in the probe's train split", hint="Raise pool.num_seed.")
    held_out = unknown[rows.validation]
    if held_out.all() or not held_out.any():  # nothing to choose by: the train rows must help out
        rows = rows._replace(validation=np.concatenate([rows.validation, rows.train]))
    return rows


def _best(by_layer: Sequence[Mapping[str, Any]]) -> int:
    """Position of the layer with the highest validation AUROC, of equal ones that with the lowest validation loss."""
    rank = [(-(layer["validation_auroc"] or 0), layer["validation_loss"]) for layer in by_layer]
    return rank.index(min(rank))


def _test_metrics(chosen: Mapping[str, Any], unknown: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """What is reported of the chosen layer on the test split."""
    return {
        "layer": chosen["layer"],
        "auroc": chosen["test_auroc"],
        "auroc_ci": chosen["test_auroc_ci"],
        "accuracy": chosen["accuracy"],
        "f1": chosen["f1"],
        "base_rate": float(unknown.mean()) if len(unknown) else None,
        "num_test": len(unknown),
        "calibration": calibration_error(probabilities, unknown),
    }


def _measure(
    scores: np.ndarray,
    calibration: dict[str, Any],
    unknown: np.ndarray,
    weights: np.ndarray,
    rows: Rows,
    config: ProbeConfig,
    seed: int,
) -> dict[str, Any]:
    """Figures of one layer: those of the validation rows choose the layer, those of the test rows are reported."""
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    truth = unknown[rows.validation]
    losses = np.logaddexp(0.0, np.where(truth, -1, 1) * scores[rows.validation]) * weights[rows.validation]
    figures: dict[str, Any] = {
        "validation_auroc": auroc(truth, scores[rows.validation]),
        "validation_loss": losses.mean(),
        "test_auroc": None,
        "test_auroc_ci": [None, None],
        "accuracy": None,
        "f1": None,
    }
    if len(rows.test):
        truth = unknown[rows.test]
        probabilities = _probabilities(calibration, scores[rows.test])
        estimate = auroc_with_ci(truth, scores[rows.test], seed, config.num_bootstrap)
        figures["test_auroc"], figures["test_auroc_ci"] = estimate.value, [estimate.low, estimate.high]
        figures["accuracy"] = accuracy_score(truth, probabilities >= 0.5)
        figures["f1"] = f1_score(truth, probabilities >= 0.5, zero_division=0.0)
    safe: dict[str, Any] = json_safe(figures)
    return safe


def _probabilities(calibration: dict[str, Any], scores: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(calibrated_log_odds(calibration, scores))


def _principal_components(standardised: np.ndarray, seed: int) -> np.ndarray:
    """First two components of the (n, D) train states, (2, D); zeros where there are fewer."""
    import numpy as np
    from sklearn.decomposition import PCA

    num_components = min(2, *standardised.shape)
    fitted = PCA(num_components, svd_solver="randomized", random_state=seed).fit(standardised)
    components = np.zeros((2, standardised.shape[1]), dtype=np.float32)
    components[:num_components] = fitted.components_
    return components
