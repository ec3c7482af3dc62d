"""The procedure of KA2L's published code (arXiv 2603.17566, github.com/greenjerry/KA2L), in code of our own.

What it does, as it does it: ten passes of one sample, answers found again by prompt text, ``generate`` that keeps all
states of all steps to read one token, every pair of answers compared in both directions, a threshold by grid search
over all rows, one probe a layer after the other. What costs time there and has no part in the result is left out:
checkpoints by pickle after every pass, progress bars. So are its baselines and its grading by a language model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

#: What ends an answer there.
STOPS = (
    "\n\n\n\n", "\n\n\n", "\n\n", "\n", "Question:", "Context:", "Answer:",
    "问题：", "回答：", "上下文：", "问题:", "回答:", "上下文:",
)  # fmt: skip
GENERATE_BATCH = 32
CLUSTER_BATCH = 256
LOW_TEMPERATURE = 0.1


def sample_in_passes(
    engine: Any, ids: Sequence[str], prompts: Sequence[str], num_samples: int, parameters: Callable[[int, int], Any]
) -> dict[str, list[str]]:
    """One pass over all prompts a sample; the row of an answer is looked up by its prompt.

    Args:
        engine: a vLLM ``LLM``.
        ids: question ids, shape (n,).
        prompts: texts, shape (n,).
        num_samples: passes.
        parameters: sampling parameters of (row, pass).

    Returns:
        Answers by question id.
    """
    found: dict[str, list[str]] = {question_id: [] for question_id in ids}
    prompts = list(prompts)
    for index in range(num_samples):
        wanted = [parameters(row, index) for row in range(len(prompts))]
        for output in engine.generate(prompts, wanted, use_tqdm=False):
            row = prompts.index(output.prompt)
            made = output.outputs[0]
            _ = [chosen[token].logprob for token, chosen in zip(made.token_ids, made.logprobs, strict=True)]
            found[ids[row]].append(made.text.strip())
        gc.collect()
    return found


class _FirstRowStops:
    """Ends a batch where the first row holds a stop text."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        ended = any(stop in self.tokenizer.decode(input_ids[0][self.start :]) for stop in STOPS)
        return torch.full((len(input_ids),), ended, dtype=torch.bool)


def generate_with_states(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, *, greedy: bool
) -> tuple[list[str], np.ndarray]:
    """The low-temperature answers, and the last prompt token's states out of those of all tokens and steps.

    Args:
        model: a causal language model of transformers.
        tokenizer: pads on the left.
        prompts: texts, shape (n,).
        max_tokens: longest answer, tokens.
        greedy: temperature 0 in place of 0.1, to compare answers; not what is timed.

    Returns:
        Answers, and states of shape (n, num_layers + 1, width).
    """
    import numpy as np
    import torch
    from transformers import StoppingCriteriaList

    answers: list[str] = []
    states: list[np.ndarray] = []
    choice: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": LOW_TEMPERATURE}
    for start in range(0, len(prompts), GENERATE_BATCH):
        batch = list(prompts[start : start + GENERATE_BATCH])
        inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            made = model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                output_hidden_states=True,
                output_scores=True,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([_FirstRowStops(tokenizer, width)]),
                pad_token_id=tokenizer.pad_token_id,
                **choice,
            )
            scores = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        _ = [[score.item() for score in row] for row in scores]
        states.append(torch.stack([layer[:, -1] for layer in made.hidden_states[0]], dim=1).numpy().copy())
        texts = tokenizer.batch_decode(made.sequences[:, width:], skip_special_tokens=True)
        answers += [text.split("\n")[0].strip() for text in texts]
        del made
        gc.collect()
    return answers, np.concatenate(states)


