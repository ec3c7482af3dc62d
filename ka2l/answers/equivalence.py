"""Decides whether two answers to a question mean the same: by rules, an NLI model, embeddings or a judge.

An equivalence need be neither symmetric nor transitive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field, model_validator

from ka2l.answers.lexical import answer_marks, same_answer
from ka2l.answers.normalise import surface_key
from ka2l.errors import ConfigError, EngineError, ModelError
from ka2l.model.loading import encoder_max_length
from ka2l.section import Section

if TYPE_CHECKING:
    import numpy as np


class EquivalenceConfig(Section):
    """How answers are compared, for clustering samples and for grading answers against references."""

    KINDS: ClassVar[tuple[str, ...]] = ("lexical", "nli", "embedding", "judge")
    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"batch_size", "device", "gpus", "endpoint", "api_key_env"})

    kind: str = "lexical"
    """``lexical``: words, numbers and dates, needs no model. ``nli``: each answer entails the other. ``embedding``:
    cosine of sentence embeddings. ``judge``: a language model says yes or no."""
    model: str | None = None
    """Directory or hub id of the NLI or sentence-embedding model, or the judge's model name. Unused by ``lexical``."""
    threshold: float = Field(default=0.8, ge=-1.0, le=1.0)
    """``embedding`` only: the smallest cosine that counts as the same."""
    batch_size: int = Field(default=64, ge=1)
    """Texts or pairs in one forward pass."""
    device: str = "auto"
    """``auto`` takes a GPU where there is one; otherwise a torch device such as ``cpu`` or ``cuda:0``."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of the worker that compares answers. The cells of a benchmark share one such worker."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along."""
    endpoint: str | None = None
    """``judge`` only: base URL of an OpenAI-compatible server, such as ``http://localhost:8000/v1``. Where null, the
    model is a directory or hub id that vLLM loads here."""
    api_key_env: str | None = None
    """``judge`` only: name of the environment variable that holds the server's key."""

    @model_validator(mode="after")
    def _model_is_named(self) -> EquivalenceConfig:
        if self.kind in ("nli", "embedding", "judge") and not self.model:
            raise ValueError(f"kind {self.kind!r} needs `model`")
        return self


class Equivalence(Protocol):
    """Decides pairs of answers in one batch.

    One that can tell answers apart without comparing them may also have ``marks(answer)``, a set: answers of one
    question without a common mark are then not compared.
    """

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """Whether ``left[i]`` and ``right[i]`` mean the same as answers to ``questions[i]``; all of one length."""
        ...


