"""Trains one probe a layer, all layers at once as one batched matrix product."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ka2l.knowledge.probe import ProbeConfig

#: Weights trained side by side; more layers than fit are trained in turns. 500M float32 weights need about 10 GB.
MAX_PARAMETERS = 500_000_000
_EVALUATION_ROWS = 1024


class Rows(NamedTuple):
    """Row indices of each split."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Data(NamedTuple):
    """What training reads: ``states`` (N, L, D), ``mean`` and ``scale`` (L, D), ``weights`` and ``targets`` (N,), the
    latter in [0, 1]."""

    states: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    device: torch.device

    def batch(self, rows: torch.Tensor, layers: slice) -> torch.Tensor:
        """Standardised states, shape (num_layers, num_rows, D) float32."""
        x = self.states[rows.to(self.states.device)][:, layers].to(self.device).float()
        return ((x - self.mean[layers]) / self.scale[layers]).transpose(0, 1)


def standardisation(states: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of the train rows, each (L, D) float32. A constant dimension gets scale 1."""
    import numpy as np

    shape = states.shape[1:]
    mean, scale = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    for layer in range(shape[0]):
        bad = np.flatnonzero(~np.isfinite(states[:, layer]).all(axis=1))
        if len(bad):
            raise ValueError(f"states of rows {bad[:10].tolist()} are not finite at layer index {layer}")
        values = states[train, layer].astype(np.float64)
        mean[layer], deviation = values.mean(axis=0), values.std(axis=0)
        # Below this it is rounding noise, e.g. embeddings of one and the same last token.
        is_noise = deviation <= 1e-5 * np.abs(mean[layer]) + 1e-8
        scale[layer] = np.where(is_noise, 1.0, deviation)
    return mean, scale


def to_device(
    states: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    config: ProbeConfig,
) -> Data:
    """Everything training reads, on its device; states too large for it stay in main memory and go over in batches."""
    import numpy as np
    import torch

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if config.device == "auto" else config.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # arrays from Arrow are read-only; nothing here writes to them
        on_cpu = torch.from_numpy(np.ascontiguousarray(states))
    fits = device.type == "cuda" and 2 * states.nbytes < torch.cuda.mem_get_info(device)[0]
    return Data(
        on_cpu.to(device) if fits else on_cpu,
        torch.from_numpy(mean).to(device),
        torch.from_numpy(scale).to(device),
        torch.from_numpy(targets).float().to(device),
        torch.from_numpy(weights).float().to(device),
        device,
    )


def train_layers(
    data: Data, rows: Rows, layers: list[int], config: ProbeConfig, seed: int, untrained: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Best weights of every layer, name -> (L, ...), and their scores of all rows, (L, N)."""
    import numpy as np
    import torch

    num_rows, num_layers, width = data.states.shape
    hidden = config.swiglu_hidden if config.kind == "swiglu" else config.hidden
    shapes = weight_shapes(config.kind, width, hidden)
    num_parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    step = max(1, MAX_PARAMETERS // num_parameters)
    scores = np.empty((num_layers, num_rows), dtype=np.float64)
    kept: list[dict[str, np.ndarray]] = []
    for start in range(0, num_layers, step):
        group = slice(start, min(start + step, num_layers))
        weights = _initial_weights(shapes, layers[group], seed, data.device)
        if untrained:
            weights = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        else:
            weights = _train(data, rows, group, weights, config, seed)
        with torch.inference_mode():
            for part in row_slices(num_rows):
                x = data.batch(torch.arange(num_rows)[part], group)
                scores[group, part] = forward(config.kind, weights, x).cpu().numpy()
        kept.append({name: weight.cpu().numpy() for name, weight in weights.items()})
    return {name: np.concatenate([group[name] for group in kept]) for name in shapes}, scores


def _train(
    data: Data, rows: Rows, group: slice, weights: dict[str, torch.Tensor], config: ProbeConfig, seed: int
) -> dict[str, torch.Tensor]:
    """Train the layers of ``group`` with early stopping; returns a copy of each layer's best weights."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    train, validation = torch.from_numpy(rows.train), torch.from_numpy(rows.validation)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    best_loss = torch.full((len(parameters[0]),), torch.inf, device=data.device)
    best_epoch = torch.zeros_like(best_loss)
    for epoch in range(config.num_epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(config.batch_size):
            # The sum over layers leaves each layer with the gradient of its own loss.
            loss = _loss(data, batch, group, config, weights, generator).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            parts = [
                len(part) * _loss(data, part, group, config, weights) for part in validation.split(_EVALUATION_ROWS)
            ]
            loss = torch.stack(parts).sum(dim=0) / len(validation)
            active = epoch - best_epoch <= config.patience
            improved = active & (loss < best_loss)
            best_loss[improved], best_epoch[improved] = loss[improved], float(epoch)
            for name, weight in weights.items():
                best[name][improved] = weight[improved]
        if not active.any():
            break
    return best


def _loss(
    data: Data,
    rows: torch.Tensor,
    group: slice,
    config: ProbeConfig,
    weights: dict[str, torch.Tensor],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean weighted cross-entropy of each layer, (num_layers,); with dropout where a generator is given."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    dropout = config.dropout if generator is not None else 0.0
    rows = rows.to(data.device)
    logits = forward(config.kind, weights, data.batch(rows, group), dropout, generator)
    targets, row_weights = data.targets[rows].expand_as(logits), data.weights[rows]
    return binary_cross_entropy_with_logits(logits, targets, weight=row_weights, reduction="none").mean(dim=1)


def weight_shapes(kind: str, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Weights of one layer's probe, name -> (fan in, fan out)."""
    if kind == "linear":
        return {"output": (width, 1), "output_bias": (1, 1)}
    if kind == "mlp":
        return {"input": (width, hidden), "input_bias": (1, hidden), "output": (hidden, 1), "output_bias": (1, 1)}
    return {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "output": (width, 1),
        "output_bias": (1, 1),
    }


def _initial_weights(
    shapes: dict[str, tuple[int, int]], layers: Sequence[int], seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Uniform within 1 / sqrt(fan in); a layer's weights do not depend on which other layers are trained."""
    import torch

    stacked: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for layer in layers:
        generator = torch.Generator().manual_seed(seed * 1009 + layer)
        for name, shape in shapes.items():
            bound = 0.0 if name.endswith("_bias") else shape[0] ** -0.5
            stacked[name].append((2 * torch.rand(shape, generator=generator) - 1) * bound)
    return {name: torch.stack(weights).to(device) for name, weights in stacked.items()}


def forward(
    kind: str,
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Scores of (num_layers, num_rows, D) states, (num_layers, num_rows)."""
    import torch
    from torch.nn.functional import gelu, silu

    if kind == "mlp":
        x = gelu(torch.baddbmm(weights["input_bias"], x, weights["input"]))
    elif kind == "swiglu":
        x = torch.bmm(silu(torch.bmm(x, weights["gate"])) * torch.bmm(x, weights["up"]), weights["down"])
    if dropout:
        # One mask for all layers: what a layer learns must not depend on its neighbours.
        keep = torch.rand(x.shape[1:], generator=generator) >= dropout
        x = x * (keep.to(x.device) / (1 - dropout))
    return torch.baddbmm(weights["output_bias"], x, weights["output"]).squeeze(-1)


def row_slices(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + _EVALUATION_ROWS) for start in range(0, num_rows, _EVALUATION_ROWS))