def cluster_pairwise(
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    entails: Callable[[list[tuple[str, str, str]]], list[bool]],
) -> tuple[list[list[int]], int]:
    """Greedy clustering where an answer without a cluster meets all later ones, clustered or not, both ways.

    Args:
        questions: one text a question, shape (n,).
        answers: as many answers a question.
        entails: verdicts of (question, premise, hypothesis).

    Returns:
        Cluster of every answer, and the number of directed comparisons.
    """
    ids: list[list[int]] = []
    num_asked = 0
    for start in range(0, len(questions), CLUSTER_BATCH):
        rows = [(question, list(group)) for question, group in zip(
            questions[start : start + CLUSTER_BATCH], answers[start : start + CLUSTER_BATCH], strict=True
        )]  # fmt: skip
        found = [[-1] * len(group) for _, group in rows]
        for first in range(max((len(group) for _, group in rows), default=0)):
            open_rows = [row for row in range(len(rows)) if found[row][first] == -1]
            keys = [(row, other) for row in open_rows for other in range(first + 1, len(rows[row][1]))]
            asked = []
            for row, other in keys:
                question, group = rows[row]
                asked += [(question, group[first], group[other]), (question, group[other], group[first])]
            verdicts = entails(asked) if asked else []
            num_asked += len(asked)
            for row in open_rows:
                found[row][first] = max(found[row]) + 1
            for index, (row, other) in enumerate(keys):
                if verdicts[2 * index] and verdicts[2 * index + 1]:
                    found[row][other] = found[row][first]
        ids += found
    return ids, num_asked


def grid_threshold(entropies: np.ndarray) -> float:
    """The best of 100 evenly spaced thresholds by squared error, over all rows."""
    import numpy as np

    candidates = np.linspace(1e-10, entropies.max(), 100)
    errors = []
    for candidate in candidates:
        low, high = entropies[entropies < candidate], entropies[entropies >= candidate]
        errors.append(sum(((part - part.mean()) ** 2).sum() for part in (low, high) if len(part)))
    return float(candidates[int(np.argmin(errors))])


class ProbeRows(NamedTuple):
    """Row indices that a probe is fitted on and chosen by."""

    train: np.ndarray
    validation: np.ndarray


def random_rows(num_rows: int, seed: int) -> tuple[ProbeRows, np.ndarray]:
    """Its split: a tenth for the test, a fifth of the rest for validation; and the test rows."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(num_rows)
    num_test = -(-num_rows // 10)
    num_validation = -(-(num_rows - num_test) // 5)
    test, validation, train = np.split(order, [num_test, num_test + num_validation])
    return ProbeRows(train, validation), test


class SwiGLUSettings(NamedTuple):
    """Of the public probe; the defaults are those of the code."""

    hidden: int = 14336
    learning_rate: float = 1e-5
    num_epochs: int = 20
    batch_size: int = 32
    keep_best: bool = False
    """Keep the epoch of the lowest validation loss. The code means to, but keeps a reference to weights that go on
    changing, so that its best epoch is its last."""
    fused: bool = False
    """Adam's update in one pass over the weights: the same in less time. Not for what is timed."""


def train_swiglu(
    states: np.ndarray, unknown: np.ndarray, rows: ProbeRows, settings: SwiGLUSettings, seed: int
) -> torch.nn.Module:
    """One layer's probe, D -> hidden -> D -> 2, by Adam on raw states; the validation rows are only looked at.

    Args:
        states: one layer's, shape (N, D).
        unknown: labels, shape (N,).
        rows: what it is trained on.
        settings: of the probe.
        seed: of weights and order of rows.
    """
    import copy

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    model = _SwiGLU(states.shape[1], settings.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=settings.fused)
    x, y = torch.from_numpy(states).float(), torch.from_numpy(unknown).long()
    loaders = [
        DataLoader(TensorDataset(x[part], y[part]), batch_size=settings.batch_size, shuffle=part is rows.train)
        for part in rows
    ]
    best, best_loss = None, float("inf")
    for _ in range(settings.num_epochs):
        for inputs, labels in loaders[0]:
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            parts = [torch.nn.functional.cross_entropy(model(a), b).item() * len(b) for a, b in loaders[1]]
        if settings.keep_best and sum(parts) < best_loss:
            best, best_loss = copy.deepcopy(model.state_dict()), sum(parts)
    if best is not None:
        model.load_state_dict(best)
    return model


def _SwiGLU(width: int, hidden: int) -> torch.nn.Module:  # noqa: N802 (a class, made where torch is)
    from torch import nn

    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
            self.down, self.score = nn.Linear(hidden, width, bias=False), nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))

    return SwiGLU()


def swiglu_scores(model: torch.nn.Module, states: np.ndarray) -> np.ndarray:
    """Log-odds of unknown, shape (N,)."""
    import torch

    with torch.inference_mode():
        logits = model(torch.from_numpy(states).float())
        return (logits[:, 1] - logits[:, 0]).double().numpy()
