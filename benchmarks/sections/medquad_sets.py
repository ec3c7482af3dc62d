"""KnowTuning's training sets of real long answers."""

from __future__ import annotations

from typing import Any

from pages import Section
from tables import percent, table

TITLE = "KnowTuning's training sets from a poor teacher"
COMMAND = "python benchmarks/bench_medquad_sets.py medquad.jsonl"


def section(result: dict[str, Any]) -> Section:
    """Rows in the sets and in the quarantine."""
    answers, refused = result["num_answers"], sum(result["answers_refused"].values())
    pairs, taken = result["num_pairs"], result["num_taken_apart"]
    lost = {name: sum(n for why, n in result["pairs_refused"].items() if why.startswith(name)) for name in pairs}
    text = f"""Are all rows accounted for when a teacher takes long medical answers apart and often gets it
wrong? {answers} answers of MedQuAD, taken apart by a tiny model that was taught the form of the replies and
nothing else, behind vLLM's own server. {taken} answers ended in {result["num_facts"]} facts, {refused} in the
quarantine; {answers - taken - refused} are unaccounted for. A second pass asked
{result["num_requests_of_a_second_pass"]} times.

{table(["pairs", "made", "in the quarantine"], [[name, number, lost[name]] for name, number in pairs.items()])}

{result["num_requests"]} requests, {result["tokens_prompt"]:,} prompt tokens and {result["tokens_generated"]:,}
generated ones took {result["seconds"]:.0f} s."""
    losses = []
    if refused:
        why = max(result["answers_refused"], key=result["answers_refused"].__getitem__).strip()
        losses.append(
            f"{percent(refused / answers)} of MedQuAD's answers end in the quarantine with this teacher, most of them "
            "with "
            f'"{why} ...": nothing cuts what is too long for a teacher.'
        )
    fewest = min(pairs, key=pairs.__getitem__)
    if pairs[fewest] < taken / 2:
        lengths = sum(
            n for why, n in result["pairs_refused"].items() if why.startswith(fewest) and "revised facts for" in why
        )
        losses.append(
            f"A poor teacher gives {fewest} pairs of only {percent(pairs[fewest] / taken)} of the answers that were "
            f"taken apart: {lengths} of the {lost[fewest]} others have a list of the wrong length."
        )
    return Section(text, {}, losses)
