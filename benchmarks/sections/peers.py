"""Semantic entropy, clusters and P(True) beside uqlm and lm-polygraph."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import figure, interval, percent, table

TITLE = "Semantic entropy and P(True) beside uqlm and lm-polygraph"
COMMAND = "python benchmarks/bench_peers.py --peers-python peers-venv/bin/python"
NAMES = {"uqlm": "uqlm", "lm_polygraph": "lm-polygraph"}
VERDICTS = {"lexical": "lexical", "embedding": "embedding", "nli": "random NLI model"}


def section(result: dict[str, Any]) -> Section:
    """Agreement, why it ends, and speed."""
    settings, versions, asked = result["settings"], result["peers_versions"], result["p_true"]["testbed"]
    p_true = result["p_true"]["lm_polygraph"]
    found = {(verdicts, peer): result["entropies"][verdicts][peer] for verdicts in VERDICTS for peer in NAMES}
    agreement = table(
        ["verdicts", "peer", "largest difference, nats", "equal entropies", "same clusters", "explained"],
        [[VERDICTS[verdicts], NAMES[peer], *_agreement(one)] for (verdicts, peer), one in found.items()],
    )
    compared = {(f"entropy, {VERDICTS[verdicts]}", peer): one for (verdicts, peer), one in found.items()}
    compared["P(True)", "lm_polygraph"] = p_true
    speed = table(
        ["", "peer", "KA2L, ms a question", "peer, ms a question", "peer / KA2L", "pairs asked, KA2L", "peer"],
        [[what, NAMES[peer], *_speed(one, peer)] for (what, peer), one in compared.items()],
    )
    overlapping = percent(found["nli", "uqlm"]["share_overlapping"], 1)
    scores = {name: interval(one["value"], one["ci"]) for name, one in asked["auroc_wrong"].items()}
    text = f"""The testbed's model answered {settings["num_questions"]} questions {settings["num_samples"]} times each.
uqlm {versions["uqlm"]} and lm-polygraph {versions["lm-polygraph"]} (transformers {versions["transformers"]}) and we
were given the same answers and the same verdicts on which mean the same: two tables, one of words and one of
embeddings' cosines (at least {settings["embedding_threshold"]}), and an NLI model with random weights, whose verdicts
mean nothing, so that every difference between two rules shows. Batches of {settings["batch_size"]}; loading is not
timed; medians of {settings["repeats"]} rounds in turns, with the range of their ratios.

{agreement}

"Explained" says for how many questions a peer's clusters come out when they are made once more from the same verdicts
by these rules of its source:

- **uqlm** joins two answers where *either* entails the other, and puts an answer into every cluster that it matches:
  {overlapping} of the questions have an answer in several clusters under the NLI model. The papers
  ([Kuhn 2023](https://arxiv.org/abs/2302.09664), [Farquhar 2024](https://doi.org/10.1038/s41586-024-07421-0)) ask for
  both directions and put an answer into the first cluster that it matches, as we do.
- **lm-polygraph** asks for both directions and takes the first cluster, as we do, but asks the model whether a text
  entails *itself*, too, and one that says no splits identical answers. Equal texts are one answer to us, without
  asking.

{speed}

"Pairs asked" are ordered pairs of texts put to the NLI model, or looked up. lm-polygraph compares all different answers
of a question with each other; uqlm and we compare with a cluster's first answer, uqlm with a batch an answer, we with
batches across questions. Under given verdicts it is the clustering alone that is timed.

P(True), on the same prompts (mean {p_true["mean_prompt_tokens"]:.0f} tokens) under a small random Llama: our
log-probabilities of both options are lm-polygraph's up to {figure(p_true["max_abs_difference_log_p"], 6)} nats. It
generates a token, which rules the end token out before probabilities are taken; without the end token the difference is
{p_true["max_abs_difference_log_p_without_end"]:.1e}, and of P(True), the two options' share,
{p_true["max_abs_difference_normalised"]:.1e}. lm-polygraph reads one option and does not normalise: on these prompts
its score ranks as ours does with a Spearman correlation of {p_true["spearman_p_true"]:.3f}. Its own prompt differs from
ours, as does uqlm's, which a chat endpoint has to answer and which was not compared.

Under the testbed's model, which was never taught to follow instructions, P(True) with solved examples has an AUROC of
{scores["p_true"]} for "answers wrongly" on {asked["num_questions"]} questions, and semantic entropy
{scores["semantic_entropy"]}."""
    return Section(text, {}, _losses(found, p_true))


def _agreement(one: dict[str, Any]) -> list[str]:
    shares = [percent(one[key], 1) for key in ("share_equal", "share_same_clusters", "share_explained")]
    return [figure(one["max_abs_difference"], 6), *shares]


def _speed(one: dict[str, Any], peer: str) -> list[str]:
    seconds, pairs = one["seconds"], one.get("num_pairs", {})
    return [
        figure(1000 * seconds["ka2l"], 2),
        figure(1000 * seconds[peer], 2),
        interval(one["peer_over_ka2l"], one["peer_over_ka2l_range"], 2),
        *(figure(pairs.get(side), 0) for side in ("ka2l", peer)),
    ]


def _losses(found: dict[tuple[str, str], dict[str, Any]], p_true: dict[str, Any]) -> list[str]:
    losses = [
        f"Semantic entropy with {VERDICTS[verdicts]} verdicts takes {1 / one['peer_over_ka2l']:.2f} times "
        f"{NAMES[peer]}'s seconds."
        for (verdicts, peer), one in found.items()
        if one["peer_over_ka2l"] < 0.98
    ]
    if p_true["peer_over_ka2l"] < 0.98:
        losses.append(
            f"P(True) takes {1 / p_true['peer_over_ka2l']:.2f} times lm-polygraph's seconds, for both options in place "
            "of one."
        )
    return losses
