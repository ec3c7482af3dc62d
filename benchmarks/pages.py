"""docs/results.md and its charts, made from the newest result file of every question.

    python benchmarks/pages.py            # write them
    python benchmarks/pages.py --check    # exit code 1, and what differs, where they are not what the results give

A question has a module in ``sections/`` with TITLE, COMMAND and ``section(result) -> Section``. Takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from machine import RESULTS, latest_file

DOCS = Path(__file__).resolve().parents[1] / "docs"

#: Modules of ``sections/``, in the order of a reader's interest.
SECTIONS = [
    "strategies",
    "tuning",
    "rounds",
    "uncertainty",
    "public",
    "peers",
    "trl",
    "equivalence",
    "clustering",
    "clustering_real_facts",
    "costs",
    "campaign",
    "axes",
    "decoder",
    "knowtuning",
    "real_facts",
    "quickstart",
    "estimate",
    "estimate_real_facts",
    "overhead",
    "schedule",
    "nine",
    "chaos",
    "pool_scale",
    "medquad_sets",
]

INTRODUCTION = """# Benchmarks

What was measured, on which machine and with which revision, question by question. Every figure and chart on this page
is read from a result file in `benchmarks/results/`; a test fails where the page says anything else. A `+` behind a
revision means that the source had changes beside it. Square brackets hold 95 % confidence intervals. Where KA2L is
behind a simpler way, a floor or a peer, the section says so, and [the end of the page](#where-we-lose) collects it.

Regenerate with `python benchmarks/pages.py`; `make bench` makes the small results again first. A section names the
command of its own figures. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md)."""
LOSSES = "Where we lose"


class Section(NamedTuple):
    """What a question's module says about a result."""

    #: Markdown without a heading.
    text: str
    #: Name -> SVG.
    charts: dict[str, str]
    #: Whole sentences for "Where we lose": each names what, by how much, against what, and why.
    losses: list[str]


def page(results: Path = RESULTS) -> tuple[str, dict[str, str]]:
    """The page and its charts.

    Args:
        results: folder of the result files.

    Returns:
        Markdown, and SVG text by file name in ``docs/results/``.
    """
    parts, charts, losses, titles = [], {}, [], []
    for question in SECTIONS:
        module = importlib.import_module(f"sections.{question}")
        titles.append(module.TITLE)
        file = latest_file(question, results)
        if file is None:
            parts.append(f"## {module.TITLE}\n\nNot measured yet: `{module.COMMAND}`")
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        try:
            found = module.section(result)
        except Exception as error:
            error.add_note(
                f"sections/{question}.py cannot read {file}: was it made by another version of its benchmark?"
            )
            raise
        named = {f"{question}-{name}.svg": svg for name, svg in found.charts.items()}
        pictures = [f"![{module.TITLE}: {Path(name).stem}](results/{name})" for name in named]
        link = f"../benchmarks/results/{question}/{file.name}"
        made = f"<sub>{made_by(result)} · [result file]({link})</sub>"
        parts.append("\n\n".join([f"## {module.TITLE}", wrapped(found.text), *pictures, made]))
        charts |= named
        if found.losses:
            sentences = "\n".join(f"  - {sentence}" for sentence in found.losses)
            losses.append(f"- [{module.TITLE}](#{anchor(module.TITLE)})\n{sentences}")
    contents = "\n".join(f"- [{title}](#{anchor(title)})" for title in [*titles, LOSSES])
    ending = f"## {LOSSES}\n\n" + ("\n".join(losses) or "No result says so.")
    return "\n\n".join([INTRODUCTION, contents, *parts, ending]) + "\n", charts


def made_by(result: Mapping[str, Any]) -> str:
    """Command, machine, date and revision of a result."""
    machine = result["machine"]
    if "gpu" in machine:
        gpu = f"{machine.get('num_gpus') or 1} x {machine['gpu']}" if machine["gpu"] else "no GPU"
    else:  # results from before GPUs were recorded
        gpu = "no GPU" if "+cpu" in result["versions"].get("torch", "") else "GPU not recorded"
    revision = result["git_revision"]
    return " · ".join(
        [
            f"`{result['command']}`",
            f"{machine['processor']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB, {gpu}",
            result["date"][:10],
            f"revision {revision[:8]}{'+' * revision.endswith('+')}" if revision else "revision not recorded",
        ]
    )


def wrapped(text: str) -> str:
    """Paragraphs filled to 120 columns, as if nobody had put figures into them; tables, lists and code stay."""
    if "```" in text:
        return text.strip()
    blocks = [
        textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)
        if re.match(r"[\w`\[(*]", block) and not re.match(r"(\d+\.|\*) ", block)
        else block
        for block in text.strip().split("\n\n")
    ]
    return "\n\n".join(blocks)


def anchor(title: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def differences(docs: Path, markdown: str, charts: Mapping[str, str]) -> list[str]:
    """What in ``docs`` is not what the results give."""
    wanted = {docs / "results.md": markdown} | {docs / "results" / name: svg for name, svg in charts.items()}
    present = {docs / "results.md", *(docs / "results").glob("*.svg")}
    found = []
    for file in sorted(present | wanted.keys()):
        if file not in wanted:
            found.append(f"{file}: no section makes it any longer")
        elif not file.exists():
            found.append(f"{file}: missing")
        elif (text := file.read_text(encoding="utf-8")) != wanted[file]:
            pairs = zip(text.splitlines(), wanted[file].splitlines(), strict=False)
            line = next((number for number, (is_, should) in enumerate(pairs, 1) if is_ != should), "the last")
            found.append(f"{file}: differs from what the results give, first in line {line}")
    return found


def write(docs: Path, markdown: str, charts: Mapping[str, str]) -> None:
    """Write the page and its charts, and remove charts that no section makes any longer."""
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.svg"):
        if file.name not in charts:
            file.unlink()
    for name, svg in charts.items():
        (folder / name).write_text(svg, encoding="utf-8")
    (docs / "results.md").write_text(markdown, encoding="utf-8")


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    arguments = parser.parse_args()
    markdown, charts = page()
    if not arguments.check:
        write(DOCS, markdown, charts)
        print(f"written: {DOCS / 'results.md'} and {len(charts)} charts")
    elif found := differences(DOCS, markdown, charts):
        print("\n".join(found))
        sys.exit("run python benchmarks/pages.py")


if __name__ == "__main__":
    main()