class LexicalEquivalence:
    """Same words, numbers and dates up to spelling and added detail; see :func:`ka2l.answers.lexical.same_answer`."""

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See :class:`Equivalence`."""
        return [same_answer(q, a, b) for q, a, b in zip(questions, left, right, strict=True)]

    def marks(self, answer: str) -> frozenset[tuple[str, object]]:
        """See :func:`ka2l.answers.lexical.answer_marks`."""
        return answer_marks(answer)


class NLIEquivalence:
    """Each answer entails the other in the context of the question, by an NLI classifier; strict both ways."""

    def __init__(self, model: str, batch_size: int = 64, device: str = "auto", trust_remote_code: bool = False) -> None:
        """Loads any sequence classifier trained on natural language inference.

        Raises:
            ModelError: the model cannot be loaded, or its config does not say which label is entailment.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._device = _resolve_device(device)
        dtype: Any = torch.float32 if self._device == "cpu" else "auto"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            loaded = AutoModelForSequenceClassification.from_pretrained(
                model, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the NLI model {model!r}: {error}", hint="check equivalence.model") from error
        self._entailment = entailment_label(loaded.config, model)
        self._model = loaded.to(self._device).eval()
        self._batch_size = batch_size
        self._max_length = encoder_max_length(self._tokenizer, loaded.config)

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See :class:`Equivalence`."""
        return _ask_open_pairs(questions, left, right, self._decide)

    def _decide(self, triples: list[tuple[str, str, str]]) -> list[bool]:
        return entail_each_other(triples, self._entails)

    def _entails(self, pairs: list[tuple[str, str]]) -> list[bool]:
        import torch

        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
        verdicts = [False] * len(pairs)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [pairs[i][0] for i in rows],
                [pairs[i][1] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                labels = self._model(**batch).logits.argmax(dim=-1).tolist()
            for row, label in zip(rows, labels, strict=True):
                verdicts[row] = label == self._entailment
        return verdicts


def entail_each_other(
    triples: Sequence[tuple[str, str, str]], entails: Callable[[list[tuple[str, str]]], list[bool]]
) -> list[bool]:
    """Whether the two answers of each (question, answer, answer) entail each other in the question's context.

    One direction is asked first, the other only where the first holds: a model call saved for every pair that differs.
    First goes the shorter text as premise, since what says less seldom entails what says more.

    Args:
        triples: the pairs with their questions.
        entails: for each (premise, hypothesis), whether the one entails the other; called at most twice, with
            distinct pairs.
    """
    texts = [(f"{question} {a}", f"{question} {b}") for question, a, b in triples]
    first = [(a, b) if len(a) <= len(b) else (b, a) for a, b in texts]
    asked = list(dict.fromkeys(first))
    held = dict(zip(asked, entails(asked), strict=True))
    open_pairs = [pair for pair in dict.fromkeys((b, a) for a, b in first if held[a, b]) if pair not in held]
    if open_pairs:
        held.update(zip(open_pairs, entails(open_pairs), strict=True))
    return [held[a, b] and held[b, a] for a, b in first]


def entailment_label(config: Any, model: str) -> int:
    """The index of the entailment logit, as the model's own config names it.

    Args:
        config: a transformers config with ``id2label`` and ``label2id``.
        model: what to call the model in the error.

    Raises:
        ModelError: no label, or more than one, is called entailment.
    """
    names = {int(i): str(name).lower() for i, name in (config.id2label or {}).items()}
    found = {i for i, name in names.items() if name.startswith("entail")}
    if not found:
        found = {int(i) for name, i in (config.label2id or {}).items() if str(name).lower().startswith("entail")}
    if len(found) != 1:
        raise ModelError(
            f"the config of {model!r} does not say which label is entailment; its labels are {sorted(names.values())}",
            hint='use a model trained on NLI, or name its labels in config.json: "id2label": {"0": "entailment", ...}',
        )
    return found.pop()


class EmbeddingEquivalence:
    """Cosine of the two answers' sentence embeddings at or above a threshold. The question plays no part."""

    _CACHE_SIZE = 50_000

    def __init__(
        self,
        model: str,
        threshold: float = 0.8,
        batch_size: int = 64,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Loads a sentence-transformers model.

        Raises:
            ConfigError: the package sentence-transformers is not installed.
            ModelError: the model cannot be loaded.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                "equivalence.kind embedding needs the package sentence-transformers",
                hint="pip install 'ka2l[embedding]'",
            ) from error
        try:
            self._model = SentenceTransformer(
                model, device=_resolve_device(device), trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load the sentence-embedding model {model!r}: {error}", hint="check equivalence.model"
            ) from error
        self._threshold = threshold
        self._batch_size = batch_size
        self._cache: dict[str, np.ndarray] = {}

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See :class:`Equivalence`."""
        return _ask_open_pairs(questions, left, right, self._decide)

    def _decide(self, triples: list[tuple[str, str, str]]) -> list[bool]:
        vectors = self._embed(list(dict.fromkeys(text for _, a, b in triples for text in (a, b))))
        return [bool(vectors[a] @ vectors[b] >= self._threshold) for _, a, b in triples]

    def _embed(self, texts: list[str]) -> dict[str, np.ndarray]:
        missing = [t for t in texts if t not in self._cache]
        if len(self._cache) + len(missing) > self._CACHE_SIZE:
            self._cache, missing = {}, texts
        if missing:
            encoded = self._model.encode(
                missing,
                batch_size=self._batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            self._cache.update(zip(missing, encoded, strict=True))
        return self._cache


class JudgeEquivalence:
    """A language model says whether the answers mean the same. Only a clear yes counts as one."""

    def __init__(self, ask: Callable[[list[str]], list[str]]) -> None:
        """Takes the judge as a function from prompts to replies, in order.

        Attributes:
            num_unparsed: replies so far that were neither yes nor no; they count as not equivalent.
        """
        self._ask = ask
        self.num_unparsed = 0

    def equivalent(self, questions: Sequence[str], left: Sequence[str], right: Sequence[str]) -> list[bool]:
        """See :class:`Equivalence`.

        Raises:
            EngineError: the judge gave another number of replies than it was asked prompts.
        """
        return _ask_open_pairs(questions, left, right, self._decide)

    def _decide(self, triples: list[tuple[str, str, str]]) -> list[bool]:
        replies = self._ask([judge_prompt(*triple) for triple in triples])
        if len(replies) != len(triples):
            raise EngineError(f"the judge gave {len(replies)} replies to {len(triples)} prompts")
        verdicts = [parse_verdict(reply) for reply in replies]
        self.num_unparsed += verdicts.count(None)
        return [verdict is True for verdict in verdicts]


def judge_prompt(question: str, left: str, right: str) -> str:
    """The prompt that asks a language model to compare two answers."""
    return (
        "Two answers to the same question are given. Decide whether they mean the same: each must follow from the "
        "other in the context of the question. Another wording is fine; another person, place, number or date is "
        "not.\n\n"
        f"Question: {question}\nAnswer 1: {left}\nAnswer 2: {right}\n\n"
        "Do the two answers mean the same? Reply with one word, yes or no."
    )


def parse_verdict(reply: str) -> bool | None:
    """True for a reply whose first word is yes, False for no, None for anything else (``Yes/no``, ``Not sure``)."""
    first = next(iter(reply.split()), "").strip("*_`'\"“”‘’.,;:!?()[]").lower()
    return {"yes": True, "no": False}.get(first)


def _resolve_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ask_open_pairs(
    questions: Sequence[str],
    left: Sequence[str],
    right: Sequence[str],
    decide: Callable[[list[tuple[str, str, str]]], list[bool]],
) -> list[bool]:
    """Settles pairs that need no model (same text, an empty answer) and asks each other distinct pair once."""
    triples = list(zip(questions, left, right, strict=True))
    same = [surface_key(a) == surface_key(b) for _, a, b in triples]
    asked = dict.fromkeys(
        t for t, equal in zip(triples, same, strict=True) if not equal and surface_key(t[1]) and surface_key(t[2])
    )
    verdicts = dict(zip(asked, decide(list(asked)), strict=True)) if asked else {}
    return [equal or verdicts.get(t, False) for t, equal in zip(triples, same, strict=True)]
