"""The report: one page that holds everything, breaks out of nothing and survives whatever is missing."""

from __future__ import annotations

import fnmatch
import html
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.report.build import render, summary
from engine.report.data import (
    AnswerChange,
    ConfidentMistake,
    GroupShare,
    ReportData,
    RoundReport,
    SelectedExample,
    StageReport,
    StatePoints,
    Transitions,
)

ATTACK = "<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>"
CHARTS = ("curve", "transitions", "layers", "auroc", "entropy", "states", "groups")
REPOSITORY = Path(__file__).resolve().parents[3]


def _synthetic_round(index: int) -> RoundReport:
    rng = np.random.default_rng(index)
    accuracy = (0.402, 0.668, 0.794, 0.846)[index]
    kept, learned = (201, 186, 181, 183)[index], (0, 148, 216, 240)[index]
    cost = {"seconds": 34.0, "tokens_prompt": 410_000.0, "tokens_generated": 61_000.0}
    item = RoundReport(
        index,
        stages={
            "observe": StageReport({}, cost),
            "cluster": StageReport(
                {
                    "accuracy": accuracy,
                    "accuracy_ci": [accuracy - 0.041, accuracy + 0.04],
                    "exact_match": accuracy - 0.01,
                    "token_f1": accuracy + 0.02,
                },
                {"seconds": 2.5},
            ),
        },
        entropy=np.where(rng.random(400) < 0.45, 0.0, rng.beta(3, 2, 400) * 2.3).astype(np.float32),
        transitions=Transitions(kept, 201 - kept, learned, 299 - learned),
    )
    if index == 3:
        return item
    sweep = np.array([0.50, 0.55, 0.74, 0.93 - 0.02 * index, 0.95 - 0.03 * index])
    item.stages |= {
        "label": StageReport({"threshold": 0.83, "unknown_fraction": 0.47 - 0.1 * index}, {"seconds": 0.1}),
        "extract": StageReport({}, {"seconds": 9.0, "tokens_prompt": 320_000.0, "forward_passes": 34.0}),
        "probe": StageReport(
            {
                "layer": 4,
                "auroc": sweep[-1],
                "auroc_ci": [sweep[-1] - 0.04, sweep[-1] + 0.03],
                "by_layer": [
                    {"layer": layer, "validation_auroc": value - 0.01, "test_auroc": value}
                    for layer, value in enumerate(sweep)
                ],
            },
            {"seconds": 4.0},
        ),
        "knowledge": StageReport(
            {
                "auroc_wrong": 0.9 - 0.07 * index,
                "auroc_wrong_ci": [0.85 - 0.07 * index, 0.94 - 0.07 * index],
                "num_unannotated": 500 - 100 * index,
                "unknown_fraction": 0.52 - 0.12 * index,
            },
            {"seconds": 1.0},
        ),
        "select": StageReport({"strategy": "probe", "num_selected": 150, "num_candidates": 1200 - 150 * index}),
        "annotate": StageReport({"num_annotated": 150, "num_refused": 0}, {"annotations": 150.0, "money": 3.0}),
        "tune": StageReport(
            {
                "num_annotation": 150 * (index + 1),
                "num_rehearsal": 900,
                "num_steps": 400,
                "last_loss": 0.21,
                "example": "Question: Where was Ada born? Answer:[[ Velmora]]",
                "canary": {"max_logit_difference": 7.4},
            },
            {"seconds": 61.0, "tokens_trained": 190_000.0},
        ),
    }
    unknown = rng.random(600) < 0.5 - 0.1 * index
    centre = np.where(unknown, 1.6, -1.4)
    item.points = StatePoints(
        pca=np.column_stack([centre + rng.normal(0, 0.9, 600), rng.normal(0, 1.2, 600)]).astype(np.float32),
        p_unknown=np.where(unknown, 0.5 + 0.5 * rng.random(600), 0.5 * rng.random(600)).astype(np.float32),
        questions=[ATTACK, *(f"Synthetic question {number}: where was person {number} born?" for number in range(599))],
    )
    rates = {"city": 0.7, "employer": 0.55, "instrument": 0.42, ATTACK: 0.3, "pet": 0.15}
    item.groups = [
        GroupShare("relation", value, 300, int(300 * rate), rate * 0.9 + 0.05) for value, rate in rates.items()
    ]
    item.groups += [
        GroupShare("exposure", str(4 * step), 375, 375 - 110 * step, 0.9 - 0.25 * step) for step in range(4)
    ]
    item.selected = [
        SelectedExample(0, ATTACK, 0.991, [("Paris", 4), ("Velmora", 3), (ATTACK, 1)], "Velmora"),
        SelectedExample(1, "Where was Synthetic Person 17 born?", 0.987, [("Old Harbour", 2), ("Tarn", 2)], "Tarn"),
        SelectedExample(2, "What instrument does Synthetic Person 3 play?", 0.98),
    ]
    return item


