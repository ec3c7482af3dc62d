"""A decoder reads from a state what the question was: trained for real, on questions of a few words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from ka2l.decoder.config import DecoderConfig
from ka2l.errors import ModelError, PoolError

if TYPE_CHECKING:
    from ka2l.decoder.inverter import Decoder

NAMES = ["paris", "rome", "oslo", "cairo", "lima", "tokyo", "delhi", "quito"]
VERBS = ["where is", "who built", "how old is", "who left"]
WIDTH = 24


def pairs() -> tuple[np.ndarray, list[str]]:
    """Questions and states that hold their parts: one direction a name, one a verb, and a little noise."""
    directions = np.random.default_rng(0).normal(size=(len(NAMES) + len(VERBS), WIDTH))
    states, questions = [], []
    rng = np.random.default_rng(1)
    for (v, verb), (n, name) in itertools.product(enumerate(VERBS), enumerate(NAMES)):
        for _ in range(8):
            states.append(directions[n] + directions[len(NAMES) + v] + rng.normal(scale=0.05, size=WIDTH))
            questions.append(f"{verb} {name}?")
    return np.array(states, dtype=np.float32), questions


def settings(kind: str = "inversion", **values: Any) -> DecoderConfig:
    defaults = {"num_epochs": 8.0, "batch_size": 32, "learning_rate": 0.01, "num_soft_tokens": 4, "max_tokens": 16}
    return DecoderConfig(kind=kind, **{**defaults, **values})


def held_out(rows: Sequence[Any]) -> list[Any]:
    """Every fourth row."""
    return list(rows)[::4]


def trained_on(rows: Sequence[Any]) -> list[Any]:
    return [row for index, row in enumerate(rows) if index % 4]


class Trained(NamedTuple):
    """A decoder that was trained on three quarters of the pairs."""

    decoder: Decoder
    folder: str
    metrics: dict[str, Any]
    reports: list[dict[str, Any]]
    """Its progress."""


@pytest.fixture(scope="module")
def trained(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Kind -> a decoder; each is trained once."""
    from ka2l.decoder.training import load_decoder, train_decoder

    made: dict[str, Trained] = {}
    model = str(tiny_models("llama-2"))

    def train(kind: str) -> Trained:
        if kind not in made:
            states, questions = pairs()
            folder = str(tmp_path_factory.mktemp(kind))
            config = settings(kind, num_epochs=8.0 if kind == "inversion" else 16.0)
            reports: list[dict[str, Any]] = []
            metrics = train_decoder(
                model, np.array(trained_on(states)), trained_on(questions), config, folder, 0, progress=reports.append
            )
            made[kind] = Trained(load_decoder(folder, model, WIDTH, config), folder, metrics, reports)
        return made[kind]

    return train


@pytest.mark.parametrize("kind", ["inversion", "self_inversion"])
def test_a_decoder_reads_questions_from_states_it_never_saw(kind: str, trained: Callable[[str], Trained]) -> None:
    from ka2l.decoder.training import fidelity

    decoder, _, metrics, reports = trained(kind)
    states, questions = pairs()
    measured = fidelity(decoder.decode(np.array(held_out(states)), 0), held_out(questions))

    assert metrics["last_loss"] < 0.5 * metrics["first_loss"]
    assert reports[-1]["step"] == reports[-1]["num_steps"] == metrics["num_steps"]
    # What is right by chance: one question of 32.
    assert measured["exact_match"] > 0.5
    assert measured["token_f1"] >= measured["exact_match"]


def test_noise_is_the_least_that_makes_most_questions_other_ones(trained: Callable[[str], Trained]) -> None:
    from ka2l.decoder.training import calibrate_noise

    decoder = trained("inversion").decoder
    states = np.array(held_out(pairs()[0]))
    own = decoder.decode(states, 0)
    noise = calibrate_noise(decoder, states, own, 0)
    spread = states.std(axis=0)

    def share_unmoved(size: float) -> float:
        moved = states + size * spread * np.random.default_rng(7).standard_normal(states.shape)
        return float(np.mean(np.array(decoder.decode(moved.astype(np.float32), 0)) == np.array(own)))

    assert share_unmoved(noise) < 0.15
    assert share_unmoved(noise / 2) > 0.15
    assert calibrate_noise(decoder, states, own, 0) == noise


def test_going_on_from_a_decoder_starts_where_it_ended(
    trained: Callable[[str], Trained], tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    from ka2l.decoder.training import train_decoder

    first = trained("inversion")
    states, questions = pairs()
    config = settings(refit_epochs=1)
    again = train_decoder(
        str(tiny_models("llama-2")), states, questions, config, str(tmp_path), 0, previous=first.folder
    )
    assert again["refitted"]
    assert again["first_loss"] < 0.7 * first.metrics["first_loss"]
    assert again["num_steps"] == len(questions) / config.batch_size


def test_the_same_training_gives_the_same_decoder(
    trained: Callable[[str], Trained], tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    from ka2l.decoder.training import load_decoder, train_decoder

    first = trained("inversion").decoder
    model = str(tiny_models("llama-2"))
    states, questions = pairs()
    train_decoder(model, np.array(trained_on(states)), trained_on(questions), first.config, str(tmp_path), 0)
    again = load_decoder(str(tmp_path), model, WIDTH, first.config)
    decoded = again.decode(states[:20], 1, temperature=1.0)
    assert any(decoded)
    assert decoded == first.decode(states[:20], 1, temperature=1.0)


def test_questions_that_are_all_too_long_are_an_error(tiny_models: Callable[..., Path], tmp_path: Path) -> None:
    from ka2l.decoder.training import train_decoder

    states, questions = pairs()
    with pytest.raises(PoolError, match="at most 4 tokens"):
        train_decoder(
            str(tiny_models("llama-2")), states, ["a " * 40 + q for q in questions], settings(max_tokens=4),
            str(tmp_path), 0,
        )  # fmt: skip


def test_a_model_that_is_no_encoder_decoder_is_refused(tiny_models: Callable[..., Path], tmp_path: Path) -> None:
    from ka2l.decoder.training import train_decoder

    model = str(tiny_models("llama-2"))
    states, questions = pairs()
    with pytest.raises(ModelError, match="as an encoder-decoder"):
        train_decoder(model, states, questions, settings(model=model), str(tmp_path), 0)


def test_fidelity_of_a_perfect_and_of_an_empty_decoding() -> None:
    from ka2l.decoder.training import fidelity

    asked = ["where is the old town of paris?", "who built the tower of london?"]
    perfect = fidelity(asked, asked)
    assert (perfect["exact_match"], perfect["token_f1"]) == (1.0, 1.0)
    assert perfect["bleu"] == pytest.approx(100.0)
    assert fidelity(["", ""], asked)["token_f1"] == 0.0
