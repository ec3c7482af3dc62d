"""SamplerConfig, the interface of samplers, and a sampler that needs nothing but transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import Field

from ka2l.section import Section

if TYPE_CHECKING:
    import torch


class EngineConfig(Section):
    """What generates text, and on how much of the machine."""

    KINDS: ClassVar[tuple[str, ...]] = ("vllm", "transformers")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {
            "replicas",
            "cpus_per_replica",
            "gpus_per_replica",
            "tensor_parallel_size",
            "max_num_seqs",
            "gpu_memory_utilization",
            "cpu_kv_cache_gib",
        }
    )

    kind: str = "vllm"
    """``vllm``, or ``transformers`` for machines without vLLM (slow)."""
    replicas: int = Field(1, ge=1)
    """Engines side by side."""
    cpus_per_replica: float = Field(1.0, ge=0)
    """CPU cores Ray sets aside for an engine."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs Ray sets aside for an engine; at least ``tensor_parallel_size``."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs one copy of the model is spread over."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences an engine decodes at once."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus answer, tokens; the model's own limit where null."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory an engine may take."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """GiB of KV cache an engine on CPUs may take."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments for vLLM's ``LLM``, as they are."""


class SamplerConfig(EngineConfig):
    """How answers are sampled and where."""

    num_samples: int = Field(10, ge=2)
    """Answers per seed question, drawn at ``temperature``; semantic entropy comes from them."""
    stop_early: bool = False
    """Draw three of them first, then two at a time, and no more where the entropy is settled
    (`ka2l.sampling.early_stop`)."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampled answers. The answer that measures accuracy is greedy."""
    max_tokens: int = Field(64, ge=1)
    """Longest answer, tokens."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end an answer."""


class Request(NamedTuple):
    """Answers wanted for one prompt."""

    prompt_token_ids: list[int]
    num_samples: int
    temperature: float
    """0 is greedy."""
    seed: int
    """Sample i of the request draws from seed + i."""
    json_schema: Mapping[str, Any] | None = None
    """What the answer must be, where the sampler can hold a model to it (vLLM)."""


class Generation(NamedTuple):
    """One generated answer."""

    answer: str
    """Stripped text up to the stop string."""
    token_ids: tuple[int, ...]
    logprob: float
    """Sum over the generated tokens under the untempered model, nats."""
    num_prompt_tokens: int
    finish_reason: str
    """``stop``, ``length``, or ``rejected`` for a prompt that does not fit the model."""


class Sampler(Protocol):
    """What the observe stage needs of a model."""

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """``num_samples`` answers a request, in order."""


def rejected(request: Request) -> list[Generation]:
    """Stand-ins for a prompt that does not fit: counted and shown, never an end to the run."""
    return [Generation("", (), 0.0, len(request.prompt_token_ids), "rejected")] * request.num_samples


class TransformersSampler:
    """Batched sampling with plain transformers. Every sample has its own random stream, so batches change nothing."""

    def __init__(
        self,
        model_path: str,
        config: SamplerConfig,
        *,
        dtype: str = "auto",
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        import torch

        from ka2l.model.loading import ModelConfig, load_tokenizer, max_model_len
        from ka2l.model.virtual_tokens import num_virtual_tokens, open_state

        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self._virtual = open_state(model_path, adapter, dtype, self.device, trust_remote_code)
        self.num_virtual = num_virtual_tokens(self._virtual)
        self.tokenizer = load_tokenizer(ModelConfig(path=model_path, trust_remote_code=trust_remote_code))
        eos = self.model.generation_config.eos_token_id
        # As in vLLM, the tokenizer's end token ends an answer even where the generation config names others.
        self.eos = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.max_len = (config.max_model_len or max_model_len(model_path) or limit or 1 << 30) - self.num_virtual

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """``num_samples`` answers a request, in order."""
        results: list[list[Generation]] = [[] for _ in requests]
        rows = []
        for index, request in enumerate(requests):
            if len(request.prompt_token_ids) + self.config.max_tokens > self.max_len:
                results[index] = rejected(request)
            else:
                rows += [(index, sample) for sample in range(request.num_samples)]
        rows.sort(key=lambda row: len(requests[row[0]].prompt_token_ids))
        made: dict[tuple[int, int], Generation] = {}
        for start in range(0, len(rows), self.config.max_num_seqs):
            batch = rows[start : start + self.config.max_num_seqs]
            made.update(zip(batch, self._batch(requests, batch), strict=True))
        for index, sample in sorted(made):
            results[index].append(made[index, sample])
        return results

    def _batch(self, requests: Sequence[Request], rows: Sequence[tuple[int, int]]) -> list[Generation]:
        import torch

        from ka2l.model.virtual_tokens import expand_cache

        prompts = [requests[index].prompt_token_ids for index, _ in rows]
        width = max(map(len, prompts))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        streams = [torch.Generator().manual_seed(requests[index].seed + sample) for index, sample in rows]
        temperatures = [requests[index].temperature for index, _ in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs = [0.0] * len(rows)
        reasons: list[str | None] = [None] * len(rows)
        cache = None if self._virtual is None else expand_cache(self._virtual, len(rows))
        step_ids, positions = ids, (mask.cumsum(1) - 1).clamp(min=0) + self.num_virtual
        mask = torch.cat([torch.ones((len(rows), self.num_virtual), dtype=mask.dtype), mask], 1)
        with torch.inference_mode():
            for _ in range(self.config.max_tokens):
                output = self.model(
                    input_ids=step_ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    position_ids=positions.to(self.device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                logits = output.logits[:, -1].float().cpu()
                chosen = _choose(logits, temperatures, streams)
                chosen_logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
                for row, token in enumerate(chosen.tolist()):
                    if reasons[row] is None:
                        tokens[row].append(token)
                        logprobs[row] += chosen_logprobs[row]
                        if token in self.eos or self._has_stop(tokens[row]):
                            reasons[row] = "stop"
                if all(reasons):
                    break
                step_ids, positions = chosen[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, torch.ones((len(rows), 1), dtype=mask.dtype)], 1)
        return [
            Generation(
                self._text(tokens[row]), tuple(tokens[row]), logprobs[row], len(prompts[row]), reason or "length"
            )
            for row, reason in enumerate(reasons)
        ]

    def _has_stop(self, tokens: list[int]) -> bool:
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return any(stop in text for stop in self.config.stop)

    def _text(self, tokens: list[int]) -> str:
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        ends = [text.find(stop) for stop in self.config.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()


def _choose(logits: torch.Tensor, temperatures: Sequence[float], streams: Sequence[torch.Generator]) -> torch.Tensor:
    """Next token of each row, shape (rows,): argmax at temperature 0, else a draw from the row's own stream."""
    import torch

    chosen = logits.argmax(-1)
    for row, temperature in enumerate(temperatures):
        if temperature > 0:
            probabilities = (logits[row] / temperature).softmax(-1)
            chosen[row] = torch.multinomial(probabilities, 1, generator=streams[row])[0]
    return chosen
