"""Evidence for "unknown" over model states.

Tuning on answers makes a model sure of everything, so the probe of a later state alone ranks what is left little
better than chance. The first state saw the questions before any answer was trained on: its evidence must not be
thrown away, only added to.
"""

from __future__ import annotations

import numpy as np

#: Log-odds beyond this are calibration artefacts of a small validation split, not knowledge.
_MAX_LOGIT = 6.0


def accumulate(previous: np.ndarray | None, num_previous: int, logits: np.ndarray) -> np.ndarray:
    """Add one model state's evidence to the evidence so far.

    Args:
        previous: mean log-odds of unknown over the states so far, shape (num_questions,); None for the first state.
        num_previous: number of those states.
        logits: calibrated log-odds of unknown under the new state, shape (num_questions,).

    Returns:
        Mean log-odds over all states, shape (num_questions,): the product of experts with equal weights.
    """
    clipped = np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
    if previous is None:
        return clipped
    return (previous * num_previous + clipped) / (num_previous + 1)
