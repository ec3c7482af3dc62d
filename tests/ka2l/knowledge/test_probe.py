"""The probe on states with a planted direction."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from ka2l.errors import PoolError
from ka2l.knowledge import probe_training
from ka2l.knowledge.calibration import calibrated_log_odds, calibration_error, fit_calibration
from ka2l.knowledge.probe import Probe, ProbeConfig, fit_probe, load_probe

KINDS = ("linear", "mlp", "swiglu")
LAYERS = [0, 4, 8, 12]
PLANTED = 2  # index of layer 8
SPLIT = np.array(["train"] * 200 + ["validation"] * 60 + ["test"] * 100)


def planted(seed: int = 0, strength: float = 2.0, num_rows: int = len(SPLIT)) -> tuple[np.ndarray, np.ndarray]:
    """States (N, 4, 24) of very unlike scales, in which one direction of layer 8 tells unknown (N,) from known."""
    rng = np.random.default_rng(seed)
    unknown = rng.random(num_rows) < 0.4
    states = rng.normal(size=(num_rows, len(LAYERS), 24))
    direction = np.random.default_rng(99).normal(size=24)
    states[:, PLANTED] += strength * np.where(unknown, 1, -1)[:, None] * direction / np.linalg.norm(direction)
    states = states * np.logspace(-2, 3, 24) + 50.0
    return states.astype(np.float32), unknown


def fit(
    states: np.ndarray,
    unknown: np.ndarray,
    split: np.ndarray = SPLIT,
    seed: int = 0,
    targets: np.ndarray | None = None,
    next_token: np.ndarray | None = None,
    **config: Any,
) -> Probe:
    quick = {"learning_rate": 5e-3, "num_epochs": 20, "num_bootstrap": 50, "swiglu_hidden": 32}
    config = {"device": "cpu"} | quick | config
    layers, made = LAYERS[: states.shape[1]], ProbeConfig(**config)
    return fit_probe(states, unknown, split.tolist(), layers, made, seed, targets=targets, next_token=next_token)


@functools.cache
def fitted(kind: str = "mlp", calibration: str = "platt", strength: float = 2.0) -> Probe:
    """A probe on ``planted`` states as they are, fitted once for all tests that look at it."""
    return fit(*planted(strength=strength), kind=kind, calibration=calibration)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_planted_direction_at_the_planted_layer(kind: str) -> None:
    probe = fitted(kind)
    assert probe.layer == 8
    assert probe.metrics["auroc"] > 0.95
    assert probe.metrics["accuracy"] > 0.88
    assert probe.metrics["f1"] > 0.85
    low, high = probe.metrics["auroc_ci"]
    assert low <= probe.metrics["auroc"] <= high
    assert [entry["layer"] for entry in probe.metrics["by_layer"]] == LAYERS
    others = [entry["test_auroc"] for entry in probe.metrics["by_layer"] if entry["layer"] != 8]
    assert max(others) < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_its_own_predictions_on_the_test_rows(kind: str) -> None:
    states, unknown = planted()
    probe = fitted(kind)
    test = SPLIT == "test"
    p_unknown = probe.predict(states[test])
    assert probe.metrics["auroc"] == pytest.approx(roc_auc_score(unknown[test], p_unknown))
    assert probe.metrics["accuracy"] == pytest.approx(np.mean((p_unknown >= 0.5) == unknown[test]))
    assert probe.metrics["base_rate"] == pytest.approx(unknown[test].mean())
    assert probe.metrics["num_test"] == 100


@pytest.mark.parametrize("calibration", ["platt", "isotonic"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_test_rows_change_no_weight_layer_or_calibration(kind: str, calibration: str) -> None:
    states, unknown = planted()
    probe = fitted(kind, calibration)
    test = SPLIT == "test"
    other_states, other_labels = states.copy(), unknown.copy()
    other_states[test] = np.random.default_rng(5).normal(size=other_states[test].shape) * 1e4
    other_labels[test] = ~other_labels[test]
    other = fit(other_states, other_labels, kind=kind, calibration=calibration)
    assert other.layer == probe.layer
    assert other.calibration == probe.calibration
    assert other.arrays.keys() == probe.arrays.keys()
    for name, array in probe.arrays.items():
        np.testing.assert_array_equal(other.arrays[name], array)
    assert other.metrics["auroc"] != probe.metrics["auroc"]


def test_the_layer_is_chosen_on_validation_rows_even_if_test_rows_disagree() -> None:
    states, unknown = planted()
    test = SPLIT == "test"
    states[test, 0] = states[test, PLANTED]
    states[test, PLANTED] = np.random.default_rng(1).normal(size=states[test, PLANTED].shape)
    assert fit(states, unknown).layer == 8


def test_the_same_seed_gives_the_same_probe_and_another_seed_another() -> None:
    states, unknown = planted()
    first, second, other = fitted(), fit(states, unknown), fit(states, unknown, seed=1)
    np.testing.assert_array_equal(first.predict(states), second.predict(states))
    assert first.metrics == second.metrics
    assert np.abs(first.predict(states) - other.predict(states)).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_learns_the_same_alone_as_among_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states, unknown = planted()
    together = fitted(kind)
    monkeypatch.setattr(probe_training, "MAX_PARAMETERS", 1)  # one layer at a time
    alone = fit(states, unknown, kind=kind)
    np.testing.assert_allclose(alone.predict(states), together.predict(states), atol=1e-4)
    for one, all_ in zip(alone.metrics["by_layer"], together.metrics["by_layer"], strict=True):
        assert one["validation_loss"] == pytest.approx(all_["validation_loss"], abs=1e-4)


def test_the_weights_kept_are_those_of_the_best_epoch() -> None:
    """With a learning rate that overfits, later epochs are worse: more epochs must change nothing any more."""
    states, unknown = planted(strength=1.0)
    losses, probes = [], []
    for num_epochs in (1, 2, 3, 4, 6, 8, 12, 40):
        probe = fit(states, unknown, num_epochs=num_epochs, patience=100, learning_rate=0.02, dropout=0.0)
        probes.append(probe)
        losses.append([entry["validation_loss"] for entry in probe.metrics["by_layer"]])
    assert (np.diff(np.array(losses), axis=0) <= 1e-6).all()
    np.testing.assert_array_equal(probes[-1].arrays["output"], probes[-2].arrays["output"])


def test_best_weights_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept weights reproduce the lowest validation loss seen, although training went on after it."""
    seen: list[np.ndarray] = []
    original = probe_training._loss

    def spy(*args: Any) -> Any:
        loss = original(*args)
        if len(args) == 5:  # without a generator: a validation pass
            seen.append(loss.detach().numpy().copy())
        return loss

    monkeypatch.setattr(probe_training, "_loss", spy)
    states, unknown = planted(strength=1.0)
    probe = fit(states, unknown, num_epochs=15, patience=100, learning_rate=0.02)
    lowest = np.array(seen).min(axis=0)
    assert (np.array(seen)[-1] > lowest + 1e-3).any()
    reproduced = [entry["validation_loss"] for entry in probe.metrics["by_layer"]]
    np.testing.assert_allclose(reproduced, lowest, rtol=1e-4)


