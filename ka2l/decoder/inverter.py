"""Hidden-state inversion: the model that writes the question for a hidden state.

The state becomes soft tokens, which a text model reads instead of words: a T5-family encoder-decoder, or the model
under study itself through a LoRA adapter. What is decoded from the state of a question that the model does not know is
a question like it (KA2L, arXiv 2603.17566; the inversion is vec2text's base step, Morris et al. 2023, arXiv
2310.06816).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ka2l.decoder.config import SMALL, DecoderConfig
from ka2l.errors import ModelError, first_line

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_IGNORED = -100


class Inverter(nn.Module):
    """Soft tokens from a state, and a text model that reads them.

    Args:
        text_model: an encoder-decoder, which reads soft tokens in its encoder, or a causal model, which goes on from
            them.
        width: of the states, D.
        num_soft_tokens: S.
        noise: standard deviation of the noise on training states, in units of the layer's own.
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, text_model: PreTrainedModel, width: int, num_soft_tokens: int, noise: float = 0.0) -> None:
        super().__init__()
        self.text_model = text_model
        self.noise = noise
        self.is_causal = not text_model.config.is_encoder_decoder
        embedding = text_model.get_input_embeddings()
        weight: torch.Tensor = embedding.weight  # type: ignore[assignment]
        self._hidden = int(weight.shape[1])
        self.project = nn.Sequential(
            nn.Linear(width, 2 * self._hidden),
            nn.GELU(),
            nn.Linear(2 * self._hidden, num_soft_tokens * self._hidden),
        )
        # A pre-trained model expects inputs of the size of its own embeddings.
        self.scale = nn.Parameter(weight.detach().float().std().reshape(1).clone())
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def set_spread(self, states: np.ndarray) -> None:
        """Take centre and spread of the layer from training states, shape (N, D)."""
        self.mean.copy_(torch.from_numpy(states.mean(axis=0)))
        self.spread.copy_(torch.from_numpy(states.std(axis=0)).clamp_min(1e-6))

    def soft_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, S, hidden size of the text model)."""
        standardised = (states.float() - self.mean) / self.spread
        if self.training and self.noise:
            standardised = standardised + self.noise * torch.randn_like(standardised)
        tokens = nn.functional.layer_norm(
            self.project(standardised).view(len(states), -1, self._hidden), (self._hidden,)
        )
        return (tokens * self.scale).to(self.text_model.dtype)

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of questions given states.

        Args:
            states: shape (B, D).
            labels: token ids of the questions with their end token, -100 for padding, shape (B, T).
        """
        soft = self.soft_tokens(states)
        if not self.is_causal:
            return {"loss": self.text_model(inputs_embeds=soft, labels=labels).loss}
        words = self.text_model.get_input_embeddings()(labels.clamp_min(0))
        ignored = torch.full(soft.shape[:2], _IGNORED, device=labels.device, dtype=labels.dtype)
        inputs = torch.cat([soft, words.to(soft.dtype)], dim=1)
        return {"loss": self.text_model(inputs_embeds=inputs, labels=torch.cat([ignored, labels], dim=1)).loss}

    @torch.inference_mode()
    def generate(self, states: torch.Tensor, max_tokens: int, temperature: float | None = None) -> torch.Tensor:
        """Token ids of one question a state, shape (B, at most ``max_tokens``); greedy without a temperature."""
        soft = self.soft_tokens(states)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature is not None:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        mask = torch.ones(soft.shape[:2], dtype=torch.long, device=soft.device)
        ids: torch.Tensor = self.text_model.generate(  # type: ignore[operator]
            inputs_embeds=soft, attention_mask=mask, max_new_tokens=max_tokens, **sampling
        )
        return ids


class Decoder:
    """A trained inverter with its tokenizer: states in, questions out."""

    def __init__(self, inverter: Inverter, tokenizer: PreTrainedTokenizerBase, config: DecoderConfig) -> None:
        self.inverter = inverter
        self.tokenizer = tokenizer
        self.config = config

    def decode(
        self, states: np.ndarray, seed: int, temperature: float | None = None, batch_size: int = 256
    ) -> list[str]:
        """One question a state, shape (N, D); empty where none came to its end within ``max_tokens``.

        The same states in the same order with the same seed give the same questions.
        """
        self.inverter.eval()
        device = self.inverter.mean.device
        texts: list[str] = []
        torch.manual_seed(seed)
        end = self.tokenizer.eos_token_id
        for start in range(0, len(states), batch_size):
            batch = torch.from_numpy(states[start : start + batch_size]).to(device)
            for ids in self.inverter.generate(batch, self.config.max_tokens, temperature).tolist():
                # The first token of an encoder-decoder's answer may be the end token: that is where it starts from.
                body = ids if self.inverter.is_causal else ids[1:]
                ended = end in body
                kept = body[: body.index(end)] if ended else []
                texts.append(str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip())
        return texts


def question_token_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """A question's tokens and the end token, without any other special token."""
    return [*tokenizer(question, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def new_inverter(
    config: DecoderConfig, model_path: str, width: int, *, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[Inverter, PreTrainedTokenizerBase]:
    """An untrained inverter for states of ``width`` and the tokenizer of its questions.

    Args:
        model_path: the model under study.

    Raises:
        ModelError: a model or tokenizer cannot be loaded, or ``decoder.model`` is no encoder-decoder.
    """
    from ka2l.model.adapter import AdapterConfig, load_model, load_tokenizer, new_adapter

    if config.kind == "self_inversion":
        base = load_model(model_path, trust_remote_code, dtype)
        text_model = new_adapter(base, AdapterConfig(r=32, alpha=64))
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        return Inverter(text_model, width, config.num_soft_tokens, config.training_noise), tokenizer  # type: ignore[arg-type]
    if config.model == SMALL:
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        return Inverter(_small_model(tokenizer), width, config.num_soft_tokens, config.training_noise), tokenizer
    tokenizer = load_tokenizer(config.model)
    return Inverter(_load_seq2seq(config.model), width, config.num_soft_tokens, config.training_noise), tokenizer


def _small_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,  # type: ignore[call-arg]
        )
    )


def _load_seq2seq(path: str) -> PreTrainedModel:
    from transformers import AutoModelForSeq2SeqLM

    try:
        return AutoModelForSeq2SeqLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"decoder.model {path} cannot be loaded as an encoder-decoder: {first_line(error)}",
            hint="Name a T5-family directory or hub id, such as google-t5/t5-base, or small.",
        ) from error
