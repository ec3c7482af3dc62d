"""Hosts hidden-state extraction: questions in, pooled states out."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from actors.host import Stats
from ka2l.hidden_states import ExtractionConfig, HiddenStateExtractor, UnusableRowsError
from ka2l.prompts import Prompter
from ka2l.records import hidden_states_schema


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
            states = self.extractor.extract(prompts)
        except UnusableRowsError as error:
            states = error.states
            usable[list(error.reasons)] = False
        seconds = time.perf_counter() - start
        kept = questions.filter(pa.array(usable))
        schema = hidden_states_schema(self.extractor.layers, self.extractor.width, self.config.storage_dtype)
        flat = pa.array(np.ascontiguousarray(states[usable]).reshape(-1), type=schema.field("states").type.value_type)
        table = pa.table(
            {
                "question_id": kept["question_id"],
                "split": kept["split"],
                "states": pa.FixedSizeListArray.from_arrays(flat, schema.field("states").type.list_size),
            },
            schema=schema,
        )
        stats = {
            "forward_seconds": seconds,
            "forward_passes": float(table.num_rows),
            "num_batches": float(self.extractor.num_forward_passes - passes),
            "tokens_prompt": float(self.extractor.num_tokens - tokens),
            "num_rejected": float(questions.num_rows - table.num_rows),
        }
        return table, stats
