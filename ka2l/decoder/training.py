"""Trains a decoder on (state, question) pairs and measures how well it reads questions back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ka2l.decoder.config import SMALL, DecoderConfig
from ka2l.decoder.gates import add_noise
from ka2l.decoder.inverter import Decoder, Inverter, new_inverter, question_token_ids
from ka2l.errors import EngineError, PoolError
from ka2l.evaluation.statistics import exact_match, token_f1
from ka2l.model.muon import Muon
from ka2l.tuning.trainer import cpu_has_bfloat16

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS = "decoder.safetensors"

#: Noise that is tried, in units of the layer's spread.
_NOISES = tuple(0.2 * 2 ** (step / 2) for step in range(10))
#: Share of noised states that may still give back their own question.
_UNMOVED = 0.1
_NUM_NOISED = 200


def train_decoder(
    model_path: str,
    states: np.ndarray,
    questions: Sequence[str],
    config: DecoderConfig,
    output_dir: str,
    seed: int,
    *,
    previous: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a decoder and write it to ``output_dir``.

    Args:
        model_path: the model under study.
        states: shape (N, D).
        questions: N of them; those longer than ``config.max_tokens`` are left out.
        previous: folder of a decoder to go on from, for ``config.refit_epochs``.
        progress: called now and then with {step, num_steps, loss (nats a token)}.

    Returns:
        Counts, losses and seconds.

    Raises:
        PoolError: no question is short enough.
        ModelError: a model cannot be loaded.
        EngineError: the loss is not a finite number.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    inverter, tokenizer = new_inverter(config, model_path, states.shape[1], trust_remote_code=trust_remote_code)
    if previous is not None:
        _load_weights(inverter, previous)
    inverter.set_spread(states)
    label_ids = [question_token_ids(tokenizer, question) for question in questions]
    short = [row for row, ids in enumerate(label_ids) if len(ids) <= config.max_tokens]
    if not short:
        raise PoolError(
            f"no question to train the decoder on has at most {config.max_tokens} tokens",
            hint="Raise decoder.max_tokens.",
        )
    epochs = config.num_epochs if previous is None else config.refit_epochs
    began = time.monotonic()
    losses = _fit(inverter, states, label_ids, _batches(short, config.batch_size, epochs, seed), config, progress)
    training_seconds = time.monotonic() - began
    _save_weights(inverter, output_dir)
    return {
        "num_pairs": len(short),
        "num_over_long": len(states) - len(short),
        "num_steps": len(losses),
        "first_loss": losses[0],
        "last_loss": sum(losses[-50:]) / len(losses[-50:]),
        "num_parameters": sum(p.numel() for p in inverter.parameters() if p.requires_grad),
        "num_tokens": round(epochs * sum(len(label_ids[row]) for row in short)),
        "refitted": previous is not None,
        "seconds": time.monotonic() - started,
        "training_seconds": training_seconds,
    }


def _batches(rows: Sequence[int], batch_size: int, num_epochs: float, seed: int) -> list[list[int]]:
    """The rows of every step: pass after pass, each in a new order, all batches full where there are rows enough."""
    rng = random.Random(seed)
    size = min(batch_size, len(rows))
    num_rows = math.ceil(num_epochs * len(rows) / size) * size
    order: list[int] = []
    while len(order) < num_rows:
        order += rng.sample(list(rows), len(rows))
    return [order[start : start + size] for start in range(0, num_rows, size)]


def _fit(
    inverter: Inverter,
    states: np.ndarray,
    label_ids: Sequence[list[int]],
    batches: Sequence[list[int]],
    config: DecoderConfig,
    progress: Callable[[dict[str, Any]], None] | None,
) -> list[float]:
    """Losses of all steps, nats a token."""
    from torch.optim.lr_scheduler import OneCycleLR

    use_gpu = config.gpus_per_worker > 0 and torch.cuda.is_available()
    device = "cuda" if use_gpu else "cpu"
    half = use_gpu or cpu_has_bfloat16()
    inverter.to(device).train()
    optimizers = _optimizers(inverter, config, torch.bfloat16 if half else torch.float32)
    schedules = [
        OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], len(batches) + 1, pct_start=0.1, cycle_momentum=False)
        for optimizer in optimizers
    ]
    losses: list[float] = []
    every = max(1, min(50, len(batches) // 10))
    for step, rows in enumerate(batches, start=1):
        labels = _padded([label_ids[row] for row in rows]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = inverter(torch.from_numpy(states[rows]).to(device), labels)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise EngineError(
                f"Training the decoder diverged at step {step} of {len(batches)}: the loss is {losses[-1]}.",
                hint="Lower decoder.learning_rate and decoder.matrix_learning_rate.",
            )
        if progress is not None and (step % every == 0 or step == len(batches)):
            recent = losses[-every:]
            progress({"step": step, "num_steps": len(batches), "loss": sum(recent) / len(recent)})
    return losses


def _optimizers(inverter: Inverter, config: DecoderConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that start from nothing, AdamW for the rest.

    With AdamW alone, at 0.001 and 0.002 for the matrices, the small decoder read 0.27 and 0.23 of unseen questions
    word for word after 800 steps, with Muon 0.69 (Jordan 2024, https://kellerjordan.github.io/posts/muon).
    """
    from_scratch = inverter if config.kind == "inversion" and config.model == SMALL else inverter.project
    embeddings = {id(p) for m in inverter.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices = [p for p in from_scratch.parameters() if p.ndim == 2 and p.requires_grad and id(p) not in embeddings]
    in_matrices = {id(p) for p in matrices}
    others = [p for p in inverter.parameters() if p.requires_grad and id(p) not in in_matrices]
    return [
        Muon(matrices, lr=config.matrix_learning_rate, dtype=dtype),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0),
    ]


