"""The Muon optimiser, for matrices that are trained from scratch, in the dtype that the machine multiplies fast."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

#: Coefficients of the quintic Newton-Schulz iteration (Jordan 2024, https://kellerjordan.github.io/posts/muon).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, as ``torch.optim.Muon`` does it, with the dtype of that step to choose.

    ``torch.optim.Muon`` orthogonalises in bfloat16 whatever the machine. A CPU without AVX-512 multiplies bfloat16 a
    hundred times slower than float32, so there this step took more time than the model itself.

    Args:
        params: matrices.
        lr: learning rate, scaled by sqrt(max(1, rows / columns)).
        weight_decay: share of ``lr`` by which weights shrink a step.
        momentum: of the gradients' running mean (Nesterov).
        dtype: of the orthogonalisation; see `ka2l.tuning.trainer.cpu_has_bfloat16`.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in (matrix for matrix in group["params"] if matrix.grad is not None):
                mean = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - momentum)
                update = orthogonalised(matrix.grad.lerp(mean, momentum), self.dtype)
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(update, alpha=-lr * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def orthogonalised(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix with all singular values near one, by a few Newton-Schulz iterations in ``dtype``."""
    flipped = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if flipped else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.T if flipped else x).to(matrix.dtype)
