"""What hosts of forward passes make of a shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.extractor import ExtractorHost, QuestionPerplexityHost
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.hidden_states import HiddenStateExtractor
from ka2l.knowledge.perplexity import PerplexityScorer, question_tokens
from ka2l.model.adapter import load_tokenizer
from ka2l.prompts import PromptConfig, Prompter
from ka2l.schemas import PERPLEXITY, stored_layers, stored_next_token, stored_states

LONG = "Which of all these rivers, lakes, seas and oceans is the deepest of them all, and where does it end?"
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


def test_states_and_certainty_of_usable_questions_are_one_row_each(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("qwen2.5"))
    prompter = Prompter(load_tokenizer(path), PromptConfig())
    config = ExtractionConfig(layers=[1, 3], max_prompt_tokens=len(prompter.token_ids(LONG)) - 1, device="cpu")
    questions = QUESTIONS.set_column(1, "question", pa.array(["Who?", LONG, "When?", "zqx zqx zqx?"]))
    table, stats = ExtractorHost(HiddenStateExtractor(path, config), prompter, config).process({"questions": questions})
    usable = [0, 2, 3]
    assert table["question_id"].to_pylist() == ["s", "e", "b"]
    assert (stats["num_rejected"], stats["forward_passes"]) == (1, 3)
    alone = [
        HiddenStateExtractor(path, config).extract([prompter.token_ids(questions["question"][row].as_py())])
        for row in usable
    ]
    states, next_token = stored_states(table, 2), stored_next_token(table)
    assert next_token is not None
    assert stored_layers(table.schema) == [1, 3]
    np.testing.assert_allclose(states, np.concatenate([one.states for one in alone]), atol=1e-4)
    np.testing.assert_allclose(next_token, np.concatenate([one.next_token for one in alone]), atol=1e-4)


def test_a_table_without_certainty_says_so(tiny_models: Callable[..., Path]) -> None:
    path = str(tiny_models("qwen2.5"))
    config = ExtractionConfig(layers=[1], next_token=False, device="cpu")
    host = ExtractorHost(HiddenStateExtractor(path, config), Prompter(load_tokenizer(path), PromptConfig()), config)
    table, _ = host.process({"questions": QUESTIONS})
    assert stored_next_token(table) is None
