"""Hosts of the forward pass: questions to pooled hidden states, facts or questions to perplexities."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.host import Stats
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.hidden_states import HiddenStateExtractor, UnusableRowsError
from ka2l.knowledge.perplexity import PerplexityScorer, fact_tokens, question_tokens
from ka2l.prompts import Prompter
from ka2l.schemas import DIFFICULTY, PERPLEXITY, hidden_states_schema


class PerplexityHost:
    """One model on one device, asked how hard it finds facts; one shard a call."""

    def __init__(self, scorer: PerplexityScorer, prompter: Prompter, *, given_question: bool) -> None:
        self.scorer = scorer
        self.prompter = prompter
        self.given_question = given_question

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """From ``questions``, a shard of FACTS, to DIFFICULTY. A fact without a token to score is as easy as can be."""
        rows = tables["questions"].to_pylist()
        tokens, start = self.scorer.num_tokens, time.perf_counter()
        texts = []
        for row in rows:
            prompt = self.prompter.text(row["question"]) if self.given_question else None
            texts += [
                fact_tokens(self.prompter.tokenizer, fact, prompt, chat=self.prompter.is_chat) for fact in row["facts"]
            ]
        found = np.nan_to_num(self.scorer.perplexities(texts), nan=1.0)
        ends = np.cumsum([len(row["facts"]) for row in rows])[:-1]
        made = [
            {"question_id": row["question_id"], "perplexities": values.tolist()}
            for row, values in zip(rows, np.split(found, ends), strict=True)
        ]
        stats = {
            "forward_seconds": time.perf_counter() - start,
            "forward_passes": float(len(texts)),
            "tokens_prompt": float(self.scorer.num_tokens - tokens),
        }
        return pa.Table.from_pylist(made, schema=DIFFICULTY), stats


class QuestionPerplexityHost:
    """One model on one device, asked how hard it finds the wording of questions; one shard a call."""

    def __init__(self, scorer: PerplexityScorer, prompter: Prompter) -> None:
        self.scorer = scorer
        self.prompter = prompter

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """From ``questions`` to PERPLEXITY, candidates alone. A question without a token to score is left out and
        counted as ``num_rejected``."""
        questions = tables["questions"]
        candidates = questions.filter(pc.equal(questions["split"], "candidate"))
        tokens, start = self.scorer.num_tokens, time.perf_counter()
        texts = [question_tokens(self.prompter, question) for question in candidates["question"].to_pylist()]
        found = np.log(self.scorer.perplexities(texts))
        stats = {
            "forward_seconds": time.perf_counter() - start,
            "forward_passes": float(len(texts)),
            "tokens_prompt": float(self.scorer.num_tokens - tokens),
            "num_rejected": float((~np.isfinite(found)).sum()),
        }
        usable = np.isfinite(found)
        ids = candidates["question_id"].filter(pa.array(usable))
        values = pa.array(found[usable], pa.float32())
        return pa.table({"question_id": ids, "perplexity": values}, schema=PERPLEXITY), stats


class ExtractorHost:
    """One model on one device; one shard a call."""

    def __init__(self, extractor: HiddenStateExtractor, prompter: Prompter, config: ExtractionConfig) -> None:
        self.extractor = extractor
        self.prompter = prompter
        self.config = config

    def process(self, tables: Mapping[str, pa.Table]) -> tuple[pa.Table, Stats]:
        """From ``questions`` to ``hidden_states``. Prompts over the limit and states that are not finite are left out
        and counted as ``num_rejected``."""
        questions = tables["questions"]
        prompts = [self.prompter.token_ids(question) for question in questions["question"].to_pylist()]
        passes, tokens = self.extractor.num_forward_passes, self.extractor.num_tokens
        start = time.perf_counter()
        usable = np.ones(len(prompts), dtype=bool)
        try:
            extracted = self.extractor.extract(prompts)
        except UnusableRowsError as error:
            extracted = error.extracted
            usable[list(error.reasons)] = False
        seconds = time.perf_counter() - start
        kept = questions.filter(pa.array(usable))
        schema = hidden_states_schema(
            self.extractor.layers,
            self.extractor.width,
            self.config.storage_dtype,
            next_token=extracted.next_token is not None,
        )
        columns = {"question_id": kept["question_id"], "split": kept["split"]}
        for name, values in extracted._asdict().items():
            if values is not None:
                type_ = schema.field(name).type
                flat = pa.array(np.ascontiguousarray(values[usable]).reshape(-1), type=type_.value_type)
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, type_.list_size)
        table = pa.table(columns, schema=schema)
        stats = {
            "forward_seconds": seconds,
            "forward_passes": float(table.num_rows),
            "num_batches": float(self.extractor.num_forward_passes - passes),
            "tokens_prompt": float(self.extractor.num_tokens - tokens),
            "num_rejected": float(questions.num_rows - table.num_rows),
        }
        return table, stats
