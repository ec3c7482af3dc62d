"""docs/results.md and its charts are what the result files give, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import machine
import pages
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROVENANCE = {
    "command": "python benchmarks/bench_invented.py --seeds 7",
    "date": "2026-05-04T03:02:01+00:00",
    "machine": {"processor": "arm64", "num_cores": 3, "memory_gib": 7.5, "gpu": "NVIDIA L4", "num_gpus": 2},
    "versions": {},
    "git_revision": "0123456789abcdef+",
}


@pytest.fixture(scope="module")
def made() -> tuple[str, dict[str, str]]:
    """The page as the repository's results give it."""
    return pages.page()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the page as it is committed."""
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copy(pages.DOCS / "results.md", folder)
    shutil.copytree(pages.DOCS / "results", folder / "results")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the repository's results."""
    return Path(shutil.copytree(machine.RESULTS, tmp_path / "results"))


def invent(monkeypatch: pytest.MonkeyPatch, name: str, losses: list[str]) -> ModuleType:
    """A section of an invented question, the only one of the page unless there are others."""
    module = ModuleType(f"sections.{name}")
    module.__dict__.update(
        TITLE=f"Is {name} measured?",
        COMMAND=f"python benchmarks/bench_{name}.py",
        section=lambda result: pages.Section(f"It is {result['answer']}.", {"curve": "<svg/>\n"}, losses),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def put(results: Path, question: str, answer: Any, **more: Any) -> None:
    """A result file of an invented question."""
    (results / question).mkdir(parents=True, exist_ok=True)
    result = PROVENANCE | {"answer": answer} | more
    (results / question / f"{result['date'][:10]}.json").write_text(json.dumps(result))


def test_the_page_and_its_charts_are_what_the_results_give(made: tuple[str, dict[str, str]]) -> None:
    assert pages.differences(pages.DOCS, *made) == [], "run python benchmarks/pages.py"


def test_a_figure_that_is_edited_by_hand_is_found(made: tuple[str, dict[str, str]], docs: Path) -> None:
    page = docs / "results.md"
    figures = re.findall(r"\d\.\d{3}", page.read_text())
    page.write_text(page.read_text().replace(figures[0], "0.999", 1))

    (found,) = pages.differences(docs, *made)
    assert str(page) in found
    assert re.search(r"line \d+", found)


def test_a_chart_that_is_edited_missing_or_left_over_is_found(made: tuple[str, dict[str, str]], docs: Path) -> None:
    edited, missing = sorted((docs / "results").glob("*.svg"))[:2]
    edited.write_text(edited.read_text().replace("</svg>", "<!-- --></svg>"))
    missing.unlink()
    (docs / "results" / "left-over.svg").write_text("<svg/>")

    found = pages.differences(docs, *made)
    assert len(found) == 3
    assert any(edited.name in line and "differs" in line for line in found)
    assert any(missing.name in line and "missing" in line for line in found)
    assert any("left-over.svg" in line and "no section" in line for line in found)


def test_a_changed_result_changes_text_and_chart(made: tuple[str, dict[str, str]], results: Path) -> None:
    file = machine.latest_file("campaign", results)
    assert file is not None
    result = json.loads(file.read_text())
    result["comparison"]["final_accuracy"]["three_rounds"]["mean"] = 0.123
    file.write_text(json.dumps(result))

    markdown, charts = pages.page(results)

    changed = [line for line in markdown.splitlines() if line not in made[0].splitlines()]
    assert any(line.startswith("| KA2L, three rounds |") and "0.123" in line for line in changed)
    assert "Three rounds end at 0.123" in markdown.partition("## Where we lose")[2]
    assert {name for name in charts if charts[name] != made[1][name]} == {"campaign-accuracy.svg"}


def test_what_has_no_result_says_so_with_its_command(tmp_path: Path) -> None:
    markdown, charts = pages.page(tmp_path)

    assert not charts
    assert markdown.count("Not measured yet: `") == len(pages.SECTIONS)
    assert "Not measured yet: `python benchmarks/bench_overhead.py`" in markdown
    assert markdown.endswith("## Where we lose\n\nNo result says so.\n")


def test_a_section_shows_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invent(monkeypatch, "invented", [])
    monkeypatch.setattr(pages, "SECTIONS", ["invented"])
    put(tmp_path, "invented", "old", date="2026-05-03T00:00:00+00:00")
    put(tmp_path, "invented", "new")

    markdown, charts = pages.page(tmp_path)

    section = markdown.partition("## Is invented measured?")[2]
    assert "It is new." in section
    for part in ("`python benchmarks/bench_invented.py --seeds 7`", "arm64, 3 cores, 7.5 GiB, 2 x NVIDIA L4",
                 "2026-05-04", "revision 01234567+", "(../benchmarks/results/invented/2026-05-04.json)"):  # fmt: skip
        assert part in section
    assert charts == {"invented-curve.svg": "<svg/>\n"}
    assert "](results/invented-curve.svg)" in section


def test_a_result_that_its_section_cannot_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "chaos", "not what the section expects")

    with pytest.raises(KeyError) as raised:
        pages.page(tmp_path)

    assert any("sections/chaos.py" in note and "2026-05-04.json" in note for note in raised.value.__notes__)


