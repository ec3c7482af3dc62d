"""Log-likelihood and perplexity of texts under the model under study.

One prefill pass over all texts of a batch, right-padded; logits are taken of the scored tokens alone, so a long prompt
before a short fact costs no vocabulary-sized matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from ka2l.errors import ModelError
from ka2l.knowledge.hidden_states import MAX_BATCH_TOKENS
from ka2l.model.tokens import row_token_ids
from ka2l.model.virtual_tokens import expand_cache, open_state
from ka2l.prompts import Prompter

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

#: Stands where a question would, to find what a template puts before and after it.
_MARK = "\u2042 question \u2042"


class ScoredText(NamedTuple):
    """Tokens, of which those from ``start`` on are scored."""

    token_ids: list[int]
    start: int
    """At least 1: a token is predicted from what stands before it."""


def fact_tokens(
    tokenizer: PreTrainedTokenizerBase, fact: str, prompt: str | None = None, *, chat: bool = False
) -> ScoredText:
    """A fact by itself, or as the answer to a prompt.

    By itself it follows the beginning-of-sequence token where the tokenizer has one; where it has none, the fact's
    first token has nothing to be predicted from and is not scored.

    Args:
        prompt: as it was rendered; None for the fact alone.
        chat: a chat template rendered it.
    """
    if prompt is None:
        ids = list(tokenizer(fact, add_special_tokens=False)["input_ids"])
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return ScoredText(begin + ids, 1)
    prompt_ids, answer_ids = row_token_ids(tokenizer, prompt, fact if chat else f" {fact}", chat)
    return ScoredText(prompt_ids + answer_ids[:-1], len(prompt_ids))  # without the end token: an answer may go on


def question_tokens(prompter: Prompter, question: str) -> ScoredText:
    """A question as the model is asked it: what stands before it in the prompt (instruction, worked examples, the
    template's own text) is given, the question's own text is scored, and nothing follows.

    A token in which what stands before and the question meet, such as one that begins with a space, counts as the
    question's.

    Raises:
        ModelError: the chat template does not repeat the question as it is.
    """
    before, _, after = prompter.text(_MARK).partition(_MARK)
    if prompter.text(question) != before + question + after:
        raise ModelError(
            f"the prompt's template changes the question {question[:60]!r}, so that it cannot be found in the prompt",
            hint="Set prompt.template=plain, or take another selection.kind than perplexity.",
        )
    ids = prompter.encode(before + question)
    while ids and ids[-1] == prompter.tokenizer.eos_token_id:  # of tokenizers that end every text with it
        ids.pop()
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(prompter.encode(before), ids, strict=False))
    return ScoredText(ids, max(1, sum(1 for _ in shared)))


class PerplexityScorer:
    """A causal language model, with or without an adapter, that scores texts.

    Args:
        model_path: a model directory or hub id.
        dtype: ``auto`` | ``float32`` | ``bfloat16`` | ``float16``.
        adapter: an adapter directory; not merged.
        batch_size: texts in one forward pass, at most.
        device: ``auto`` is a GPU where there is one, else the CPU.

    Raises:
        ModelError: model or adapter cannot be loaded.
    """

    def __init__(
        self,
        model_path: str,
        dtype: str = "auto",
        adapter: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        import torch

        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default_device if device == "auto" else device)
        self.model, self.virtual_tokens = open_state(model_path, adapter, dtype, self.device, trust_remote_code)
        self.batch_size = batch_size
        self.num_tokens = 0
        """Tokens read so far."""

    def perplexities(self, texts: Sequence[ScoredText]) -> np.ndarray:
        """exp of the mean negative log-probability a scored token.

        Returns:
            Shape (num_texts,), float64; NaN for a text without a token to score.
        """
        import numpy as np

        num_scored = np.array([len(text.token_ids) - max(text.start, 1) for text in texts], dtype=np.float64)
        return np.exp(-self.log_likelihoods(texts) / num_scored)

    def log_likelihoods(self, texts: Sequence[ScoredText]) -> np.ndarray:
        """Sum of the scored tokens' log-probabilities, nats.

        Returns:
            Shape (num_texts,), float64; NaN for a text without a token to score.
        """
        import numpy as np
        from torch.nn.functional import cross_entropy

        found = np.full(len(texts), np.nan)
        for batch in self._batches(texts):
            logits, targets, counts = self._predictions([texts[index] for index in batch])
            losses = cross_entropy(logits, targets, reduction="none").cpu().numpy().astype(np.float64)
            found[batch] = [-part.sum() for part in np.split(losses, np.cumsum(counts)[:-1])]
        return found

    def next_token_log_likelihoods(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Log-probabilities of several tokens that could come next, from one pass over each prompt, nats.

        Args:
            prompts: token ids of each prompt, at least one a prompt.
            options: token ids that could follow each prompt, as many for every prompt.

        Returns:
            Shape (num_prompts, num_options), float64.
        """
        import numpy as np
        import torch

        texts = [ScoredText([*ids, tokens[0]], len(ids)) for ids, tokens in zip(prompts, options, strict=True)]
        found = np.full((len(texts), len(options[0]) if len(options) else 0), np.nan)
        for batch in self._batches(texts):
            logits, _, _ = self._predictions([texts[index] for index in batch])
            wanted = torch.tensor([list(options[index]) for index in batch], device=logits.device)
            found[batch] = logits.log_softmax(-1).gather(1, wanted).cpu().numpy()
        return found

    def _batches(self, texts: Sequence[ScoredText]) -> Iterator[list[int]]:
        """Texts with a token to score; those of like length share a batch, the longest first."""
        usable = (index for index, text in enumerate(texts) if len(text.token_ids) > max(text.start, 1))
        order = sorted(usable, key=lambda index: len(texts[index].token_ids))
        end = len(order)
        while end:
            fitting = max(1, MAX_BATCH_TOKENS // len(texts[order[end - 1]].token_ids))
            start = max(0, end - min(self.batch_size, fitting))
            yield order[start:end]
            end = start

    def _predictions(self, texts: Sequence[ScoredText]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Of one batch: float32 logits where a scored token is predicted, shape (num_scored, vocabulary), these tokens,
        shape (num_scored,), and how many of them are each text's."""
        import torch

        length = max(len(text.token_ids) for text in texts)
        ids = torch.zeros((len(texts), length), dtype=torch.long)
        wanted = torch.zeros((len(texts), length - 1), dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
            wanted[row, max(text.start, 1) - 1 : len(text.token_ids) - 1] = True
        targets = ids[:, 1:][wanted].to(self.device)
        # Only positions that predict a scored token go through the output layer; padding is on the right, unseen.
        first = int(min(text.start for text in texts)) or 1
        with torch.inference_mode():
            cache = None if self.virtual_tokens is None else expand_cache(self.virtual_tokens, len(texts))
            logits = self.model(
                input_ids=ids.to(self.device),
                logits_to_keep=length - (first - 1),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits
        self.num_tokens += sum(len(text.token_ids) for text in texts)
        return logits[:, :-1][wanted[:, first - 1 :].to(self.device)].float(), targets, wanted.sum(dim=1).tolist()
