"""The second axis of knowledge: the probability that the model is wrong, however sure it is.

A label made of entropy cannot see what a model has learnt wrongly: it says the same wrong thing every time. Only
annotation shows it. Each annotated question tells whether the base model's own answer was right, and a head on the
base model's hidden states learns from those that were answered confidently what else is probably wrong: one subject,
one kind of question, one bad source. Of the questions answered without confidence the probe knows already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ka2l.knowledge.probe_training import standardisation

if TYPE_CHECKING:
    import numpy as np

#: The two axes crossed. Certain and right, uncertain and wrong, certain and wrong, uncertain and right.
QUADRANTS = ("known", "unknown", "confidently_wrong", "lucky")

#: Inverse strength of the L2 penalty, on standardised states divided by the square root of their width.
_INVERSE_PENALTY = 1.0
_MAX_FOLDS = 5
#: Mistakes among the confident answers, and right ones, from which on there is a classifier. Two of a kind are little,
#: but confident mistakes are rare, and what it says of them leads exploration to more.
_MIN_OF_EACH = 2


@dataclass(frozen=True)
class CorrectnessHead:
    """P(the base model's answer is wrong) = P(uncertain) P(wrong | uncertain) + P(certain) P(wrong | certain, state).

    Attributes:
        wrong_if_uncertain: share of wrong answers among annotated questions that were answered uncertainly; 1 before
            there are any.
        wrong_if_certain: the same for confident answers, 0 before there are any: stands in for the classifier.
        mean: of the states it was fitted on, shape (D,).
        scale: their standard deviation times the square root of D, shape (D,).
        classifier: P(wrong | certain, state), calibrated; None where too few confident answers have been annotated.
    """

    wrong_if_uncertain: float
    wrong_if_certain: float
    mean: np.ndarray
    scale: np.ndarray
    classifier: Any | None

    def predict(self, states: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        """Probability that the base model answers wrongly, shape (N,).

        Args:
            states: of the base model, shape (N, D).
            evidence: log-odds of unknown under the base model, shape (N,).
        """
        from scipy.special import expit

        uncertain = expit(evidence)
        if self.classifier is None or not len(states):
            return uncertain * self.wrong_if_uncertain + (1 - uncertain) * self.wrong_if_certain
        wrong = self.classifier.predict_proba((states - self.mean) / self.scale)[:, 1]
        return uncertain * self.wrong_if_uncertain + (1 - uncertain) * wrong


def fit_correctness(states: np.ndarray, evidence: np.ndarray, wrong: np.ndarray, seed: int) -> CorrectnessHead:
    """Fit a head on the annotated questions.

    For the classifier count only those that were answered with certainty, each by how far P(unknown) is below one
    half: however little the many uncertain ones counted, together they would drown the few confident mistakes. It is a
    logistic regression with Platt's calibration on out-of-fold scores; fewer than two confident answers that are
    right, or two that are wrong, are too few for one.

    Args:
        states: of the base model, shape (n, D).
        evidence: log-odds of unknown under the base model, shape (n,).
        wrong: whether the base model's own answer was wrong, shape (n,).
        seed: of the folds.

    Raises:
        ValueError: shapes disagree, there is nothing to fit on, or a state is not finite.
    """
    import numpy as np
    from scipy.special import expit
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    wrong = np.asarray(wrong, dtype=bool)
    if not len(states) == len(evidence) == len(wrong) or not len(wrong):
        raise ValueError(f"states {states.shape}, evidence {evidence.shape} and wrong {wrong.shape} disagree")
    p_unknown = expit(evidence)
    certain, uncertain = np.clip(1 - 2 * p_unknown, 0, None), np.clip(2 * p_unknown - 1, 0, None)
    (mean,), (deviation,) = standardisation(states[:, None], np.arange(len(states)))
    scale = deviation * np.sqrt(states.shape[1])
    sure = certain > 0
    classifier = None
    fewest = int(min((wrong & sure).sum(), (~wrong & sure).sum()))
    if fewest >= _MIN_OF_EACH:
        folds = StratifiedKFold(min(_MAX_FOLDS, fewest), shuffle=True, random_state=seed)
        classifier = CalibratedClassifierCV(
            LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000),
            cv=folds,
            ensemble=False,
        )
        classifier.fit(((states - mean) / scale)[sure], wrong[sure], sample_weight=certain[sure])
    return CorrectnessHead(
        wrong_if_uncertain=float((uncertain @ wrong + 1) / (uncertain.sum() + 1)),
        wrong_if_certain=float((certain @ wrong) / (certain.sum() + 1)),
        mean=mean,
        scale=scale,
        classifier=classifier,
    )


def quadrants(evidence: np.ndarray, p_wrong: np.ndarray) -> list[str]:
    """One of ``QUADRANTS`` for each question: uncertain where unknown is at least as likely as known, wrong where
    ``p_wrong`` is at least one half."""
    names = {(False, False): "known", (True, True): "unknown", (False, True): "confidently_wrong"}
    return [names.get((e >= 0, p >= 0.5), "lucky") for e, p in zip(evidence.tolist(), p_wrong.tolist(), strict=True)]
