"""Joins the probe's score of the hidden states with the certainty of the first answer token.

Both come from the same forward pass (`ka2l.knowledge.hidden_states`). States say what kind of question it is and what
the model has met, the distribution of the first answer token how it would answer this one. A logistic regression on
held-out rows weighs them (stacked generalisation, Wolpert 1992): on the rows that the probe was trained on, its scores
would look better than they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ka2l.knowledge.calibration import fit_soft

if TYPE_CHECKING:
    import numpy as np


def fit_stack(scores: np.ndarray, next_token: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """How much scores and certainty count.

    Args:
        scores: the probe's, of rows that it was not trained on, shape (n,).
        next_token: `ka2l.schemas.NEXT_TOKEN` of each row, shape (n, 3), nats.
        targets: in [0, 1], shape (n,): how far a row is unknown. Not all 0 and not all 1.
        weights: of each row, shape (n,).

    Returns:
        The weights, JSON-safe, for `stacked`.
    """
    import numpy as np
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    inputs = scaler.fit_transform(np.column_stack([scores, next_token]).astype(np.float64))
    line = fit_soft(inputs, targets, weights)
    slopes = line.coef_[0] / scaler.scale_
    return {"slopes": slopes.tolist(), "intercept": float(line.intercept_[0] - slopes @ scaler.mean_)}


def stacked(stack: dict[str, Any], scores: np.ndarray, next_token: np.ndarray) -> np.ndarray:
    """Scores (n,) joined with certainty (n, 3), as `fit_stack` weighs them: log-odds before calibration, shape (n,)."""
    import numpy as np

    return np.column_stack([scores, next_token]) @ np.array(stack["slopes"]) + stack["intercept"]
