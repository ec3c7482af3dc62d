"""What hosts of forward passes make of a shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.extractor import QuestionPerplexityHost
from ka2l.adapter import load_tokenizer
from ka2l.perplexity import PerplexityScorer, question_tokens
from ka2l.prompts import PromptConfig, Prompter
from ka2l.records import PERPLEXITY

QUESTIONS = pa.table(
    {
        "question_id": ["s", "a", "e", "b"],
        "question": ["Who?", "What is the capital of Peru?", "When?", "zqx zqx zqx?"],
        "split": ["seed", "candidate", "eval", "candidate"],
    }
)


def test_the_wording_of_candidates_alone_is_measured_in_nats_a_token(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("qwen2.5"))
    prompter = Prompter(load_tokenizer(path), PromptConfig())
    host = QuestionPerplexityHost(PerplexityScorer(path, "float32"), prompter)
    table, stats = host.process({"questions": QUESTIONS})
    assert table.schema.equals(PERPLEXITY)
    assert table["question_id"].to_pylist() == ["a", "b"]
    texts = [question_tokens(prompter, QUESTIONS["question"][row].as_py()) for row in (1, 3)]
    expected = np.log(PerplexityScorer(path, "float32").perplexities(texts))
    np.testing.assert_allclose(table["perplexity"].to_numpy(), expected, rtol=1e-5)
    assert stats["forward_passes"] == 2
    assert stats["tokens_prompt"] == sum(len(text.token_ids) for text in texts)


def test_a_shard_without_candidates_makes_an_empty_table(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("qwen2.5"))
    host = QuestionPerplexityHost(PerplexityScorer(path, "float32"), Prompter(load_tokenizer(path), PromptConfig()))
    table, stats = host.process({"questions": QUESTIONS.slice(0, 1)})
    assert (table.num_rows, stats["forward_passes"]) == (0, 0)
