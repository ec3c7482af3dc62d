"""Token ids of a prompt, and of a prompt with its completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens. A rendered chat prompt holds its special tokens already; others get them here."""
    return list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])


def row_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, chat: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of what is to follow it, the end token included."""
    prompt_ids = prompt_token_ids(tokenizer, prompt, chat)
    joint_ids = prompt_token_ids(tokenizer, prompt + completion, chat)
    # Tokenizers that end a text with a special token put it behind prompt and completion alike; it is added below.
    while prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        prompt_ids.pop()
    while joint_ids and joint_ids[-1] == tokenizer.eos_token_id:
        joint_ids.pop()
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = joint_ids[len(prompt_ids) :]
    else:
        # The completion would merge into the prompt's last token. When answering, the model sees the prompt's own
        # tokens, so train on these.
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*completion_ids, tokenizer.eos_token_id]
