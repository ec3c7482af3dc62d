"""Sums the evidence for "unknown" over model states and over answers sampled for annotation and rehearsal.

Tuning on answers makes a model sure of everything, so the probe of a later state alone ranks what is left little
better than chance. The base model saw the questions before any answer was trained on: its evidence comes first. Two
things sharpen it. The answers that are sampled for rehearsal show its doubt about each candidate, which the probe only
predicts; and after the first round every annotation says whether the base model was right about that question, which is
the very thing that the entropy label stands in for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import logit

from ka2l.knowledge.semantic_entropy import disagreement_bounds

#: Log-odds beyond this are artefacts of calibration on a small validation split, not knowledge.
_MAX_LOGIT = 6.0
#: Of all later states together, beside 1 for the base model's probe: they have learnt to be sure.
_LATER_WEIGHT = 0.5
#: Of the base model's own answers: few of them, but they are what its probe predicts.
DOUBT_WEIGHT = 1.0


def filled(own_doubt: np.ndarray, base: np.ndarray, num_answers: int) -> np.ndarray:
    """Doubt of all questions where only some were sampled: of the others, what their probe's log-odds would show.

    The doubt of a few answers is bounded and the probe's log-odds are not, so that without this a question that was
    sampled would seldom be ahead of one that was not.

    Args:
        own_doubt: log-odds of disagreeing with itself, shape (num_questions,); NaN where not sampled.
        base: calibrated log-odds under the base model, shape (num_questions,).
        num_answers: drawn of each question that was sampled.

    Returns:
        Shape (num_questions,), without NaN.
    """
    least, most = logit(disagreement_bounds(num_answers))
    return np.where(np.isnan(own_doubt), np.clip(base, least, most), own_doubt)


def combine(base: np.ndarray, later: Sequence[np.ndarray] = (), own_doubt: np.ndarray | None = None) -> np.ndarray:
    """Weighted mean log-odds of unknown: 1 the base model's probe, 1 its own doubt, 1/2 the probes of later states.

    Args:
        base: calibrated log-odds under the base model, shape (num_questions,).
        later: the same under each later state.
        own_doubt: log-odds that the base model disagrees with itself (`ka2l.knowledge.semantic_entropy.disagreement`);
            NaN where it was not sampled.

    Returns:
        Shape (num_questions,).
    """
    experts, weights = [base], [1.0]
    if later:
        experts.append(np.mean([_clip(logits) for logits in later], axis=0))
        weights.append(_LATER_WEIGHT)
    if own_doubt is not None:
        experts.append(own_doubt)
        weights.append(DOUBT_WEIGHT)
    logits_en = np.stack([_clip(logits) for logits in experts])
    there_en = ~np.isnan(logits_en)
    weighted = np.where(there_en, logits_en, 0.0) * np.array(weights)[:, None]
    return weighted.sum(axis=0) / (there_en * np.array(weights)[:, None]).sum(axis=0)


def _clip(logits: np.ndarray) -> np.ndarray:
    return np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
