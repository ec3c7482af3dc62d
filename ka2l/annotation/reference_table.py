"""A table of questions with answers, searched by text or by the nearest text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ka2l.errors import AnnotationError
from ka2l.pool.rows import normalise_question
from ka2l.pool.sources import find_pieces, read_piece


class ReferenceTable:
    """Answers by question text.

    Args:
        answers: question -> accepted answers.
        min_similarity: of the nearest question, where the text itself is not there: cosine of character n-grams
            weighted by tf-idf, 0 to 1; 1 for exact matches only.
    """

    def __init__(self, answers: Mapping[str, list[str]], min_similarity: float = 1.0) -> None:
        self._answers = {normalise_question(question): list(given) for question, given in answers.items()}
        self._min_similarity = min_similarity
        self._index: tuple[Any, Any, list[str]] | None = None

    def look_up(self, questions: Mapping[str, str]) -> dict[str, list[str]]:
        """Answers of the questions (id -> text) that are there, or are near enough to one that is, by id."""
        texts = {name: normalise_question(text) for name, text in questions.items()}
        found = {name: self._answers[text] for name, text in texts.items() if text in self._answers}
        rest = {name: text for name, text in texts.items() if name not in found}
        if rest and self._min_similarity < 1.0:
            found |= self._nearest(rest)
        return found

    def _nearest(self, texts: Mapping[str, str]) -> dict[str, list[str]]:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import NearestNeighbors

        if self._index is None:
            vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
            known = list(self._answers)
            neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectorizer.fit_transform(known))
            self._index = vectorizer, neighbours, known
        vectorizer, neighbours, known = self._index
        distances, rows = neighbours.kneighbors(vectorizer.transform(texts.values()))
        return {
            name: self._answers[known[row]]
            for name, distance, row in zip(texts, distances[:, 0], rows[:, 0], strict=True)
            if 1.0 - distance >= self._min_similarity
        }


def read_reference_table(path: str, min_similarity: float = 1.0) -> ReferenceTable:
    """A table from JSON Lines or Parquet with columns ``question`` and ``answers`` (a list, or one text).

    Raises:
        PoolError: the file cannot be read or lacks a column.
        AnnotationError: it holds no question with an answer.
    """
    answers: dict[str, list[str]] = {}
    for piece in find_pieces(path, ("question", "answers")):
        for _, row in read_piece(piece):
            if isinstance(row, Mapping) and isinstance(row.get("question"), str) and row.get("answers"):
                given = row["answers"]
                answers[row["question"]] = [given] if isinstance(given, str) else [str(text) for text in given]
    if not answers:
        raise AnnotationError(
            f"annotator.reference_table {path} holds no question with an answer",
            hint="Give rows of question and answers.",
        )
    return ReferenceTable(answers, min_similarity)