def test_training_ends_early_where_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = probe_training._loss
    monkeypatch.setattr(probe_training, "_loss", lambda *args: calls.append(len(args)) or original(*args))
    rng = np.random.default_rng(0)
    fit(rng.normal(size=(360, 4, 24)).astype(np.float32), rng.random(360) < 0.5, num_epochs=500, patience=3)
    assert calls.count(5) < 100


def test_probabilities_match_frequencies() -> None:
    probe = fitted(strength=1.0)
    fresh_states, fresh_unknown = planted(seed=7, strength=1.0, num_rows=4000)
    p_unknown = probe.predict(fresh_states)
    assert calibration_error(p_unknown, fresh_unknown)["ece"] < 0.1
    assert p_unknown.mean() == pytest.approx(fresh_unknown.mean(), abs=0.06)
    assert 0 <= probe.metrics["calibration"]["ece"] <= 1
    assert sum(entry["count"] for entry in probe.metrics["calibration"]["bins"]) == 100


def test_log_odds_are_those_of_the_probabilities() -> None:
    states, _ = planted()
    probe = fitted()
    log_odds = probe.predict_logit(states)
    np.testing.assert_allclose(1 / (1 + np.exp(-log_odds)), probe.predict(states))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_probe_predicts_the_same(kind: str, tmp_path: Path) -> None:
    states, _ = planted()
    probe = fitted(kind)
    probe.save(str(tmp_path / "probe"))
    loaded = load_probe(str(tmp_path / "probe"))
    np.testing.assert_array_equal(loaded.predict(states), probe.predict(states))
    np.testing.assert_array_equal(loaded.pca(states), probe.pca(states))
    assert loaded.metrics == probe.metrics
    assert sorted(file.suffix for file in (tmp_path / "probe").iterdir()) == [".json", ".safetensors"]