def load_decoder(
    folder: str, model_path: str, width: int, config: DecoderConfig, *, trust_remote_code: bool = False
) -> Decoder:
    """What `train_decoder` wrote, on a GPU where there is one.

    Args:
        width: of the states, D.
    """
    inverter, tokenizer = new_inverter(config, model_path, width, trust_remote_code=trust_remote_code)
    _load_weights(inverter, folder)
    inverter.to("cuda" if torch.cuda.is_available() and config.gpus_per_worker > 0 else "cpu")
    return Decoder(inverter, tokenizer, config)


def fidelity(decoded: Sequence[str], questions: Sequence[str]) -> dict[str, float]:
    """How well questions are read back from their own states.

    Returns:
        ``exact_match`` and ``token_f1`` of normalised text, means over the questions, and corpus ``bleu`` (sacrebleu,
        Post 2018, 0 to 100).
    """
    import sacrebleu

    pairs = list(zip(decoded, questions, strict=True))
    return {
        "num_held_out": float(len(pairs)),
        "exact_match": sum(exact_match(text, [question]) for text, question in pairs) / len(pairs),
        "token_f1": sum(token_f1(text, [question]) for text, question in pairs) / len(pairs),
        "bleu": sacrebleu.corpus_bleu(list(decoded), [list(questions)]).score,
    }


def calibrate_noise(decoder: Decoder, states: np.ndarray, decoded: Sequence[str], seed: int) -> float:
    """The least noise that turns nine of ten questions into other ones, in units of the layer's spread.

    How much that is differs by layer, model and round. With less the decoder mostly gives back the question itself;
    with more its questions have less to do with it.

    Args:
        states: that the decoder was not trained on, shape (N, D).
        decoded: what it reads in them as they are.

    Returns:
        Between 0.2 and 4.5; the most where even that does not do it.
    """
    import numpy as np

    states, own = states[:_NUM_NOISED], decoded[:_NUM_NOISED]
    spread = decoder.inverter.spread.cpu().numpy()
    rng = np.random.default_rng(seed)
    for noise in _NOISES:
        others = decoder.decode(add_noise(states, noise, spread, rng), seed)
        if sum(text == other for text, other in zip(own, others, strict=True)) <= _UNMOVED * len(own):
            break
    return noise


def _padded(label_ids: Sequence[list[int]]) -> torch.Tensor:
    """(B, longest), -100 behind the end token."""
    labels = torch.full((len(label_ids), max(map(len, label_ids))), -100)
    for index, ids in enumerate(label_ids):
        labels[index, : len(ids)] = torch.tensor(ids)
    return labels


def _kept_names(inverter: Inverter) -> set[str]:
    """What training changed, and the buffers: the frozen weights of a large model are not saved again."""
    trained = {name for name, parameter in inverter.named_parameters() if parameter.requires_grad}
    return trained | {"mean", "spread"}


def _save_weights(inverter: Inverter, folder: str) -> None:
    from safetensors.torch import save_file

    names = _kept_names(inverter)
    # named_parameters lists a tied weight once, so no tensor is saved twice.
    tensors = {k: v.detach().cpu().contiguous() for k, v in inverter.state_dict().items() if k in names}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(folder) / _WEIGHTS))


def _load_weights(inverter: Inverter, folder: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(str(Path(folder) / _WEIGHTS))
    if set(tensors) != _kept_names(inverter):
        raise EngineError(
            f"{folder} holds a decoder of another model or kind", hint="Fit it again: --redo-from decoder."
        )
    inverter.load_state_dict(tensors, strict=False)
