"""The section ``tuning``: how an adapter, or a whole model, is trained each round."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ka2l.model.adapter import AdapterConfig
from ka2l.section import Section
from ka2l.tuning.knowtuning import KnowTuningConfig


class TuningConfig(Section):
    """How an adapter is trained each round."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    KINDS: ClassVar[tuple[str, ...]] = ("sft", "knowtuning")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset(
        {
            "workers",
            "parallel",
            "cpus_per_worker",
            "gpus_per_worker",
            "micro_batch_size",
            "gradient_checkpointing",
            "packing",
            "checkpoint_steps",
        }
    )

    kind: str = "sft"
    """``sft``: supervised fine-tuning, loss on the answer's tokens; ``knowtuning``: the same with the hardest facts of
    each answer, then a comparison of better and worse answers (`ka2l.tuning.knowtuning`), for answers of several
    facts."""
    knowtuning: KnowTuningConfig = KnowTuningConfig()
    """Both stages of ``knowtuning``."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained: an adapter of some kind, or all weights."""
    learning_rate: float = Field(2e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    num_epochs: float = Field(3.0, gt=0.0)
    """Passes over the annotated questions, each with its share of rehearsed rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; replaces ``num_epochs`` where given."""
    batch_size: int = Field(64, ge=1)
    """Rows an optimiser step, over all workers; at most the number of questions."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows a forward pass on one worker; the rest of the batch is accumulated. Default: the whole batch."""
    warmup_ratio: float = Field(0.05, ge=0.0, le=1.0)
    """Share of the steps in which the learning rate rises from zero."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are clipped to this norm."""
    max_length: int = Field(512, ge=2)
    """Tokens of a prompt with its answer. Longer rows are left out and counted, never cut."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype: ``auto`` is bfloat16 on GPUs and CPUs that multiply it themselves, float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter slower."""
    packing: bool = False
    """Lay the rows of a forward pass end to end in one sequence, each seeing itself alone, instead of padding them to
    the longest (TRL's padding-free batches): the same steps for less work where lengths differ. Refused where the
    model's attention cannot keep rows apart."""
    checkpoint_steps: int | None = Field(None, ge=0)
    """Steps between two checkpoints, from which a training that was killed goes on; 0: none. Default: a tenth of the
    steps, 20 at least. With ``holdout`` there is one with each evaluation."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the annotated questions that is not trained on, by a hash of the id, the same in every round: the loss
    on them ends training early, and the state in which it was lowest is kept. 0: trained to the end."""
    patience: int = Field(3, ge=1)
    """Evaluations on what is held out without a lower loss, after which training ends."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations on what is held out. Default: a tenth of the steps."""
    rehearsal: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the candidates without annotation that are rehearsed with the model's own answers; 0: none."""
    rehearsal_ratio: float = Field(1.0, gt=0.0)
    """Rehearsed rows beside each annotated row. Rehearsed questions take turns, so a large pool does not drown the few
    annotated answers of an early round."""
    rehearsal_labels: Literal["samples", "greedy"] = "samples"
    """Own answers to train on: ``samples`` keep the model's uncertainty as it is, ``greedy`` sharpens it."""
    num_rehearsal_samples: int = Field(10, ge=1)
    """Own answers sampled for each rehearsed question."""
    start: Literal["base", "previous"] = Field("base", alias="from")
    """What training starts from: a new adapter on the base model, or the adapter of the round before."""
    workers: int = Field(1, ge=1)
    """Data-parallel workers."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: every worker holds the whole model; ``fsdp``: each holds a part of it (FSDP2), for models that do not
    fit one GPU. GPUs only."""
    cpus_per_worker: float = Field(1.0, ge=0.0)
    """CPUs, and so threads, of a worker."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """GPUs of a worker; 0 trains on the CPU."""

    @property
    def num_own_answers(self) -> int:
        """The base model's own answers to a question that may be rehearsed."""
        if self.rehearsal == 0:
            return 0
        return 1 if self.rehearsal_labels == "greedy" else self.num_rehearsal_samples

    @model_validator(mode="after")
    def _check(self) -> Self:
        adapter = self.adapter
        if adapter.kind == "qlora" and self.gpus_per_worker == 0:
            raise ValueError("adapter.kind qlora holds the base model in 4 bits, which needs gpus_per_worker > 0")
        if self.parallel == "fsdp" and self.gpus_per_worker == 0:
            raise ValueError("parallel fsdp shards a model over GPUs: set gpus_per_worker > 0, or parallel ddp")
        if self.parallel == "fsdp" and (adapter.kind == "qlora" or adapter.is_prompt):
            raise ValueError(f"parallel fsdp cannot shard adapter.kind {adapter.kind}: use ddp, or lora or full")
        if self.packing and adapter.is_prompt:
            raise ValueError(f"packing leaves no place for the virtual tokens of {adapter.kind} before each row")
        if self.gradient_checkpointing and adapter.kind == "prefix":
            raise ValueError("gradient_checkpointing does not go with adapter.kind prefix, whose keys it would drop")
        return self

    @property
    def augments(self) -> bool:
        """Whether annotated answers are taken apart into pairs to train on."""
        return self.kind == "knowtuning" and (self.knowtuning.augment or bool(self.knowtuning.aspects))

    @property
    def compares(self) -> tuple[str, ...]:
        """The aspects in which answers are compared after tuning; empty where tuning is all."""
        return self.knowtuning.aspects if self.kind == "knowtuning" else ()

    def result_fields(self) -> dict[str, Any]:
        """As any section's, less what has no meaning for the kind."""
        fields = super().result_fields()
        if self.kind != "knowtuning":
            del fields["knowtuning"]
        if not self.holdout:
            for name in ("holdout", "patience", "evaluate_steps"):
                del fields[name]
        return fields
