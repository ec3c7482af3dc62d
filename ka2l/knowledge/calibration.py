"""Calibrates scores to probabilities: fitted on held-out rows, kept as plain JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from sklearn.linear_model import LogisticRegression

#: Stands in for a slope that the rows give no evidence for, so that the ranking is kept.
MIN_SLOPE = 1e-3
NUM_BINS = 10


def fit_calibration(kind: Literal["platt", "isotonic"], scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """A monotone map from scores to log-odds of a true label.

    Args:
        kind: ``platt`` is a line fitted to the smoothed targets of Platt 1999 (section 2.2), whose slope is never
            negative; ``isotonic`` a step function, kept one pseudo-count away from 0 and 1.
        scores: log-odds before calibration, shape (n,).
        labels: shape (n,); where all are the same nothing can be fitted and the scores stay as they are.

    Returns:
        The map, for ``calibrated_log_odds``.
    """
    import numpy as np

    labels = np.asarray(labels, dtype=bool)
    num_true, num_false = int(labels.sum()), int((~labels).sum())
    if not num_true or not num_false:
        return {"kind": "platt", "slope": 1.0, "intercept": 0.0}
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        bound = 1.0 / (len(labels) + 2)
        fitted = IsotonicRegression(y_min=bound, y_max=1 - bound, out_of_bounds="clip").fit(scores, labels)
        return {"kind": "isotonic", "x": fitted.X_thresholds_.tolist(), "y": fitted.y_thresholds_.tolist()}

    target = np.where(labels, (num_true + 1) / (num_true + 2), 1 / (num_false + 2))
    spread = float(np.std(scores)) or 1.0
    line = fit_soft(scores[:, None] / spread, target, np.ones(len(scores)), inverse_penalty=1e6)
    slope = float(line.coef_[0, 0]) / spread
    if slope < MIN_SLOPE:
        return constant_calibration(labels) | {"slope": MIN_SLOPE}
    return {"kind": "platt", "slope": slope, "intercept": float(line.intercept_[0])}


def fit_soft(
    inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, inverse_penalty: float = 1.0
) -> LogisticRegression:
    """A logistic regression on targets that are shares.

    Args:
        inputs: shape (n, k).
        targets: in [0, 1], shape (n,), not all 0 and not all 1.
        weights: of each row, shape (n,).
        inverse_penalty: of the L2 penalty on the slopes.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    # A soft target t is a row that is true with weight t and false with weight 1 - t.
    shares = np.concatenate([targets, 1 - targets]) * np.concatenate([weights, weights])
    given = shares > 0
    return LogisticRegression(C=inverse_penalty).fit(
        np.concatenate([inputs, inputs])[given], np.repeat([1, 0], len(targets))[given], sample_weight=shares[given]
    )


def constant_calibration(labels: np.ndarray) -> dict[str, Any]:
    """Every score becomes the log-odds of the share of true ``labels`` (n,), smoothed by one of each."""
    num_true = int(labels.sum())
    return {"kind": "platt", "slope": 0.0, "intercept": math.log((num_true + 1) / (len(labels) - num_true + 1))}


def calibrated_log_odds(calibration: dict[str, Any], scores: np.ndarray) -> np.ndarray:
    """Log-odds of a true label for ``scores`` (n,), shape (n,)."""
    import numpy as np
    from scipy.special import logit

    if calibration["kind"] == "platt":
        return np.asarray(calibration["slope"] * scores + calibration["intercept"])
    return np.asarray(logit(np.interp(scores, calibration["x"], calibration["y"])))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error over equal-width bins (Naeini et al. 2015) and Brier score; None without rows.

    ``bins`` is the reliability diagram: ``count``, mean ``predicted`` and share ``observed`` of each bin not empty.
    """
    import numpy as np

    if not len(labels):
        return {"ece": None, "brier": None, "bins": []}
    return binned(probabilities, labels, np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1))


def binned(probabilities: np.ndarray, labels: np.ndarray, index: np.ndarray) -> dict[str, Any]:
    """As `calibration_error`, over any bins.

    Args:
        probabilities, labels: shape (n,), at least one row.
        index: number of each row's bin, shape (n,).
    """
    import numpy as np

    bins: list[dict[str, Any]] = [
        {
            "count": int((index == number).sum()),
            "predicted": float(probabilities[index == number].mean()),
            "observed": float(labels[index == number].mean()),
        }
        for number in np.unique(index).tolist()
    ]
    ece = sum(entry["count"] * abs(entry["predicted"] - entry["observed"]) for entry in bins) / len(labels)
    return {"ece": float(ece), "brier": float(np.mean((probabilities - labels) ** 2)), "bins": bins}
