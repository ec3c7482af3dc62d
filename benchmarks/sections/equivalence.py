"""Equivalences against people's verdicts."""

from __future__ import annotations

from typing import Any

from charts import bars
from pages import Section
from tables import figure, interval, percent, table

TITLE = "Grading against people"
COMMAND = "python benchmarks/bench_equivalence.py --verdicts ae_nq301_human.jsonl --published OpenQA-eval/data"
KINDS = {
    "exact_match": "exact match",
    "token_f1": "token F1, threshold chosen",
    "lexical": "lexical",
    "lexical_or_shared_word": "lexical or a shared word that the question does not hold",
    "embedding": "embedding, threshold as configured",
    "embedding_chosen": "embedding, threshold chosen",
    "embedding_question": "embedding with the question, chosen",
    "lexical_or_embedding": "lexical or embedding, chosen",
    "lexical_or_embedding_question": "lexical or embedding with the question, chosen",
    "lexical_and_embedding": "lexical and embedding, chosen",
    "lexical_open_embedding": "lexical; embedding where words leave it open, chosen",
    "lexical_open_embedding_question": "lexical; embedding with the question where words leave it open, chosen",
    "BEM": "BEM (published verdicts)",
    "GPT-4": "GPT-4 (published verdicts)",
}
#: Why what may agree with people more than lexical does is not the default, or how it does so.
_LENIENT = "It takes more wrong answers for right ones, such as one name for another with the same surname."
WHY = {
    "token_f1": _LENIENT,
    "lexical_or_shared_word": _LENIENT,
    "BEM": "It is a model fitted on people's verdicts on answers to other questions.",
    "GPT-4": "It knows right answers that no reference names.",
}


def section(result: dict[str, Any]) -> Section:
    """Accuracy, precision and recall on the held-out half, accuracy on the others."""
    held_out, development, everything = (result["sets"][name] for name in ("held_out", "development", "all"))
    kinds = {kind: name for kind, name in KINDS.items() if kind in held_out["kinds"]}
    rows = []
    for kind, name in kinds.items():
        at = held_out["kinds"][kind]
        others = [figure(part["kinds"][kind]["accuracy"][0]) for part in (development, everything)]
        over = "" if kind == "lexical" else _of(at["over_lexical"], sign=True)
        rows.append([name, *(_of(at[key]) for key in ("accuracy", "precision", "recall")), over, *others])
    accuracy = {kind: held_out["kinds"][kind]["accuracy"][0] for kind in kinds}
    asked = accuracy.get("lexical_open_embedding", accuracy["lexical_or_shared_word"])
    of_embedding = figure(asked - accuracy["lexical_or_shared_word"], sign=True)
    published = " and ".join(f"{value:.3f} for {name}" for name, value in result["published"].items())
    text = f"""How often does an equivalence that asks no judge say what people said? {everything["num_answers"]:,}
answers of systems to {everything["num_questions"]} questions, each judged by people (Kamalloo et al. 2023,
arXiv 2305.06984). The rules of `lexical` were made with an eye on the development half's errors only; the figure is the
held-out half, {held_out["num_answers"]} answers to {held_out["num_questions"]} questions. A half's thresholds are
chosen on the other half, intervals resample questions.

{table(["", "accuracy", "precision", "recall", "over lexical", "development half", "all"], rows)}

Published on all of them: {published}. Of what people accept in the held-out half,
{percent(held_out["unnamed_share"])} shares no word with any reference: no comparison of words can grant that.
Words leave it open where an answer shares a word with a reference that the question does not hold, and no number or
date differs. Saying yes to all of these is the row above the embedding's; asking the embedding about them instead
changes accuracy by {of_embedding}. NLI models and judges were not measured: none come with this project."""
    values = {name: tuple(held_out["kinds"][kind]["accuracy"]) for kind, name in kinds.items()}
    chart = bars("Agreement with people on the held-out half", "accuracy", values)
    return Section(text, {"accuracy": chart}, losses(result))


def _of(values: list[float], sign: bool = False) -> str:
    return interval(values[0], values[1:], sign=sign)


def losses(result: dict[str, Any]) -> list[str]:
    """What agrees with people more than the default does."""
    held_out = result["sets"]["held_out"]
    found = held_out["kinds"]
    default = found["lexical"]["accuracy"][0]
    losing = []
    for kind, at in found.items():
        if kind in WHY and at["accuracy"][0] > default:
            sure = "" if at["over_lexical"][1] > 0 else ", within the noise"
            losing.append(
                f"On the held-out half {KINDS[kind]} agrees with people in {at['accuracy'][0]:.3f}, lexical in "
                f"{default:.3f} (difference {_of(at['over_lexical'], sign=True)}{sure}). {WHY[kind]}"
            )
    everything = result["sets"]["all"]["kinds"]["lexical"]["accuracy"][0]
    losing += [
        f"On all answers lexical agrees with people in {everything:.3f}, {name} as published in {value:.3f}."
        for name, value in result["published"].items()
        if name not in found and value > everything
    ]
    return losing
