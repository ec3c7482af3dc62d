"""Calls of the equivalence that clustering needs."""

from __future__ import annotations

from typing import Any

from charts import lines
from pages import Section
from tables import figure, percent, table

TITLE = "Clustering against full pairwise comparison"
COMMAND = "python benchmarks/bench_clustering.py"
KINDS = {
    "lexical": "lexical",
    "embedding": "embedding (MiniLM)",
    "containment": "containment of words, both ways",
    "random_nli": "BERT with random weights, both ways",
}
GROUPS = {"well": "shown often", "partly": "shown a little", "stranger": "never shown", "all": "all"}
FULL = {"all_pairs": "all pairs", "full_loop": "the public loop"}
HEADER = [
    "equivalence", "samples", "questions", "calls", *(f"of {what}" for what in FULL.values()), "clusters that differ",
    "and where the last match wins",
]  # fmt: skip
LIMIT = 0.15
#: With the empty lines around it, which go where it is left out.
EXPLAINED = """
A call is one forward pass over (premise, hypothesis) where entailment is asked both ways, else one verdict on a pair.
Full pairwise is counted in two ways. *All pairs*: every two answers of a question, in both directions where
there are two. *Public loop*: what the public code of KA2L and of semantic entropy compares, every answer that opens a
cluster with all answers after it. No NLI model comes with this project: containment of words and a small BERT with
random weights stand in for one. They ask each direction on its own as it does, and say nothing about meaning.

`lexical` compares only answers with a common mark; a model cannot tell any two apart unread. Of an equivalence about
which nothing is known no procedure asks fewer pairs: each distinct answer has to be compared with every representative
before the one that takes it.

Clusters that differ: questions whose clusters are not those of the plain greedy algorithm asked about every answer as
it is spelled. In the public code an answer that matches several representatives goes to the last of them, not the
first; the last column counts where that makes a difference.
"""
#: Samples a question at which seconds and groups are shown: KA2L's.
SAMPLES = "10"


def section(result: dict[str, Any]) -> Section:
    """Shares of calls by kind and number of samples, by how well facts are known, and seconds."""
    return compared(result, explained=True)


def compared(result: dict[str, Any], explained: bool) -> Section:
    """The same of any world's answers.

    Args:
        explained: say what the columns mean; one section of the page does.
    """
    kinds = {name: result["kinds"][name] for name in KINDS if name in result["kinds"]}
    rows = []
    for name, counts in kinds.items():
        for samples, found in counts.items():
            asked = found["questions"]["all"]
            shares = [percent(found[f"share_of_{full}"], 1) for full in FULL]
            differ = [found["differ_from_greedy"], found["differ_from_last_wins"]]
            rows.append([KINDS[name], samples, asked["num_questions"], f"{asked['num_calls']:,}", *shares, *differ])
    groups = [
        [shown, count["num_questions"], *(figure(count[key] / count["num_questions"], 1) for key in
         ("num_distinct", "num_clusters", "num_calls", "full_loop", "all_pairs"))]
        for group, shown in GROUPS.items()
        for count in [kinds["containment"][SAMPLES]["questions"][group]]
    ]  # fmt: skip
    seconds = [
        [KINDS[name], figure(counts[SAMPLES]["seconds"]), figure(counts[SAMPLES]["full_seconds"]),
         percent(counts[SAMPLES]["seconds_ratio"], 1)]
        for name, counts in kinds.items()
    ]  # fmt: skip
    read = kinds["embedding"][SAMPLES]["questions"]["all"] if "embedding" in kinds else None
    embedded = (
        f"An embedding model reads texts, not pairs: {read['num_texts']:,} distinct ones of {read['num_answers']:,} "
        f"answers with {SAMPLES} samples. "
        if read
        else ""
    )
    source = f"({result['facts']})"
    num_timed = result["timed"]["num_questions"]
    text = f"""How many calls of an equivalence do clusters need, and do they stay the same? {result["num_questions"]}
questions {source}, answered at temperature 1 by a testbed's model that was shown {result["groups"]["well"]} of the
facts often, {result["groups"]["partly"]} a little and {result["groups"]["stranger"]} never.
{EXPLAINED if explained else ""}
{table(HEADER, rows)}

{embedded}

By how well the facts are known, {SAMPLES} samples, containment; figures a question:

{table(["facts", "questions", "distinct answers", "clusters", "calls", "public loop", "all pairs"], groups)}

Seconds of {num_timed} questions, {SAMPLES} samples, with the public loop asking about duplicates, too; the embedding
keeps what it has read in memory, for both:

{table(["equivalence", "seconds", "public loop", "ratio"], seconds)}"""
    chart = lines(
        "Calls of the equivalence against all pairs", "answers a question", "share of all pairs",
        {KINDS[name]: [(int(count), found["share_of_all_pairs"]) for count, found in counts.items()]
         for name, counts in kinds.items()},
    )  # fmt: skip
    return Section(text, {"calls": chart}, losses(kinds))


def losses(kinds: dict[str, Any]) -> list[str]:
    """Shares above the limit, clusters that differ, and anything slower than the loop."""
    found = []
    for name, counts in kinds.items():
        at = counts[SAMPLES]
        shares = {what: at[f"share_of_{full}"] for full, what in FULL.items() if at[f"share_of_{full}"] > LIMIT}
        if shares:
            listed = " and ".join(f"{percent(share, 1)} of those of {what}" for what, share in shares.items())
            found.append(
                f"With {SAMPLES} samples clustering by {KINDS[name]} makes more than {percent(LIMIT)} of the calls: "
                f"{listed}. Answers that all differ have to be compared, and facts not shown often give little else."
            )
        worst = max(at["differ_from_greedy"] for at in counts.values())
        if worst:
            found.append(
                f"Clusters by {KINDS[name]} differ from the plain algorithm's in up to {worst} questions: spellings of "
                "one answer that it tells apart are one answer here."
            )
        if counts[SAMPLES]["seconds_ratio"] > 1:
            found.append(f"Clustering by {KINDS[name]} takes {counts[SAMPLES]['seconds_ratio']:.3f} times the loop.")
    return found
