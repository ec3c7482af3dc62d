"""Charts: the same figures give the same bytes, and everything that was given can be read in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import charts
import pytest

BAND = [(0, 0.5, 0.4, 0.6), (1, 0.7, 0.6, 0.8)]
DRAWING = (
    "import charts; print(charts.lines('t', 'x', 'y', {'a': [(0, 1, 0, 2), (1, 2, 1, 3)], 'b': [(0, 1), (1, 0)]}))"
)


def texts(svg: str) -> list[str]:
    """What is written in a chart."""
    return [
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter() if "text" in element.tag
    ]


def test_a_chart_is_the_same_bytes_in_every_process() -> None:
    drawn = {
        subprocess.run(
            [sys.executable, "-c", DRAWING],
            env=os.environ | {"PYTHONPATH": str(Path(charts.__file__).parent), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(drawn) == 1
    assert b"<svg" in drawn.pop()


def test_lines_say_title_axes_and_names() -> None:
    found = texts(
        charts.lines("How much?", "annotations", "accuracy", {"ours & theirs": BAND, "a < b": [(0, 1), (1, 2)]})
    )

    assert {"How much?", "annotations", "accuracy", "ours & theirs", "a < b"} <= set(found)


def test_bars_say_title_axis_names_and_values() -> None:
    found = texts(charts.bars("How much?", "seconds", {"ours": (1234.5, 1200.0, 1300.0), "theirs": (0.25, None, None)}))

    assert {"How much?", "seconds", "ours", "theirs", "1,234", "0.250"} <= set(found)


def test_intervals_are_drawn_where_they_are_given() -> None:
    plain = charts.lines("t", "x", "y", {"a": [point[:2] for point in BAND]})
    banded = charts.lines("t", "x", "y", {"a": BAND})
    assert "FillBetween" not in plain
    assert "FillBetween" in banded

    bare, whisker = (charts.bars("t", "y", {"a": found}) for found in ((0.5, None, None), (0.5, 0.4, 0.6)))
    assert whisker.count("stroke: #333333") > bare.count("stroke: #333333")


def test_a_chart_changes_with_its_figures() -> None:
    before = charts.lines("t", "x", "y", {"a": BAND})

    assert charts.lines("t", "x", "y", {"a": [(0, 0.5, 0.4, 0.6), (1, 0.7, 0.6, 0.81)]}) != before
    assert charts.lines("t", "x", "y", {"a": BAND}, log_y=True) != before


def test_charts_have_a_white_ground_so_that_dark_pages_show_them() -> None:
    assert "fill: #ffffff" in charts.lines("t", "x", "y", {"a": BAND})
    assert "fill: #ffffff" in charts.bars("t", "y", {"a": (1.0, None, None)})


def test_no_two_lines_look_alike() -> None:
    looks = {
        (charts.COLOURS[index % len(charts.COLOURS)], charts.DASHES[index // len(charts.COLOURS)])
        for index in range(len(charts.COLOURS) * len(charts.DASHES))
    }
    assert len(looks) == 24
    assert len(set(charts.MARKERS)) == len(charts.COLOURS)


def test_neither_day_nor_version_stands_in_a_chart() -> None:
    import matplotlib as mpl

    svg = charts.bars("t", "y", {"a": (1.0, None, None)})
    assert "dc:date" not in svg
    assert mpl.__version__ not in svg


def test_an_interval_need_not_hold_its_value() -> None:
    assert "0.500" in texts(charts.bars("t", "y", {"a": (0.5, 0.6, 0.7)}))


@pytest.mark.parametrize("value", [-2.0, 0.0, 3.0])
def test_a_bar_may_go_either_way(value: float) -> None:
    assert f"{value:.3f}" in texts(charts.bars("t", "y", {"a": (value, value - 1, value + 1)}))