def synthetic() -> ReportData:
    """Three rounds and a last measurement of an invented campaign."""
    return ReportData(
        name="synthetic-demo",
        status="complete",
        model="invented/model-2m",
        location="runs/synthetic-demo",
        config_yaml="name: synthetic-demo\nseed: 0\nrounds: 3\nselection: {kind: probe, budget: 150}\n",
        seed=0,
        num_candidates=1200,
        num_eval=500,
        pool_stages={"questions": StageReport({}, {"seconds": 1.2})},
        rounds=[_synthetic_round(index) for index in range(4)],
        improved=[AnswerChange("Where was Synthetic Person 9 born?", "Tarn", "Velmora", "Velmora")],
        worsened=[AnswerChange(ATTACK, "Velmora", "Tarn", "Velmora")],
        confident_mistakes=[ConfidentMistake("Who employs Synthetic Person 4?", "Mill & Co", "Harbour Ltd", 0.04)],
        confident_mistakes_round=2,
        quarantine_counts={"duplicate": 12, "empty": 3},
        quarantine_examples=[("duplicate: of row 4", "pool.jsonl", 17, '{"question": "' + ATTACK + '"}')],
        versions={"python": "3.11.9", "torch": "2.13.0"},
        git_revision="0123456789abcdef+",
    )


def _payloads(page: str) -> dict[str, str]:
    """The JSON of every chart, by key."""
    pattern = r'<figure class="chart" id="chart-(\w+)">.*?<script type="application/json">(.*?)</script>'
    return dict(re.findall(pattern, page, re.DOTALL))


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_page_shows_the_three_numbers_that_matter() -> None:
    page = html.unescape(render(synthetic())).replace("\N{NO-BREAK SPACE}", " ")
    values = [re.sub("<.*?>", "", value) for value in re.findall(r'<div class="value">(.*?)</div>', page)[:3]]
    assert values == ["84.6 %", "450 of 1,200", "0.890"]
    assert "from 40.2 % to 84.6 %" in re.sub(r"\s+", " ", page)
    assert "+44.4 points" in page


def test_page_and_summary_cross_both_axes_once_annotations_have_shown_them() -> None:
    data = synthetic()
    assert 'id="quadrants"' not in render(data)
    revealed = {"known": 13, "unknown": 220, "confidently_wrong": 7, "lucky": 10}
    left = {"known": 789, "unknown": 267, "confidently_wrong": 194, "lucky": 0}
    data.rounds[1].stages["feedback"] = StageReport({"revealed": revealed})
    data.rounds[1].stages["knowledge"] = StageReport({"quadrants": left})
    section = re.search(r'<section id="quadrants">.*?</section>', render(data), re.DOTALL)
    assert section is not None
    cells = re.findall(r'<td class="n">(\S+?)</td>', section[0])
    assert cells == [str(value) for value in (1, *revealed.values(), *left.values())]
    assert [row["quadrants"] for row in summary(data)["rounds"]] == [
        None,
        {"revealed": revealed, "left": left},
        None,
        None,
    ]


def test_every_chart_is_there_with_plotly_inlined_once() -> None:
    page = render(synthetic())
    assert tuple(_payloads(page)) == CHARTS
    assert page.count("* plotly.js v") == 1
    assert len(page) < 6_000_000