def test_states_of_all_layers_or_of_the_chosen_one_predict_the_same() -> None:
    states, _ = planted()
    probe = fitted()
    np.testing.assert_array_equal(probe.predict(states), probe.predict(states[:, PLANTED]))
    with pytest.raises(ValueError, match="shape"):
        probe.predict(states[:, :3])
    assert probe.predict(states[:0]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [True, False])
def test_seed_questions_of_one_class_give_the_base_rate(value: bool, kind: str) -> None:
    states, _ = planted()
    probe = fit(states, np.full(len(states), value), kind=kind)
    p_unknown = probe.predict(states)
    assert np.ptp(p_unknown) == 0
    assert p_unknown[0] == pytest.approx(261 / 262 if value else 1 / 262)
    assert probe.metrics["auroc"] is None
    assert probe.metrics["auroc_ci"] == [None, None]
    json.dumps(probe.metrics, allow_nan=False)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_held_out_split_of_one_class_is_no_obstacle(part: str) -> None:
    states, unknown = planted()
    unknown[part == SPLIT] = True
    probe = fit(states, unknown)
    p_unknown = probe.predict(states)
    assert np.isfinite(p_unknown).all()
    assert (probe.metrics["auroc"] is None) == (part == "test")
    assert roc_auc_score(unknown[SPLIT == "train"], p_unknown[SPLIT == "train"]) > 0.9


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_missing_held_out_split_is_no_obstacle(missing: str) -> None:
    states, unknown = planted()
    kept = missing != SPLIT
    probe = fit(states[kept], unknown[kept], SPLIT[kept])
    assert probe.layer == 8
    json.dumps(probe.metrics, allow_nan=False)


def test_no_train_rows_is_a_pool_error() -> None:
    states, unknown = planted()
    with pytest.raises(PoolError, match="train"):
        fit(states[200:], unknown[200:], SPLIT[200:])


def test_dimensions_that_never_change_do_no_harm() -> None:
    states, unknown = planted()
    states[:, 0] = 3.0  # e.g. the embedding of a last token that is always the same
    states[:, PLANTED, :3] = -1e4
    probe = fit(states, unknown)
    assert probe.layer == 8
    assert np.isfinite(probe.predict(states)).all()
    assert probe.metrics["by_layer"][0]["test_auroc"] == pytest.approx(0.5)


def test_float16_states_are_enough() -> None:
    states, unknown = planted()
    assert fit(states.astype(np.float16), unknown).metrics["auroc"] > 0.9


def test_read_only_states_are_accepted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    states, unknown = planted()
    states.flags.writeable = False
    fit(states, unknown, num_epochs=1)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_states_that_are_not_finite_are_refused_by_row() -> None:
    states, unknown = planted()
    states[17, 1, 3] = np.nan
    with pytest.raises(ValueError, match="17"):
        fit(states, unknown)


def test_trained_for_how_far_answers_disagree_it_ranks_within_the_known_too() -> None:
    rng = np.random.default_rng(0)
    far = np.linspace(0.05, 0.95, len(SPLIT))[rng.permutation(len(SPLIT))]
    states = rng.normal(size=(len(SPLIT), 1, 8)).astype(np.float32)
    unknown = far > 0.5
    # The label shows in one direction; how far a question is from the threshold, in another.
    states[:, 0, 0] += 3 * np.where(unknown, 1, -1)
    states[:, 0, 1] += 6 * (far - 0.5)
    known_test_rows = (SPLIT == "test") & ~unknown

    def order(targets: np.ndarray | None) -> float:
        probe = fit(states, unknown, targets=targets, kind="linear", num_epochs=40)
        return float(np.corrcoef(probe.predict_logit(states)[known_test_rows], far[known_test_rows])[0, 1])

    assert order(far) > order(None) + 0.05


def certainty(unknown: np.ndarray, strength: float) -> np.ndarray:
    """Entropy, log-probability and margin of a first answer token, of which the entropy alone tells unknown."""
    rng = np.random.default_rng(5)
    return np.column_stack([rng.normal(size=len(unknown)) + strength * unknown, *rng.normal(size=(2, len(unknown)))])