def test_losses_of_all_sections_stand_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, losses in (("one", ["It is slower by a half."]), ("two", []), ("three", ["It is wrong.", "It is ugly."])):
        invent(monkeypatch, name, losses)
        put(tmp_path, name, name)
    monkeypatch.setattr(pages, "SECTIONS", ["one", "two", "three"])

    ending = pages.page(tmp_path)[0].partition("## Where we lose")[2].strip()

    assert ending.splitlines() == [
        "- [Is one measured?](#is-one-measured)",
        "  - It is slower by a half.",
        "- [Is three measured?](#is-three-measured)",
        "  - It is wrong.",
        "  - It is ugly.",
    ]


@pytest.mark.parametrize(
    ("question", "path", "value", "sentence"),
    [
        ("campaign", ("comparison", "final_accuracy", "one_entropy", "mean"), 0.5, "Ranking by the semantic entropy"),
        ("overhead", ("ratios", "extract_engine_over_bare"), 0.9, "Extraction by the engine"),
        ("schedule", ("by_num_gpus", "512", "bound_over_makespan"), 1.0, "on 512 GPUs"),
        ("estimate", ("total", "seconds", "ratio"), 1.01, "% in seconds"),
        ("knowtuning", ("minus_knowtuning", "no_kcc", "completeness", "ci"), [-0.2, -0.1], "-KCC: no completeness"),
    ],
)
def test_a_loss_goes_where_the_result_no_longer_says_so(
    results: Path, monkeypatch: pytest.MonkeyPatch, question: str, path: tuple[str, ...], value: Any, sentence: str
) -> None:
    monkeypatch.setattr(pages, "SECTIONS", [question])

    def ending() -> str:
        return pages.page(results)[0].partition("## Where we lose")[2]

    assert sentence in ending()
    file = machine.latest_file(question, results)
    assert file is not None
    result = json.loads(file.read_text())
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(result))

    assert sentence not in ending()


def test_sections_are_exactly_the_modules_that_there_are() -> None:
    modules = {path.stem for path in (Path(pages.__file__).parent / "sections").glob("*.py")}

    assert sorted(pages.SECTIONS) == sorted(modules)


def test_every_entry_of_the_contents_leads_to_a_heading(made: tuple[str, dict[str, str]]) -> None:
    headings = {pages.anchor(heading) for heading in re.findall(r"^## (.*)$", made[0], re.MULTILINE)}
    entries = re.findall(r"^- \[.*\]\(#(.*)\)$", made[0].partition("\n## ")[0], re.MULTILINE)

    assert len(entries) == len(pages.SECTIONS) + 1
    assert set(entries) == headings


def test_links_of_the_page_lead_to_files(made: tuple[str, dict[str, str]]) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", made[0]) if "://" not in target]

    assert len(targets) > sum(machine.latest_file(question) is not None for question in pages.SECTIONS)
    assert [target for target in targets if not (pages.DOCS / target).exists()] == []


def test_every_result_that_other_texts_name_is_there() -> None:
    texts = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", REPOSITORY / "CONTRIBUTING.md"]
    texts += [path for path in pages.DOCS.glob("*.md") if path.name != "results.md"]
    named = {
        (path.name, name)
        for path in texts
        for name in re.findall(r"benchmarks/results/([a-z][\w./-]*)", path.read_text(encoding="utf-8"))
    }

    assert named
    assert [(text, name) for text, name in sorted(named) if not (machine.RESULTS / name).exists()] == []


def test_links_into_the_page_lead_to_headings(made: tuple[str, dict[str, str]]) -> None:
    headings = {pages.anchor(heading) for heading in re.findall(r"^## (.*)$", made[0], re.MULTILINE)}
    linked = {
        anchor
        for path in (REPOSITORY / "README.md", *pages.DOCS.glob("*.md"))
        for anchor in re.findall(r"results\.md#([\w-]+)\)", path.read_text(encoding="utf-8"))
    }

    assert linked
    assert linked <= headings


def test_paragraphs_are_filled_and_tables_are_not() -> None:
    text = "A sentence\nwith breaks.\n\n| a | b |\n| --- | ---: |\n| c | 1 |\n\n1. first\n2. second"

    assert pages.wrapped(text) == text.replace("sentence\nwith", "sentence with")


def test_writing_makes_page_and_charts_and_removes_what_no_section_makes(
    made: tuple[str, dict[str, str]], docs: Path
) -> None:
    (docs / "results" / "left-over.svg").write_text("<svg/>")
    (docs / "results.md").write_text("stale")

    pages.write(docs, *made)

    assert pages.differences(docs, *made) == []


def test_check_writes_nothing_and_says_what_differs(
    made: tuple[str, dict[str, str]], docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "DOCS", docs)
    monkeypatch.setattr(pages, "page", lambda: made)
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    pages.main()  # nothing to say, exit code 0

    (docs / "results.md").write_text("edited")
    with pytest.raises(SystemExit) as stopped:
        pages.main()

    assert stopped.value.code not in (None, 0)
    assert "results.md: differs" in capsys.readouterr().out
    assert (docs / "results.md").read_text() == "edited"
