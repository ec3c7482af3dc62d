"""Models that ``bench_peers.py`` saves for both sides: small, random, of architectures that both load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: In uqlm's order, which it takes for granted.
LABELS = ("contradiction", "neutral", "entailment")
#: Share of ordered pairs that the random NLI model calls entailment.
ENTAILED = 0.5


def save_nli_model(folder: Path, pairs: Sequence[tuple[str, str]], seed: int = 0) -> Path:
    """A random DeBERTa-v2 classifier whose entailment logit is shifted so that it wins on about half of ``pairs``.

    Its verdicts mean nothing: they are neither symmetric nor transitive, and a text need not entail itself, so that
    every difference between two rules of clustering shows.
    """
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    texts = sorted({text for pair in pairs for text in pair})
    tokenizer = _tokenizer(texts, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ("[CLS]", "[SEP]"))
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=128, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"],
        initializer_range=0.2, pad_token_id=0, type_vocab_size=0, pooler_hidden_size=128,
        id2label=dict(enumerate(LABELS)), label2id={name: index for index, name in enumerate(LABELS)},
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).eval()
    margins = []
    with torch.inference_mode():
        for start in range(0, len(pairs), 64):
            left, right = zip(*pairs[start : start + 64], strict=True)
            batch = tokenizer(list(left), list(right), padding=True, return_tensors="pt")
            logits = model(**batch).logits
            margins.append(logits[:, 2] - logits[:, :2].amax(1))
        model.classifier.bias[2] -= torch.quantile(torch.cat(margins), 1 - ENTAILED)
    return _save(folder, model, tokenizer)


def save_causal_lm(folder: Path, texts: Iterable[str], shape: dict[str, Any], seed: int = 0) -> Path:
    """A random Llama whose tokenizer knows `` True`` and `` False`` as one token each: lm-polygraph reads one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Often enough for both to become tokens.
    tokenizer = _tokenizer([*texts, *[" True False"] * 1000], ["<pad>", "<s>", "</s>"], None)
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in ("True", "False"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.15, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **shape,
    )  # fmt: skip
    return _save(folder, LlamaForCausalLM(config).eval(), tokenizer)


def _tokenizer(texts: Sequence[str], special: list[str], around: tuple[str, str] | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    named: dict[str, Any]
    if around is None:
        named = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
        named["model_input_names"] = ["input_ids", "attention_mask"]  # a Llama knows no token types
    else:
        first, last = around
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
        )
        named = {"pad_token": special[0], "cls_token": first, "sep_token": last, "unk_token": special[3]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **named)


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 4, which the peers run on, knows the tokenizer's class by its old name.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=1))
    return folder