@pytest.mark.parametrize("calibration", ["platt", "isotonic"])
def test_certainty_of_the_first_token_is_joined_with_what_the_states_say(calibration: str, tmp_path: Path) -> None:
    states, unknown = planted(strength=1.0)
    next_token, test = certainty(unknown, 2.0), SPLIT == "test"
    alone = fitted(calibration=calibration, strength=1.0)
    both = fit(states, unknown, next_token=next_token, calibration=calibration)
    of_entropy = roc_auc_score(unknown[test], next_token[test, 0])
    assert both.metrics["auroc"] > max(alone.metrics["auroc"], of_entropy) + 0.01
    assert both.layer == alone.layer == 8
    assert both.metrics["by_layer"] == alone.metrics["by_layer"]
    p_unknown = both.predict(states[test], next_token[test])
    assert both.metrics["accuracy"] == pytest.approx(np.mean((p_unknown >= 0.5) == unknown[test]))
    assert both.metrics["calibration"]["ece"] == pytest.approx(calibration_error(p_unknown, unknown[test])["ece"])
    both.save(str(tmp_path / "probe"))
    np.testing.assert_array_equal(
        load_probe(str(tmp_path / "probe")).predict(states[test], next_token[test]), p_unknown
    )


def test_certainty_that_says_nothing_hardly_harms() -> None:
    states, unknown = planted()
    joined = fit(states, unknown, next_token=certainty(unknown, 0.0))
    assert joined.metrics["auroc"] > fitted().metrics["auroc"] - 0.02


def test_a_probe_that_was_fitted_with_certainty_asks_for_it() -> None:
    states, unknown = planted()
    with pytest.raises(ValueError, match="next_token"):
        fit(states, unknown, next_token=certainty(unknown, 1.0), num_epochs=1).predict(states)


def test_rows_of_one_kind_leave_nothing_to_join() -> None:
    states, unknown = planted()
    p_unknown = fit(states, np.zeros_like(unknown), next_token=certainty(unknown, 1.0)).predict(states)
    assert np.unique(p_unknown).size == 1


def test_a_target_that_is_missing_is_the_rows_label() -> None:
    states, unknown = planted()
    of_labels = fitted().predict(states)
    missing = fit(states, unknown, targets=np.full(len(SPLIT), np.nan))
    assert (missing.predict(states) == of_labels).all()


def test_rows_of_weight_zero_are_as_good_as_absent() -> None:
    states, unknown = planted(strength=1.0)
    rng = np.random.default_rng(3)
    spoiled = (SPLIT == "train") & (rng.random(len(SPLIT)) < 0.5)
    labels = np.where(spoiled, ~unknown, unknown)
    config = ProbeConfig(device="cpu", num_bootstrap=50)
    weighted = fit_probe(states, labels, SPLIT.tolist(), LAYERS, config, 0, sample_weight=(~spoiled).astype(float))
    misled = fit_probe(states, labels, SPLIT.tolist(), LAYERS, config, 0)
    assert weighted.metrics["auroc"] > 0.75
    assert misled.metrics["by_layer"][PLANTED]["test_auroc"] < weighted.metrics["auroc"] - 0.1


def test_principal_components_are_those_of_the_train_rows() -> None:
    states, unknown = planted(strength=4.0)
    probe = fit(states, unknown)
    train = SPLIT == "train"
    chosen = states[:, PLANTED].astype(np.float64)
    scaled = (chosen - chosen[train].mean(axis=0)) / chosen[train].std(axis=0)
    expected = PCA(2).fit(scaled[train]).transform(scaled)
    points = probe.pca(states)
    assert points.shape == (len(states), 2)
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], expected[:, axis])[0, 1]) > 0.99
    assert roc_auc_score(unknown, points[:, 0] * np.sign(np.corrcoef(points[:, 0], unknown)[0, 1])) > 0.95


def test_the_probe_leaves_the_global_random_state_alone() -> None:
    states, unknown = planted()
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    fit(states, unknown, num_epochs=2)
    assert torch.equal(torch.rand(1), expected)


def test_platt_scaling_recovers_a_planted_line() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000) * 3
    labels = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * scores - 1)))
    fitted = fit_calibration("platt", scores, labels)
    assert fitted["slope"] == pytest.approx(0.5, abs=0.03)
    assert fitted["intercept"] == pytest.approx(-1, abs=0.08)


def test_calibration_stays_finite_and_keeps_the_order_whatever_the_rows_say() -> None:
    scores = np.array([-3.0, -1.0, 1.0, 3.0])
    separable, reversed_ = scores > 0, scores < 0
    for labels in (separable, reversed_, np.ones(4, dtype=bool)):
        log_odds = calibrated_log_odds(fit_calibration("platt", scores, labels), scores)
        assert np.isfinite(log_odds).all()
        assert (np.diff(log_odds) > 0).all()
    log_odds = calibrated_log_odds(fit_calibration("isotonic", scores, separable), scores)
    np.testing.assert_allclose(1 / (1 + np.exp(-log_odds)), [1 / 6, 1 / 6, 5 / 6, 5 / 6])
