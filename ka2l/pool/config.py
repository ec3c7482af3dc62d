"""The section ``pool``: which pool, which of its columns, how it is split."""

from __future__ import annotations

from pydantic import Field

from ka2l.section import Section


class ColumnsConfig(Section):
    """Which columns of the source hold what. Every other column is kept as metadata."""

    question: str = "question"
    """The question: a string."""
    answers: str = "answers"
    """Accepted answers: a list of strings or numbers, or a single one; the first is preferred."""
    id: str | None = "id"
    """A unique id. Where the column or a row's value is missing, the id is a hash of question and answers."""
    group: str | None = None
    """Rows that belong together, such as one subject: evaluation questions are drawn as whole groups."""
    fact: str | None = None
    """Rows that are paraphrases of one question. Without ``group``, evaluation questions are whole facts."""
    split: str | None = None
    """seed | candidate | eval for every row, instead of splits drawn by ``seed``."""


class PoolConfig(Section):
    """The question pool: where it is, what its columns mean, how it is split."""

    path: str
    """JSONL or Parquet: a file, a directory, a glob or an fsspec URL; or a Hugging Face dataset id; or ``testbed``."""
    hf_name: str | None = None
    """Configuration of the Hugging Face dataset; None takes the usual one of known datasets."""
    hf_split: str = "train"
    """Split of the Hugging Face dataset to read."""
    columns: ColumnsConfig | None = None
    """Column names; None takes those of known datasets, else ``question``, ``answers`` and ``id``."""
    num_seed: int = Field(default=400, ge=0)
    """Questions that are sampled to fit the probe."""
    num_eval: int = Field(default=500, ge=0)
    """Questions that only measure. With groups, the nearest number that whole groups give."""
    max_question_chars: int = Field(default=2000, ge=1)
    """Longer questions are quarantined."""
    max_answer_chars: int = Field(default=2000, ge=1)
    """Rows with a longer answer are quarantined."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first rows of the source, usable or not; None reads all."""
