"""Tiny models with random weights in the nine architectures that ``nine.yaml`` runs on, made from their config classes.

Two or three layers of width 64 with heads of 32, weights wide enough that attention, positions and depth all matter.
Each is saved beside a byte-level BPE tokenizer, so that ``from_pretrained`` and vLLM load the folder as any model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SENTENCES = [
    "Answer the question as briefly as possible.",
    "Question: Who wrote the play Hamlet? Answer: William Shakespeare",
    "Question: What is the capital city of Peru? Answer: Lima",
    "Question: In which year did the first person walk on the moon? Answer: 1969",
    "Question: Which drug is given first for an anaphylactic shock? Answer: adrenaline",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; isn't that (rather) odd?",
]
_VOCAB_SIZE = 384

#: ChatML, the template of the Qwen family; the others differ in their markers only.
_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": _VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


_ONE_KV_HEAD = {"num_key_value_heads": 1}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 512,
}
#: name -> (model type, what differs from _SHAPE, special tokens that the tokenizer puts in front of every text)
_MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama-2": ("llama", {}, ("<s>",)),
    "llama-3.1": ("llama", _ONE_KV_HEAD | {"rope_parameters": _LLAMA3_ROPE}, ("<s>",)),
    "mistral-v0.1": ("mistral", _ONE_KV_HEAD | {"head_dim": 32, "sliding_window": 24}, ("<s>",)),
    "mistral-v0.3": ("mistral", _ONE_KV_HEAD | {"head_dim": 32, "sliding_window": None}, ("<s>",)),
    "qwen1.5": ("qwen2", {}, ()),
    "qwen2.5": ("qwen2", _ONE_KV_HEAD | {"tie_word_embeddings": True}, ()),
    "glm-4": ("glm", _ONE_KV_HEAD | {"head_dim": 32}, ("[gMASK]", "<sop>")),
    "gemma-2": ("gemma2", _ONE_KV_HEAD | {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32}, ("<s>",)),
    "phi-3.5": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 512}, ()),
}
ARCHITECTURES: tuple[str, ...] = tuple(_MODELS)


def _build_tokenizer(leading: tuple[str, ...]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # The ids of the first three are those of _SHAPE. Qwen's tokenizer class insists on <|endoftext|>.
    special = ["<pad>", "</s>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    if leading:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*leading, "$A"]),
            pair=" ".join([*leading, "$A", "$B"]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in leading],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>" if leading == ("<s>",) else None,
        extra_special_tokens=special[3:],
        model_max_length=_SHAPE["max_position_embeddings"],
    )
    prefix = "".join(leading) if leading != ("<s>",) else ""
    fast.chat_template = prefix + _CHAT_TEMPLATE
    return fast


def build_tiny_model(name: str, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Saves model and tokenizer of one of ``ARCHITECTURES`` to ``directory`` and returns it.

    Args:
        name: one of ``ARCHITECTURES``.
        directory: where to save; made if absent.
        seed: of the random weights.
        **overrides: fields of the config, e.g. ``attn_logit_softcapping=1.0``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, difference, leading = _MODELS[name]
    tokenizer = _build_tokenizer(leading)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(_SHAPE | difference | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Norms and biases start at one and zero; perturb them, so that a forgotten norm or bias shows.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
