"""The config section of the decoder, apart from the models, so that reading a config loads no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ka2l.section import Section

#: ``decoder.model`` of the encoder-decoder that is trained from scratch.
SMALL = "small"


class DecoderConfig(Section):
    """Turning the hidden states of unknown questions into new questions."""

    KINDS: ClassVar[tuple[str, ...]] = ("none", "inversion", "self_inversion")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"corpus", "cpus_per_worker", "gpus_per_worker"})

    kind: str = "none"
    """``none``: annotate questions of the pool only; ``inversion``: an encoder-decoder reads the state;
    ``self_inversion``: the model under study reads it, through a LoRA adapter, so that no second model is needed."""
    model: str = SMALL
    """For ``inversion``: a T5-family directory or hub id, or ``small``: two layers each way, trained from scratch with
    the tokenizer of the model under study."""
    corpus: str | None = None
    """File of further questions to train on, without answers: JSON Lines or Parquet with a column ``question``; the
    pool's candidates are always trained on. On the testbed its crowd's questions, where none is named."""
    num_corpus: int = Field(20_000, ge=0)
    """Questions of the corpus that are used, at most."""
    share: float = Field(0.25, gt=0, le=1)
    """Of each round's annotations, this share goes to decoded questions, as far as enough pass the gates."""
    num_soft_tokens: int = Field(8, ge=1)
    """Soft tokens that a state becomes."""
    num_sampled: int = Field(1, ge=0)
    """Questions sampled from each unknown state as it is."""
    num_noised: int = Field(3, ge=0)
    """Questions decoded from each unknown state with noise added."""
    num_interpolated: int = Field(1, ge=0)
    """Questions decoded from between each unknown state and a neighbouring one."""
    noise: float | None = Field(None, ge=0)
    """Standard deviation of the noise, in units of the layer's own in each dimension. Not given: with every fit, the
    least at which nine of ten held-out states no longer give back their own question."""
    temperature: float = Field(0.7, gt=0)
    """Of sampling."""
    max_tokens: int = Field(64, ge=4)
    """Longest question, tokens; longer ones of the corpus are left out."""
    max_similarity: float = Field(0.99, gt=0, le=1)
    """A decoded question whose state is closer to that of another question, by cosine, counts as that question."""
    training_noise: float = Field(0.15, ge=0)
    """Noise on the states in training, in the same units: against learning them by heart."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak of the one-cycle schedule (AdamW). For a T5 that is trained already 2e-4, from scratch about 0.01."""
    matrix_learning_rate: float = Field(0.01, gt=0)
    """Peak of the one-cycle schedule for the matrices that start from nothing (Muon)."""
    num_epochs: float = Field(8.0, gt=0)
    """Passes over the training pairs."""
    refit_epochs: float = Field(2.0, gt=0)
    """Passes when the decoder is fitted again because tuning has moved the states; it goes on from the last fit."""
    batch_size: int = Field(128, ge=1)
    """Pairs a training step."""
    min_cosine: float = Field(0.95, ge=-1, le=1)
    """Fit again where the mean cosine of states now and at the last fit is lower."""
    max_auroc_drop: float = Field(0.05, ge=0)
    """Fit again where the AUROC of the last fit's probe on the states of now has dropped by more."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPU cores Ray sets aside."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs Ray sets aside."""
