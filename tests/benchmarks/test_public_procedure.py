"""The public code's procedure, re-created: it must come to what ours comes to, or the comparison is of two things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from public_probe import chosen, compare, difference, ours, split_by_group
from public_procedure import ProbeRows, SwiGLUSettings, cluster_pairwise, grid_threshold, random_rows, train_swiglu

from ka2l.answers.clustering import cluster_answers
from ka2l.knowledge.labels import fit_threshold


class SameLength:
    """Answers of one length mean the same."""

    def equivalent(self, questions: list[str], left: list[str], right: list[str]) -> list[bool]:
        return [len(a) == len(b) for a, b in zip(left, right, strict=True)]


def entails(asked: list[tuple[str, str, str]]) -> list[bool]:
    return [len(a) == len(b) for _, a, b in asked]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "cc", "dd", "eee"]), min_size=4, max_size=4), max_size=6))
def test_pairwise_clusters_are_those_of_representatives_for_more_comparisons(answers: list[list[str]]) -> None:
    questions = ["?"] * len(answers)
    ids, num_asked = cluster_pairwise(questions, answers, entails)
    ours = cluster_answers(questions, answers, SameLength())
    assert ids == ours.ids
    assert num_asked >= 2 * ours.num_pairs_asked


def test_an_answer_that_has_a_cluster_is_still_compared_with_by_earlier_ones() -> None:
    # 1 meets 2, 3 and 4; 2 meets 3 and 4, though 3 has joined 1 by then; 3 and 4 have clusters.
    assert cluster_pairwise(["?"], [["a", "bb", "c", "dd"]], entails) == ([[0, 1, 0, 1]], 2 * (3 + 2))


def test_one_direction_is_not_enough() -> None:
    ids, _ = cluster_pairwise(["?"], [["a", "ab"]], lambda asked: [a in b for _, a, b in asked])
    assert ids == [[0, 1]]


@given(st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.4, 2.3]), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1))
def test_the_grid_splits_no_better_than_the_exact_threshold(values: list[float]) -> None:
    def error(threshold: float) -> float:
        parts = [array[array < threshold], array[array >= threshold]]
        return sum(((part - part.mean()) ** 2).sum() for part in parts if len(part))

    array = np.array(values)
    assert error(fit_threshold(array)) <= error(grid_threshold(array)) + 1e-9


def test_its_split_is_seventy_two_eighteen_ten() -> None:
    rows, test = random_rows(600, seed=0)
    assert (len(rows.train), len(rows.validation), len(test)) == (432, 108, 60)
    assert sorted(np.concatenate([*rows, test])) == list(range(600))


def test_nobody_is_in_two_parts_of_the_probes_split() -> None:
    groups = np.array([f"g{index // 5}" for index in range(100)])
    rows = split_by_group(groups, num_fit=50, seed=1)
    parts = [set(groups[part]) for part in rows]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert [len(part) for part in rows] == [40, 10, 50]


def test_the_best_epoch_is_kept_only_where_asked() -> None:
    rng = np.random.default_rng(0)
    states, unknown = rng.normal(size=(60, 4)).astype(np.float32), rng.random(60) < 0.5  # nothing to learn
    rows = ProbeRows(np.arange(40), np.arange(40, 60))
    last, best = (
        train_swiglu(states, unknown, rows, SwiGLUSettings(64, 0.01, 30, keep_best=keep), seed=0)
        for keep in (False, True)
    )
    loss = [_loss(model, states[40:], unknown[40:]) for model in (last, best)]
    assert loss[1] < loss[0]


def _loss(model: object, states: np.ndarray, unknown: np.ndarray) -> float:
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(states))  # type: ignore[operator]
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(unknown).long()))


def test_the_interval_of_a_difference_is_students() -> None:
    assert difference([0.9, 0.8, 1.0], [0.8, 0.8, 0.8]) == pytest.approx((0.1, -0.1484, 0.3484), abs=1e-4)


RUN = {
    "layers": [1, 2, 3],
    "validation_auroc": [0.9, 1.0, 1.0],
    "validation_loss": [0.1, 0.3, 0.2],
    "crossed_auroc": [0.8, 0.9, 0.8],
    "crossed_loss": [0.4, 0.5, 0.6],
}


@pytest.mark.parametrize(("rule", "layer"), [("auroc", 3), ("loss", 1), ("crossed", 2), ("top", 3)])
def test_a_layer_is_chosen_by_the_rule_and_ties_by_the_lower_loss(rule: str, layer: int) -> None:
    assert RUN["layers"][chosen(RUN, rule)] == layer


def test_probes_find_the_layer_that_holds_the_answer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    unknown = rng.random(400) < 0.5
    states = rng.normal(size=(400, 4, 6)).astype(np.float32)
    states[:, 2, 0] += 4 * unknown  # of layers 1 to 3: the embeddings, layer 0, are left out
    groups = np.array([f"g{index // 4}" for index in range(400)])
    np.savez(tmp_path / "all.npz", states=states, entropies=2.0 * unknown, wrong=unknown, groups=groups)
    found = compare(tmp_path / "all.npz", {"linear": ours(kind="linear")}, [0], 200, crossed=["linear"])
    (run,) = found["arms"]["linear"]
    assert run["layers"] == [1, 2, 3]
    assert [run["layers"][chosen(run, rule)] for rule in ("auroc", "crossed")] == [2, 2]
    assert run["unknown"][1] > 0.95
    assert max(run["unknown"][0], run["unknown"][2]) < 0.7
