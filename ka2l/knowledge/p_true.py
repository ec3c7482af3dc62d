"""P(True): the model is shown an answer of its own and asked whether it is true.

Kadavath et al. 2022 (arXiv 2207.05221), as the papers on semantic entropy use it (arXiv 2302.09664;
doi 10.1038/s41586-024-07421-0): the sampled answers stand before the one in question as brainstormed ones, and solved
examples come first, which show a base model what is wanted. The value is the probability of one option of the two;
nothing is generated.

The model has to follow an instruction. One that was trained on ``Question: ..`` and ``Answer:`` alone, as the testbed's
is, cannot.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ka2l.model.tokens import row_token_ids
from ka2l.tuning.sft import completion

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ka2l.knowledge.perplexity import PerplexityScorer

INSTRUCTION = "Judge whether the possible answer to a question is true. Reply with one word, True or False."
OPTIONS: tuple[str, str] = ("True", "False")


class SolvedExample(NamedTuple):
    """A possible answer of which it is known whether it is true."""

    question: str
    answer: str
    brainstormed: Sequence[str]
    is_true: bool


def p_true_prompt(
    question: str,
    answer: str,
    brainstormed: Sequence[str],
    examples: Sequence[SolvedExample] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The prompt up to where ``True`` or ``False`` follows.

    Args:
        answer: the one in question.
        brainstormed: the sampled answers, in order; none leaves their part out.
        examples: shown first, solved; none of them may be evaluated (see `split_examples`).
        tokenizer: renders the prompt with its chat template; None: plain text.
    """
    blocks = [_block(example.question, example.answer, example.brainstormed) for example in examples]
    replies = [OPTIONS[0] if example.is_true else OPTIONS[1] for example in examples]
    blocks.append(_block(question, answer, brainstormed))
    if tokenizer is None:
        solved = [f"{block} {reply}" for block, reply in zip(blocks, replies, strict=False)]
        return "\n\n".join([INSTRUCTION, *solved, blocks[-1]])
    messages = [{"role": "user", "content": block} for block in blocks]
    messages[0]["content"] = f"{INSTRUCTION}\n\n{blocks[0]}"
    for place, reply in enumerate(replies):
        messages.insert(2 * place + 1, {"role": "assistant", "content": reply})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _block(question: str, answer: str, brainstormed: Sequence[str]) -> str:
    ideas = ["Brainstormed answers:", *brainstormed] if brainstormed else []
    asked = ["Is the possible answer:", "(A) True", "(B) False", "The possible answer is:"]
    return "\n".join([f"Question: {question}", *ideas, f"Possible answer: {answer}", *asked])


def split_examples(is_true: Sequence[bool], num_examples: int, seed: int) -> tuple[list[int], list[int]]:
    """Which seed questions to show as solved examples, and which are left to be evaluated.

    Args:
        is_true: of each seed question, whether the answer in question is true.
        num_examples: as many true ones as false ones where there are enough of both, and in random order.
        seed: of the choice and the order.

    Returns:
        Positions of the examples in the order to show them in, and of all others, ascending.

    Raises:
        ValueError: there are no more questions than examples.
    """
    if num_examples >= len(is_true):
        raise ValueError(f"{num_examples} examples of {len(is_true)} questions leave nothing to evaluate")
    rng = random.Random(seed)
    by_label = [[index for index, label in enumerate(is_true) if bool(label) is wanted] for wanted in (True, False)]
    rarer, commoner = sorted((rng.sample(group, len(group)) for group in by_label), key=len)
    from_rarer = min(len(rarer), num_examples // 2)
    chosen = rarer[:from_rarer] + commoner[: num_examples - from_rarer]
    rng.shuffle(chosen)
    return chosen, sorted(set(range(len(is_true))) - set(chosen))


def p_true(
    scorer: PerplexityScorer, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, chat: bool
) -> np.ndarray:
    """P(True) = p(" True") / (p(" True") + p(" False")) after each prompt.

    Args:
        scorer: the model that gave the answers.
        tokenizer: its tokenizer.
        prompts: made by `p_true_prompt`.
        chat: a chat template rendered them.

    Returns:
        Shape (num_prompts,), float64, in [0, 1]; NaN for a prompt that is longer than the model takes.
    """
    import numpy as np

    found = option_log_likelihoods(scorer, tokenizer, prompts, chat=chat)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.exp(-np.logaddexp(0.0, found[:, 1] - found[:, 0]))


def option_log_likelihoods(
    scorer: PerplexityScorer, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, chat: bool
) -> np.ndarray:
    """log p of each of ``OPTIONS`` as what follows each prompt, nats; shape (num_prompts, 2), NaN where too long."""
    import numpy as np

    from ka2l.knowledge.perplexity import ScoredText
    from ka2l.model.virtual_tokens import num_virtual_tokens

    limit = getattr(scorer.model.config, "max_position_embeddings", None) or 1 << 30
    limit -= num_virtual_tokens(scorer.virtual_tokens)
    found = np.full((len(prompts), len(OPTIONS)), np.nan)
    short: list[tuple[int, list[int], list[int]]] = []  # options of one token each: one pass says both
    long: list[tuple[int, int, ScoredText]] = []
    for index, prompt in enumerate(prompts):
        prompt_ids: list[int] = []
        options: list[list[int]] = []
        for option in OPTIONS:
            prompt_ids, (*option_ids, _) = row_token_ids(tokenizer, prompt, completion(option, chat), chat)
            options.append(option_ids)
        if len(prompt_ids) + max(map(len, options)) > limit:
            continue
        if all(len(option_ids) == 1 for option_ids in options):
            short.append((index, prompt_ids, [option_ids[0] for option_ids in options]))
        else:
            long += [(index, place, ScoredText(prompt_ids + ids, len(prompt_ids))) for place, ids in enumerate(options)]
    if short:
        rows, contexts, tokens = zip(*short, strict=True)
        found[list(rows)] = scorer.next_token_log_likelihoods(contexts, tokens)
    if long:
        rows, places, texts = zip(*long, strict=True)
        found[list(rows), list(places)] = scorer.log_likelihoods(texts)
    return found
