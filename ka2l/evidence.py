"""Evidence for "unknown" over model states, and what annotations add to it.

Tuning on answers makes a model sure of everything, so the probe of a later state alone ranks what is left little
better than chance. The base model saw the questions before any answer was trained on: its evidence must not be thrown
away. It can even be sharpened: every annotation says whether the base model was right about that question, which is
the very thing that the entropy label stands in for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Log-odds beyond this are artefacts of calibration on a small validation split, not knowledge.
_MAX_LOGIT = 6.0


def combine(base: np.ndarray, later: Sequence[np.ndarray]) -> np.ndarray:
    """Mean log-odds of unknown over model states: experts with equal weights.

    Args:
        base: calibrated log-odds under the base model, shape (num_questions,).
        later: the same under each later state.

    Returns:
        Shape (num_questions,).
    """
    return np.mean([np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT) for logits in (base, *later)], axis=0)
