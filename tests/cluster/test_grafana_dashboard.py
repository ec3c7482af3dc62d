"""The Grafana dashboard: it can be imported, and it plots what the code counts and nothing else."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from actors.metrics import METRICS, Tags

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
#: What Ray's exporter puts before the name of each metric of a user.
PREFIX = "ray_"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CLUSTER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return loaded


def plots(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in plots(dashboard) for target in panel["targets"]]


def test_every_metric_is_plotted_and_every_plotted_metric_is_there(dashboard: dict[str, Any]) -> None:
    asked = {name for query in queries(dashboard) for name in re.findall(r"\b\w+(?=\{)", query)}
    assert asked == {PREFIX + name for name in METRICS}


def test_queries_filter_and_group_by_tags_that_metrics_have(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        filtered = re.findall(r'(\w+)=~"\$(\w+)"', query)
        grouped = [label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")]
        assert filtered
        assert all(label == variable for label, variable in filtered)
        assert {*grouped, *(label for label, _ in filtered)} <= {*Tags._fields}


def test_counters_are_plotted_as_rates_or_totals_and_gauges_as_they_are(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        for name in re.findall(r"rate\((\w+)\{", query):
            assert name.endswith("_total")


def test_run_and_stage_can_be_chosen_and_their_values_come_from_metrics_that_are_there(
    dashboard: dict[str, Any],
) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for name in ("run", "cell", "stage"):
        source, label = re.fullmatch(
            r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", variables[name]["query"]["query"]
        ).groups()  # type: ignore[union-attr]
        assert source.removeprefix(PREFIX) in METRICS
        assert label == name
        assert variables[name]["includeAll"]


def test_it_has_what_grafana_imports(dashboard: dict[str, Any]) -> None:
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    assert dashboard.get("id") is None, "an id would overwrite another dashboard"
    assert dashboard["schemaVersion"] >= 36
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in plots(dashboard):
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(references) == len(set(references))


def test_no_panel_covers_another(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = [one[p] + one[s] <= other[p] or other[p] + other[s] <= one[p] for p, s in (("x", "w"), ("y", "h"))]
        assert any(apart), (one, other)
