"""The tables that stages hand to each other: one Arrow schema a table, every field with its meaning and unit.

``question_id`` is the join key everywhere. Rows are found by it, never by prompt text or by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1

#: The three disjoint parts of a pool. ``seed`` questions are sampled to fit the probe, ``candidate`` questions may be
#: annotated and tuned on, ``eval`` questions only measure.
SPLITS = ("seed", "candidate", "eval")

#: Why an answer was generated: to fit the probe, to measure accuracy, as the model's own label for rehearsal, or to see
#: how far the answers to an eval question agree.
PURPOSES = ("probe", "eval", "rehearsal", "agreement")

#: The parts of the seed questions. Threshold and weights see ``train``; layer choice, early stopping and calibration
#: see ``validation``; reported figures come from ``test`` alone.
PROBE_SPLITS = ("train", "validation", "test")

#: What is kept of the distribution of the first answer token: its entropy, the likeliest token's log-probability, and
#: by how much that is ahead of the second's. All nats.
NEXT_TOKEN = ("entropy", "max_logprob", "margin")


def _field(name: str, type_: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


_ID = _field("question_id", pa.string(), "join key, unique in the pool")

#: The pool without its answers: all that the loop may look at.
QUESTIONS = pa.schema(
    [
        _ID,
        _field("question", pa.string(), "as the user wrote it, stripped"),
        _field("split", pa.string(), "one of SPLITS"),
        _field("group", pa.string(), "rows that belong together, e.g. one subject; splits respect it", True),
        _field("fact", pa.string(), "rows sharing it are paraphrases of one question", True),
        _field("metadata", pa.string(), "all other columns of the row, as a JSON object"),
    ]
)

#: The pool's answers, kept apart: opened by the annotator for selected rows and by grading for eval rows.
REFERENCES = pa.schema([_ID, _field("answers", pa.list_(pa.string()), "accepted answers, the first is the preferred")])

#: Rows of the source that cannot be used.
QUARANTINE = pa.schema(
    [
        _field("source", pa.string(), "file or data set the row came from"),
        _field("row", pa.int64(), "position of the row in the source, from 0"),
        _field("reason", pa.string(), "empty | duplicate | over_long | malformed | ..., then a colon and details"),
        _field("content", pa.string(), "the row as JSON, cut at 2,000 characters"),
    ]
)

#: One generated answer a row.
SAMPLES = pa.schema(
    [
        _ID,
        _field("purpose", pa.string(), "one of PURPOSES"),
        _field("sample_index", pa.int32(), "0..n-1 within (question, purpose)"),
        _field("answer", pa.string(), "stripped text up to the stop string"),
        _field("logprob", pa.float32(), "sum of the answer's token log-probabilities, nats"),
        _field("num_tokens", pa.int32(), "generated tokens, stop token included"),
        _field("num_prompt_tokens", pa.int32(), "prompt tokens"),
        _field("finish_reason", pa.string(), "stop | length | rejected (prompt too long)"),
    ]
)

#: One question a row: its answers grouped by meaning (several samples) or graded (``eval``).
CLUSTERS = pa.schema(
    [
        _ID,
        _field("purpose", pa.string(), "one of PURPOSES"),
        _field("semantic_ids", pa.list_(pa.int32()), "cluster of each sample, shape (num_samples,), ids from 0"),
        _field("num_clusters", pa.int32(), "distinct clusters"),
        _field("semantic_entropy", pa.float32(), "discrete semantic entropy, nats"),
        _field("weighted_semantic_entropy", pa.float32(), "likelihood-weighted semantic entropy, nats"),
        _field("predictive_entropy", pa.float32(), "minus the mean sequence log-probability, nats"),
        _field("disagreement", pa.float32(), "probability of another meaning than the likeliest; null for one", True),
        _field("top_answer", pa.string(), "representative of the largest cluster; the greedy answer for eval"),
        _field("correct", pa.bool_(), "top_answer is equivalent to an accepted one; null where none is revealed", True),
        _field("exact_match", pa.bool_(), "normalised text equals a reference; null as above", True),
        _field("token_f1", pa.float32(), "best token F1 against a reference; null as above", True),
    ]
)

#: One seed question a row.
LABELS = pa.schema(
    [
        _ID,
        _field("probe_split", pa.string(), "one of PROBE_SPLITS"),
        _field("semantic_entropy", pa.float32(), "nats"),
        _field("unknown", pa.bool_(), "entropy at or above the threshold fitted on the train split"),
        _field("disagreement", pa.float32(), "probability of another meaning than the likeliest; null for one", True),
    ]
)

#: One question of the pool a row: what this model state knows.
KNOWLEDGE = pa.schema(
    [
        _ID,
        _field("split", pa.string(), "one of SPLITS"),
        _field("p_unknown", pa.float32(), "calibrated probability of unknown under this round's model state"),
        _field("logit", pa.float32(), "log-odds of p_unknown"),
        _field("score", pa.float32(), "evidence for unknown over all model states so far; ranks the candidates"),
        _field(
            "p_wrong", pa.float32(), "probability that the base model answers wrongly; null before annotations", True
        ),
        _field("quadrant", pa.string(), "one of correctness.QUADRANTS, for the base model; null as above", True),
        _field("pca_0", pa.float32(), "first principal component of the chosen layer's states"),
        _field("pca_1", pa.float32(), "second principal component"),
    ]
)

#: One eval question a row: figures of this model state's greedy answer; null where not measured.
EVALUATED = pa.schema(
    [
        _ID,
        _field("meteor", pa.float32(), "0 to 1, best over the references", True),
        _field("rouge_l", pa.float32(), "F1, 0 to 1, best over the references", True),
        _field("bert_score", pa.float32(), "F1, best over the references", True),
        _field("num_correct", pa.int32(), "facts of the reference that the answer states", True),
        _field("num_incorrect", pa.int32(), "facts that it states and the reference does not", True),
        _field("num_missing", pa.int32(), "facts of the reference that it does not state", True),
        _field("order", pa.float64(), "share of the pairs of correct facts in the reference's order", True),
        _field(
            "completeness", pa.int8(), "a judge prefers it to the base model's (1), or that one (-1), or none", True
        ),
        _field("factuality", pa.int8(), "as above", True),
        _field("logicality", pa.int8(), "as above", True),
    ]
)

#: One selected question a row, best first.
SELECTION = pa.schema(
    [
        _ID,
        _field("rank", pa.int32(), "0 is selected first"),
        _field("score", pa.float32(), "what the strategy ranked by"),
        _field("strategy", pa.string(), "selection.kind"),
    ]
)

#: One decoded question a row, whatever gate it ended at.
DECODED = pa.schema(
    [
        _field("question_id", pa.string(), "``d-`` and a hash of the normalised question"),
        _field("question", pa.string(), "as it was decoded"),
        _field("parents", pa.list_(pa.string()), "question ids of the unknown questions whose states it was made from"),
        _field("variant", pa.string(), "sampled | noised | interpolated"),
        _field("gate", pa.string(), "the gate that it did not pass; surplus, or kept: it is annotated"),
        _field("similarity", pa.float32(), "largest cosine of its state to another question's; null before", True),
        _field("p_unknown", pa.float32(), "calibrated probability of unknown; null before that gate", True),
    ]
)

#: One answer that was asked for, with its provenance. Only these rows cost annotation.
ANNOTATIONS = pa.schema(
    [
        _ID,
        _field("question", pa.string(), "the question asked"),
        _field("answers", pa.list_(pa.string()), "accepted answers, the first is trained on"),
        _field("annotator", pa.string(), "who answered: reference | a teacher's model name | a person's name"),
        _field("annotated_at", pa.timestamp("ms", tz="UTC"), "when"),
        _field("prompt_sha256", pa.string(), "hash of the prompt a teacher saw; null for others", True),
        _field("cost", pa.float64(), "money, in the currency of the config's price table"),
    ]
)

#: One annotated answer a row, in its atomic facts.
FACTS = pa.schema(
    [
        _ID,
        _field("question", pa.string(), "the question asked"),
        _field("answer", pa.string(), "the annotated answer, the first of those accepted"),
        _field("facts", pa.list_(pa.string()), "atomic facts in the answer's order, distinct"),
    ]
)

#: One answer a row: how hard the model found each of its facts.
DIFFICULTY = pa.schema([_ID, _field("perplexities", pa.list_(pa.float64()), "of each fact, in the order of FACTS")])

#: How hard the model finds the wording of each candidate's question, for ``selection.kind: perplexity``.
PERPLEXITY = pa.schema(
    [
        _ID,
        _field("perplexity", pa.float32(), "mean negative log-likelihood of the question's text, nats a token"),
    ]
)

#: One row that KnowTuning trains on.
PAIRS = pa.schema(
    [
        _ID,
        _field("part", pa.string(), "fine_grained (stage I) or an aspect (stage II): see ka2l.tuning.knowtuning"),
        _field("question", pa.string(), "what is asked: of stage I a question of its own"),
        _field("better", pa.string(), "the answer to learn, or to prefer"),
        _field("worse", pa.string(), "the answer to prefer it to; null in stage I", True),
    ]
)

LEDGER = pa.schema(
    [
        _field("round", pa.int32(), "-1 for the pool"),
        _field("stage", pa.string(), "stage that spent it"),
        _field("item", pa.string(), "see engine.store.ledger; rows of one item add up"),
        _field("quantity", pa.float64(), "how much, in the item's unit"),
        _field("question_id", pa.string(), "for reveals and their money: the question that was answered", True),
        _field("annotator", pa.string(), "for annotating: who answered, as in ANNOTATIONS", True),
    ]
)


def hidden_states_schema(
    layers: Sequence[int], width: int, dtype: str = "float32", *, next_token: bool = False
) -> pa.Schema:
    """Schema of the ``hidden_states`` table.

    Args:
        layers: the layers kept per question, L of them; 0 is the embedding output.
        width: the model's hidden size, D.
        dtype: ``float32`` or ``float16``.
        next_token: with the model's certainty of the first answer token.

    Returns:
        ``question_id``, ``split`` and ``states``: a fixed-size list of L * D values, row-major (L, D). The field's
        metadata ``layers`` names the layers. With ``next_token``, NEXT_TOKEN, too.
    """
    value_type = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    names = ",".join(str(layer) for layer in layers)
    states = pa.field(
        "states",
        pa.list_(value_type, len(layers) * width),
        nullable=False,
        metadata={"doc": "pooled hidden states, row-major (layers, width)", "layers": names},
    )
    fields = [_ID, _field("split", pa.string(), "one of SPLITS"), states]
    if next_token:
        doc = "of the first answer token: entropy, log-probability of the likeliest, margin to the second; nats"
        fields.append(_field("next_token", pa.list_(pa.float32(), len(NEXT_TOKEN)), doc))
    return pa.schema(fields)


def stored_layers(schema: pa.Schema) -> list[int]:
    """Layers that a ``hidden_states`` table of this schema holds."""
    return [int(layer) for layer in schema.field("states").metadata[b"layers"].split(b",")]


def stored_states(table: pa.Table, num_layers: int = 1) -> np.ndarray:
    """States of a ``hidden_states`` table, shape (num_rows, num_layers, D)."""
    values = _matrix(table["states"])
    return values.reshape(len(values), num_layers, values.shape[1] // num_layers)


def stored_next_token(table: pa.Table) -> np.ndarray | None:
    """Certainty of the first answer token of a ``hidden_states`` table, shape (num_rows, 3); None where it has none."""
    if "next_token" not in table.column_names:
        return None
    return _matrix(table["next_token"])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one size as an array, shape (num_rows, size)."""
    rows = column.combine_chunks()
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), rows.type.list_size)


HELD_OUT = "held_out"
"""Source of a row that is only measured on."""


class TrainingRow(NamedTuple):
    """One row to tune on: loss falls on ``completion`` only."""

    prompt: str
    completion: str
    source: str
    """``annotation``, ``fine_grained``, ``rehearsal`` or ``held_out``."""
    question_id: str
