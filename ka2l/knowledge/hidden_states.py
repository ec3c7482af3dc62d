"""Reads pooled hidden states of prompts in a prefill-only forward pass, and the certainty of the next token.

Nothing is generated, the language-model head reads the last token alone, no layer above the deepest wanted one is run
where the head is not wanted, a prefix that all prompts share is computed once, and of each layer's output only the
pooled vector is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.readable_model import find_blocks, load_readable_model, resolve_layers, rope_switch
from ka2l.model.loading import ModelConfig, load_tokenizer
from ka2l.model.virtual_tokens import expand_cache, num_virtual_tokens
from ka2l.schemas import NEXT_TOKEN

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import DynamicCache

#: Shorter common prefixes are not worth a forward pass of their own, tokens.
MIN_SHARED_PREFIX = 16
#: Bounds the attention scores of one forward pass where prompts are long, tokens with padding.
MAX_BATCH_TOKENS = 65_536


class Extracted(NamedTuple):
    """What one forward pass tells of prompts."""

    states: np.ndarray
    """Pooled hidden states, shape (num_prompts, num_layers, width), of the storage dtype."""
    next_token: np.ndarray | None
    """NEXT_TOKEN of each prompt, shape (num_prompts, 3) float32, nats; None where the config does not ask for it."""


class UnusableRowsError(ValueError):
    """Some prompts gave no usable state; those of all others are in ``extracted``.

    Attributes:
        reasons: position in the call -> ``empty`` | ``over_long: ...`` | ``non_finite: ...``.
        extracted: what ``extract`` would have returned, with NaN in the rows named in ``reasons``.
    """

    def __init__(self, reasons: dict[int, str], extracted: Extracted) -> None:
        super().__init__(reasons, extracted)
        self.reasons = reasons
        self.extracted = extracted

    def __str__(self) -> str:
        return "; ".join(f"prompt {index}: {reason}" for index, reason in self.reasons.items())


class _Prefix(NamedTuple):
    """The part that all prompts start with, computed once."""

    token_ids: list[int]
    cache: DynamicCache
    sums: torch.Tensor
    """Pooled states of the prefix, shape (num_layers, width): sums over its tokens where a mean is wanted."""


class HiddenStateExtractor:
    """A causal language model, with or without a LoRA adapter, that turns prompts into pooled hidden states.

    Layer numbers and values are those of transformers' ``output_hidden_states``. An adapter is not merged: in bfloat16
    a merge rounds small updates away, and the sampler does not merge either.

    Args:
        model_path: a model directory or hub id.
        config: what to read.
        dtype: ``auto`` | ``float32`` | ``bfloat16`` | ``float16``.
        adapter: a LoRA adapter directory.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: model or adapter cannot be loaded, or the adapter does not fit the model.
        ConfigError: a layer that the model does not have.
    """

    def __init__(
        self,
        model_path: str,
        config: ExtractionConfig,
        dtype: str = "auto",
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        import torch

        self.config = config
        self.num_forward_passes = 0
        self.num_tokens = 0
        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default_device if config.device == "auto" else config.device)
        model, self._virtual = load_readable_model(model_path, dtype, adapter, trust_remote_code, self.device)
        self.decoder = model.base_model
        self.tokenizer = load_tokenizer(ModelConfig(path=model_path, trust_remote_code=trust_remote_code))
        text_config = self.decoder.config.get_text_config(decoder=True)
        self._width: int = text_config.hidden_size
        longest = getattr(text_config, "max_position_embeddings", 1 << 30) - num_virtual_tokens(self._virtual)
        self._max_tokens = min(config.max_prompt_tokens, longest)
        self._rope_switch = rope_switch(text_config)
        self._pooled: dict[int, torch.Tensor] = {}
        self._lengths = torch.zeros(0, dtype=torch.long)
        self._prefix: _Prefix | None = None

        owner, name, blocks = find_blocks(self.decoder, text_config.num_hidden_layers)
        self._depth = len(blocks)
        self._layers = resolve_layers(config.layers, self._depth)
        if not config.next_token:
            # One block stays even if only the embedding output is wanted: its input is where that is read.
            blocks = blocks[: max(1, self._layers[-1])]
            setattr(owner, name, blocks)
        self._add_hooks(blocks)
        self.reader = (model if config.next_token else self.decoder).to(self.device).eval()

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers extracted, ascending."""
        return self._layers

    @property
    def num_layers(self) -> int:
        """How many layers are extracted, L."""
        return len(self._layers)

    @property
    def width(self) -> int:
        """Length of a pooled state, D: the model's hidden size, or twice that for ``last_and_mean``."""
        return self._width * (2 if self.config.position == "last_and_mean" else 1)

    def extract(self, prompts: Sequence[str | Sequence[int]]) -> Extracted:
        """Pooled states of prompts and the model's certainty of the next token, in the order given.

        Args:
            prompts: texts, or token ids as the sampler uses them (then nothing is added).

        Raises:
            UnusableRowsError: some prompts are empty, too long or gave NaN or infinity. It carries all others.
        """
        import numpy as np

        rows = [self._token_ids(prompt) for prompt in prompts]
        reasons = {index: reason for index, row in enumerate(rows) if (reason := self._refusal(row))}
        states = np.full((len(rows), self.num_layers, self.width), np.nan, dtype=self.config.storage_dtype)
        next_token = np.full((len(rows), len(NEXT_TOKEN)), np.nan, dtype=np.float32)
        order = sorted((index for index in range(len(rows)) if index not in reasons), key=lambda i: len(rows[i]))
        for group, may_share in self._rope_groups(order, rows):
            prefix = self._shared_prefix([rows[index] for index in group]) if may_share else None
            for batch in self._batches(group, rows):
                with np.errstate(over="ignore"):  # float16 overflow becomes infinity and is reported below
                    states[batch], next_token[batch] = self._forward([rows[index] for index in batch], prefix)
        for index in np.flatnonzero(~np.isfinite(states).all(axis=(1, 2))).tolist():
            layers = [self._layers[i] for i in np.flatnonzero(~np.isfinite(states[index]).all(axis=1))]
            reasons.setdefault(index, f"non_finite: NaN or infinity as {states.dtype} in layers {layers}")
        if self.config.next_token:
            for index in np.flatnonzero(~np.isfinite(next_token).all(axis=1)).tolist():
                reasons.setdefault(index, "non_finite: NaN or infinity in the next token's distribution")
        states[list(reasons)] = np.nan
        next_token[list(reasons)] = np.nan
        extracted = Extracted(states, next_token if self.config.next_token else None)
        if reasons:
            raise UnusableRowsError(dict(sorted(reasons.items())), extracted)
        return extracted

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        # A rendered chat prompt may already start with the special tokens that the tokenizer would put in front.
        added = list(self.tokenizer("")["input_ids"])
        bare = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return bare if bare[: len(added)] == added else list(self.tokenizer(prompt)["input_ids"])

    def _refusal(self, row: list[int]) -> str | None:
        if not row:
            return "empty"
        if len(row) > self._max_tokens:
            return f"over_long: {len(row)} tokens, at most {self._max_tokens} are allowed"
        return None

    def _rope_groups(self, order: list[int], rows: list[list[int]]) -> Iterator[tuple[list[int], bool]]:
        """Rows that may share a batch, and whether they may share a prefix.

        LongRoPE (Phi-3.5) picks its frequencies by the longest row of a batch, so rows on either side of the switch
        are kept apart, and those beyond it cannot reuse keys that were rotated with the short frequencies.
        """
        below = [i for i in order if self._rope_switch is None or len(rows[i]) <= self._rope_switch]
        if below:
            yield below, True
        if len(below) < len(order):
            yield order[len(below) :], False

    def _batches(self, group: list[int], rows: list[list[int]]) -> Iterator[list[int]]:
        """Cuts ``group``, sorted by length, into batches, longest first so that running out of memory shows at once."""
        end = len(group)
        while end:
            fitting = max(1, MAX_BATCH_TOKENS // len(rows[group[end - 1]]))
            start = max(0, end - min(self.config.batch_size, fitting))
            yield group[start:end]
            end = start

    def _shared_prefix(self, rows: list[list[int]]) -> _Prefix | None:
        """Keys, values and pooled states of what all rows start with, kept from call to call; None if not worth it."""
        import torch
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        shortest = min(map(len, rows))
        common = _common_prefix(rows)[: shortest - 1]  # every row keeps a token of its own
        known = self._prefix
        num_known = len(known.token_ids) if known else 0
        # Chance gives a call's questions a few more tokens in common; those do not make a new prefix.
        if known and common[:num_known] == known.token_ids and len(common) - num_known < MIN_SHARED_PREFIX:
            return known
        virtual = self._virtual_cache(1)
        cache = DynamicCache(config=self.decoder.config) if virtual is None else virtual
        # Only attention caches, sliding or not, can be handed to several rows; recurrent states take the plain way.
        shareable = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        if len(common) < MIN_SHARED_PREFIX or len(rows) < 2 or not shareable:
            return None
        with torch.inference_mode():
            sums = self._run([common], cache)[0][0]
        self._prefix = _Prefix(list(common), cache, sums)
        return self._prefix

    def _forward(self, rows: list[list[int]], prefix: _Prefix | None) -> tuple[np.ndarray, np.ndarray]:
        """States of one batch, shape (num_rows, num_layers, width), and NEXT_TOKEN, shape (num_rows, 3)."""
        import torch

        with torch.inference_mode():
            if prefix is None:
                pooled, next_token = self._run(rows, self._virtual_cache(len(rows)))
            else:
                start = len(prefix.token_ids)
                pooled, next_token = self._run([row[start:] for row in rows], expand_cache(prefix.cache, len(rows)))
            if self.config.position != "last_token":
                sums = pooled[:, :, -self._width :]  # a view: what is done to it is done to ``pooled``
                if prefix is not None:
                    sums += prefix.sums[:, -self._width :]
                sums /= torch.tensor([len(row) for row in rows], device=self.device)[:, None, None]
            return pooled.cpu().numpy(), next_token.cpu().numpy()

    def _virtual_cache(self, num_rows: int) -> DynamicCache | None:
        """Virtual tokens in front of so many rows; None where the adapter has none."""
        return None if self._virtual is None else expand_cache(self._virtual, num_rows)

    def _run(self, rows: list[list[int]], cache: DynamicCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass over ``rows``, which follow what ``cache`` holds: pooled states, shape (num_rows,
        num_layers, width), and NEXT_TOKEN, shape (num_rows, 3), NaN where it is not wanted.

        Rows are padded on the right and need no mask: attention is causal, so no token sees the padding after it,
        positions and sliding windows are those of the row alone, and attention kernels take their fast causal path.
        """
        import torch

        self._lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        self._pooled = {}
        output = self.reader(input_ids=ids.to(self.device), past_key_values=cache, use_cache=cache is not None)
        next_token = torch.full((len(rows), len(NEXT_TOKEN)), torch.nan)
        if self.config.next_token:
            next_token = next_token_features(output.logits[:, -1])
        self.num_forward_passes += 1
        self.num_tokens += sum(map(len, rows))
        pooled, self._pooled = self._pooled, {}
        return torch.stack([pooled[layer] for layer in self._layers], dim=1), next_token

    def _pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """(num_rows, num_tokens, hidden size) -> (num_rows, width) float32: last token's state, sum over tokens."""
        import torch

        last = hidden[torch.arange(len(hidden), device=hidden.device), self._lengths - 1].float()
        if self.config.position == "last_token":
            return last
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= self._lengths[:, None]
        # Filled, not multiplied by zero: an infinity in the padding must not turn into NaN.
        sums = hidden.float().masked_fill(padding[:, :, None], 0.0).sum(dim=1)
        return sums if self.config.position == "mean" else torch.cat([last, sums], dim=1)

    def _add_hooks(self, blocks: nn.ModuleList) -> None:
        """Let every wanted layer leave its pooled output in ``_pooled``. The top is the decoder's normed output, of
        which the language-model head is then given the last token alone."""
        import torch

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._pooled[0] = self._pool(args[0] if args else kwargs["hidden_states"])

        def after(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                self._pooled[layer] = self._pool(output[0] if isinstance(output, tuple) else output)

            return hook

        def top(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output.last_hidden_state
            if self._layers[-1] == self._depth:
                self._pooled[self._depth] = self._pool(hidden)
            rows = torch.arange(len(hidden), device=hidden.device)
            output.last_hidden_state = hidden[rows, self._lengths - 1][:, None]
            return output

        self.decoder.register_forward_hook(top)
        for layer in self._layers:
            if layer == 0:
                blocks[0].register_forward_pre_hook(before, with_kwargs=True)
            elif layer < self._depth:
                blocks[layer - 1].register_forward_hook(after(layer))


def next_token_features(logits: torch.Tensor) -> torch.Tensor:
    """NEXT_TOKEN of distributions over the vocabulary: logits (num_rows, V) to (num_rows, 3) float32, nats."""
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    # A token that is ruled out has a log-probability of minus infinity and adds nothing to the entropy.
    entropy = torch.special.entr(logprobs.exp()).sum(dim=-1)
    first, second = logprobs.topk(2, dim=-1).values.unbind(dim=-1)
    return torch.stack([entropy, first, first - second], dim=-1)


def _common_prefix(rows: Sequence[list[int]]) -> list[int]:
    first, last = min(rows), max(rows)  # in lexical order, so what these two share all rows share
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:length]
