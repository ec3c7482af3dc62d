"""METEOR, ROUGE-L and BERTScore of answers against references, by the libraries that define them (extra ``metrics``).

Each gives one value from 0 to 1 an answer (BERTScore may fall below 0), the best over its references; an empty answer
has 0. All three compare wording: they do not see whether an answer is true. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ka2l.errors import ConfigError, ModelError
from ka2l.model.loading import encoder_max_length

if TYPE_CHECKING:
    import torch

_WORD = re.compile(r"\w+")


class TextScores(NamedTuple):
    """One metric of some answers."""

    values: list[float]
    """One an answer, in order."""
    how: str
    """Which version of the metric it is: what differs between machines or settings."""


def meteor(answers: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """METEOR (Lavie and Agarwal 2007, aclanthology W07-0734) by NLTK, with its parameters 0.9, 3 and 0.5.

    Words match when they or their stems are equal and, where NLTK's WordNet data is on this machine, when they are
    synonyms; ``how`` says which. Without synonyms values are lower: compare only values of the same ``how``.

    Args:
        answers: shape (n,).
        references: accepted answers of each, shape (n, at least 1).

    Raises:
        ConfigError: nltk is not installed.
    """
    try:
        from nltk.corpus import wordnet
        from nltk.tokenize import wordpunct_tokenize
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise _missing("meteor", "nltk") from error
    try:
        wordnet.ensure_loaded()
        synonyms, how = wordnet, "exact, stems, WordNet synonyms"
    except LookupError:
        synonyms, how = SimpleNamespace(synsets=lambda word: []), "exact, stems; no WordNet data here"
    words = [
        (wordpunct_tokenize(answer), [wordpunct_tokenize(reference) for reference in accepted])
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return TextScores([float(meteor_score(accepted, said, wordnet=synonyms)) for said, accepted in words], how)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """ROUGE-L (Lin 2004, aclanthology W04-1013) by rouge-score: F1 of the longest common subsequence of stemmed words.

    Words are those of any script, where rouge-score's own tokenizer knows ASCII alone; for ASCII they are the same.

    Args:
        answers: shape (n,).
        references: accepted answers of each, shape (n, at least 1).

    Raises:
        ConfigError: rouge-score is not installed.
    """
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge_l", "rouge-score") from error
    stemmer = PorterStemmer()

    def tokenize(text: str) -> list[str]:
        words = [word for part in _WORD.findall(text.lower()) for word in part.split("_") if word]
        return [stemmer.stem(word) if len(word) > 3 else word for word in words]

    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokenize))
    values = [
        float(scorer.score_multi(list(accepted), answer)["rougeL"].fmeasure)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return TextScores(values, "F1, Porter stems")


def bert_score(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    encoder: str,
    layer: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> TextScores:
    """BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675) by bert-score, with any encoder: no idf weights, no rescaling.

    Values of different encoders or layers have different ranges, and even unrelated texts score high: only differences
    under the same ``how`` say something.

    Args:
        answers: shape (n,).
        references: accepted answers of each, shape (n, at least 1).
        encoder: directory (or hub id, where a hub can be reached) of a transformers model and its tokenizer.
        layer: whose hidden states are compared, 1 to the number of layers; None takes what the paper found best for a
            model of the directory's name, else the last one.
        batch_size: texts in one forward pass.
        device: torch device.

    Raises:
        ConfigError: bert-score is not installed, or the encoder has no such layer.
        ModelError: the encoder cannot be loaded.
    """
    try:
        from bert_score.utils import bert_cos_score_idf, model2layers
    except ImportError as error:
        raise _missing("bert_score", "bert-score") from error
    tokenizer, model = _load_encoder(encoder)
    num_layers = model.config.num_hidden_layers
    name = Path(encoder).name
    layer = min(model2layers.get(name, num_layers), num_layers) if layer is None else layer
    if not 0 < layer <= num_layers:
        raise ConfigError(
            f"the encoder {name} has layers 1 to {num_layers}, not {layer}", hint="Correct evaluation.encoder_layer."
        )
    weights: defaultdict[Any, float] = defaultdict(lambda: 1.0)
    # What stands around every text says nothing of it: [CLS] and [SEP] of BERT, <s> and </s> of others.
    around = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    weights |= {getattr(tokenizer, name): 0.0 for name in around}
    pairs = [
        (index, answer, reference)
        for index, (answer, accepted) in enumerate(zip(answers, references, strict=True))
        for reference in accepted
        if answer.strip() and reference.strip()
    ]
    values = [0.0] * len(answers)
    if pairs:
        owners, said, accepted_texts = (list(column) for column in zip(*pairs, strict=True))
        states = _layer_of(model, layer).to(device).eval()
        made = bert_cos_score_idf(
            states, accepted_texts, said, tokenizer, weights, device=device, batch_size=batch_size
        )
        best: dict[int, float] = {}
        for owner, value in zip(owners, made[:, 2].tolist(), strict=True):
            best[owner] = max(value, best.get(owner, value))
        for owner, value in best.items():
            values[owner] = value
    return TextScores(values, f"F1, {name}, layer {layer}")


def _load_encoder(encoder: str) -> tuple[Any, Any]:
    """Tokenizer and encoder of a directory or hub id; raises ModelError."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the encoder {encoder!r}: {error}", hint="Check evaluation.encoder.") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer.model_max_length = encoder_max_length(tokenizer, model.config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer, model


def _layer_of(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The model as bert-score wants it: hidden states of one layer, shape (texts, tokens, width)."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            made = self.model(ids, attention_mask=attention_mask, output_hidden_states=True)
            return (made.hidden_states[layer].float(),)

    return Layer()


def _missing(metric: str, package: str) -> ConfigError:
    return ConfigError(f"evaluation.text {metric} needs the package {package}", hint="pip install 'ka2l[metrics]'")
