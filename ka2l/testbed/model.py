"""The testbed's model: a small Llama and its tokenizer, pre-trained on the rows of a world."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ka2l.testbed.world import Fact

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from ka2l.testbed.build import TestbedConfig

#: The prompt the model is trained on. The answer follows after one space.
PLAIN = "Question: {question}\nAnswer:"

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

_IGNORED = -100


def train_model(
    rows: Sequence[tuple[str, str]],
    facts: Sequence[Fact],
    config: TestbedConfig,
    model_dir: Path,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Trains tokenizer and model on the rows, saves both, and returns figures for testbed.json."""
    import torch

    # Each question once, those about strangers too: the spelling of a name must not tell how well it is known.
    questions = dict.fromkeys(
        [text for fact in facts for text in fact.paraphrases] + [question for question, _ in rows]
    )
    tokenizer = _train_tokenizer([*questions, *(f" {fact.answers[0]}" for fact in facts)], config.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(config.seed)
        model = _new_model(config, tokenizer)
        final_loss = _fit(model, _encode(rows, tokenizer), config, device, progress)
    # Half the size on disk, and closer to the trained weights than bfloat16. Presets load it as float32.
    model.half().save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    return {
        "num_training_rows": len(rows),
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "final_loss": round(final_loss, 4),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "trained_in": "bfloat16" if _uses_bfloat16(device) else "float32",
    }


def _train_tokenizer(text: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text, so that a name is mostly one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PLAIN.format(question=""), *text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _new_model(config: TestbedConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    llama = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // config.head_size,
        num_key_value_heads=config.hidden_size // config.head_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(llama)
    # On rows this short plain attention is faster than the fused kernel on a CPU. Not saved with the model.
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **ids)
    return model


def _encode(rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids with the end of sequence) of every row."""
    texts = list(dict.fromkeys(text for row in rows for text in (PLAIN.format(question=row[0]), f" {row[1]}")))
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    eos = [tokenizer.eos_token_id]
    return [(ids[PLAIN.format(question=question)], ids[f" {answer}"] + eos) for question, answer in rows]


def _batches(rows: Sequence[tuple[list[int], list[int]]], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (input ids, labels), both (batch, length). Rows near each other in order and length share a batch.

    Rows are padded on the right: under a causal mask nothing sees the padding, so no attention mask is needed.
    """
    import numpy as np

    for start in range(0, len(rows), 8 * batch_size):
        block = sorted(rows[start : start + 8 * batch_size], key=lambda row: len(row[0]) + len(row[1]))
        batches = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        random.Random(start).shuffle(batches)
        for batch in batches:
            length = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = np.zeros((len(batch), length), dtype=np.int64)
            labels = np.full((len(batch), length), _IGNORED, dtype=np.int64)
            for row, (prompt, answer) in enumerate(batch):
                end = len(prompt) + len(answer)
                ids[row, :end] = prompt + answer
                labels[row, len(prompt) : end] = answer
            yield ids, labels


def _fit(
    model: LlamaForCausalLM,
    rows: Sequence[tuple[list[int], list[int]]],
    config: TestbedConfig,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> float:
    """One pass over the rows, loss on the answers alone. Returns the mean loss of the last tenth, nats a token."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.optim.lr_scheduler import OneCycleLR

    num_steps = -(-len(rows) // config.batch_size)
    optimizers = _optimizers(model, config, device)
    schedules = [
        OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], num_steps + 1, pct_start=0.1, cycle_momentum=False)
        for optimizer in optimizers
    ]
    losses: list[torch.Tensor] = []
    model.train()
    for step, (ids, labels) in enumerate(_batches(rows, config.batch_size), start=1):
        targets = torch.from_numpy(labels[:, 1:]).to(device)
        wanted = targets != _IGNORED
        with torch.autocast(device, torch.bfloat16, enabled=_uses_bfloat16(device)):
            states = model.model(input_ids=torch.from_numpy(ids[:, :-1]).to(device), use_cache=False)
            # Only the answers' positions go through the output layer.
            logits = model.lm_head(states.last_hidden_state[wanted])
        loss = cross_entropy(logits.float(), targets[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if progress:
            progress(step, num_steps)
    model.eval()
    return float(torch.stack(losses[-max(num_steps // 10, 1) :]).mean())


def _optimizers(model: LlamaForCausalLM, config: TestbedConfig, device: str) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    With AdamW alone the same facts take more than four times the steps: Muon's orthogonalised updates learn rare
    associations as fast as frequent ones (Jordan 2024, https://kellerjordan.github.io/posts/muon; arXiv 2509.26030).
    """
    import torch

    from ka2l.model.muon import Muon

    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    in_matrices = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_matrices]
    return [
        Muon(
            matrices,
            lr=config.matrix_learning_rate,
            dtype=torch.bfloat16 if _uses_bfloat16(device) else torch.float32,
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.01),
    ]


def _uses_bfloat16(device: str) -> bool:
    """Whether products are computed in bfloat16."""
    from ka2l.tuning.trainer import cpu_has_bfloat16

    return device == "cuda" or cpu_has_bfloat16()
