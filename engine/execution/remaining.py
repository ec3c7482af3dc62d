"""Estimates how much work a run has left, so that runs that share a cluster end together."""

from __future__ import annotations

from typing import NamedTuple

#: Seconds of one H100 for a model of 7 billion parameters, assumed: ten sampled answers to a question, one rehearsal
#: answer, one question's hidden states, one row of training. Runs are compared with each other, so ratios matter alone.
OBSERVE_S, REHEARSE_S, EXTRACT_S, TUNE_S = 0.20, 0.15, 0.006, 0.9


class RunSize(NamedTuple):
    """What a run's work grows with."""

    billions: float
    """Parameters of the model."""
    num_questions: int
    num_sampled: int
    """Seed and eval questions, and candidates where the strategy needs their samples: sampled in every round."""
    num_rehearsed: int
    """Candidates whose own answers are rehearsed: sampled in the first round."""
    budget: int
    """Annotations a round."""
    rounds: int


def work_left(size: RunSize, round_index: int) -> float:
    """Seconds of one GPU from the beginning of a round to the run's end."""
    seconds = 0.0
    for index in range(round_index, size.rounds + 1):
        seconds += OBSERVE_S * size.num_sampled + (REHEARSE_S * size.num_rehearsed if index == 0 else 0.0)
        if index < size.rounds:
            seconds += EXTRACT_S * size.num_questions
            seconds += TUNE_S * 2 * size.budget * (index + 1)  # as many rows are rehearsed as were annotated
    return seconds * size.billions / 7