def test_page_loads_nothing_from_elsewhere() -> None:
    page = _without_scripts(render(synthetic()))
    targets = re.findall(r"""\b(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", page)
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert "url(" not in page
    assert "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "http" not in policy[1]


def test_text_from_data_cannot_become_markup() -> None:
    data = replace(synthetic(), name=ATTACK, model=ATTACK, config_yaml=ATTACK, status=ATTACK, problems=[ATTACK])
    data.versions, data.git_revision, data.location = {ATTACK: ATTACK}, ATTACK, ATTACK
    data.quarantine_counts = {ATTACK: 1}
    data.rounds[0].stages["select"] = StageReport({"strategy": ATTACK})
    data.rounds[0].stages["tune"] = StageReport({"example": ATTACK, "last_loss": ATTACK, "canary": ATTACK})
    page = render(data)
    assert "<script>alert" not in page
    assert "<img" not in _without_scripts(page)
    assert page.count("<script") == page.count("</script>") == len(CHARTS) + 2


def test_text_from_data_cannot_close_a_chart_or_become_a_link_in_a_hover_text() -> None:
    payloads = _payloads(render(synthetic()))
    assert all("<" not in payload and ">" not in payload for payload in payloads.values())
    points = json.loads(payloads["states"])["views"]["0"]["data"]
    texts = [text for trace in points for text in trace["text"]]
    assert any(text.startswith("&lt;script&gt;alert(1)&lt;/script&gt;") for text in texts)
    ticks = json.loads(payloads["groups"])["views"]["0|0"]["layout"]["yaxis"]["ticktext"]
    assert not any("<" in label for label in ticks)


def test_only_the_scripts_of_the_page_itself_may_run() -> None:
    page = render(synthetic())
    assert "'unsafe-inline'" not in re.findall(r"script-src ([^;]*);", page)[0]
    assert len(re.findall(r"'sha256-[^']+'", page)) == 2


@pytest.mark.parametrize("num_stages", range(0, 11))
def test_a_running_campaign_renders_after_every_stage(num_stages: int) -> None:
    data = synthetic()
    first = data.rounds[0]
    first.stages = dict(list(first.stages.items())[:num_stages])
    if "knowledge" not in first.stages:
        first.points, first.groups = None, []
    page = render(replace(data, status="running", rounds=[first], improved=[], worsened=[]))
    assert ("nothing has been tuned yet" in re.sub(r"\s+", " ", page)) == ("cluster" in first.stages)
    assert ("No probe has been fitted." in page) == ("probe" not in first.stages)


def test_a_run_that_has_just_begun_says_what_is_missing() -> None:
    page = render(ReportData("just-begun"))
    assert not _payloads(page)
    for sentence in (
        "No accuracy has been measured yet",
        "No probe has been fitted",
        "No round has begun",
        "Nothing has been selected",
        "No stage has been committed",
        "No row was quarantined",
    ):
        assert sentence in page


@pytest.mark.parametrize("value", [None, float("nan"), "text", [], True])
def test_metrics_that_are_no_numbers_are_treated_as_missing(value: object) -> None:
    data = synthetic()
    for item in data.rounds:
        item.stages = {
            name: StageReport({key: value for key in stage.metrics}, dict.fromkeys(stage.cost, float("nan")))
            for name, stage in item.stages.items()
        }
    assert "No accuracy has been measured" in render(data)
    content = summary(data)
    assert content["total_seconds"] == pytest.approx(1.2)
    assert all(item["accuracy"] is None and item["probe"]["auroc"] is None for item in content["rounds"])


def test_summary_is_json_and_its_rounds_are_the_learning_curve() -> None:
    content = json.loads(json.dumps(summary(synthetic()), allow_nan=False))
    assert content["schema_version"] == 1
    assert content["status"] == "complete"
    curve = [(item["num_annotated"], item["accuracy"]) for item in content["rounds"]]
    assert curve == [(0, 0.402), (150, 0.668), (300, 0.794), (450, 0.846)]
    first, last = content["rounds"][0], content["rounds"][-1]
    assert first["probe"] == {
        "layer": 4,
        "auroc": 0.95,
        "auroc_ci": pytest.approx([0.91, 0.98]),
        "auroc_wrong": 0.9,
        "auroc_wrong_ci": [0.85, 0.94],
    }
    assert first["cost"] == {
        "annotation": 150,
        "money": 3.0,
        "tokens_generated": 61_000,
        "seconds": pytest.approx(111.6),
        "cpu_seconds": 0.0,
        "gpu_seconds": 0.0,
    }
    assert last["forgetting"] == pytest.approx(18 / 201)
    assert last["probe"]["auroc"] is None
    assert content["total_seconds"] == pytest.approx(1.2 + 3 * 111.6 + 36.5)


def test_templates_are_shipped_with_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["engine.templates"]
    names = [path.name for path in (REPOSITORY / "engine" / "templates").iterdir() if path.is_file()]
    names = [name for name in names if not name.endswith(".py")]
    assert names
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names)


def _browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as a browser has built it, and what it wrote to the console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [chromium, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_draws_every_chart_without_a_console_message(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(replace(synthetic(), baselines=[synthetic()])), encoding="utf-8")
    built, messages = _browse(page, tmp_path / "profile")
    assert messages == []
    drawn = {key: body for key, body in re.findall(r'id="chart-(\w+)">(.*?)</figure>', built, re.DOTALL)}
    assert drawn.keys() == {*CHARTS, "net_annotations", "net_money"}
    assert all('class="main-svg"' in body for body in drawn.values())


def test_every_choice_of_the_drop_down_lists_draws(tmp_path: Path) -> None:
    data = synthetic()
    data.rounds[1].groups = [share for share in data.rounds[1].groups if share.column != "exposure"]
    probe = """
    const shown = [];
    for (const chart of document.querySelectorAll(".chart")) {
      const lists = [...chart.querySelectorAll("select")];
      for (const list of lists) for (const option of list.options) {
        list.value = option.value;
        list.dispatchEvent(new Event("change"));
        const isDrawn = !chart.querySelector(".plot").hidden;
        if (isDrawn === chart.querySelector(".no-view").hidden) {
          shown.push(`${chart.id} ${lists.map((item) => item.value).join("|")} ${isDrawn}`);
        }
      }
    }
    document.body.dataset.shown = shown.join(";");
    """
    # The policy would refuse this test's own script.
    text = re.sub(r"<meta http-equiv=[^>]*>", "", render(data)).replace("</body>", f"<script>{probe}</script></body>")
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    built, messages = _browse(page, tmp_path / "profile")
    assert messages == []
    found = re.search(r'data-shown="([^"]*)"', built)
    assert found is not None
    assert found[1].split(";") == [
        *(f"chart-entropy {index} true" for index in range(4)),
        *(f"chart-states {index} true" for index in range(3)),
        "chart-groups 0|0 true",
        "chart-groups 1|0 true",
        "chart-groups 1|0 true",
        "chart-groups 1|1 false",
        "chart-groups 1|2 true",
    ]
