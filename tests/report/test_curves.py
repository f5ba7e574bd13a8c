"""A chart goes through the values of a run, loses no spike, and takes its colours from the page."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from instructft.report import curves
from instructft.report.curves import Series, bars, chart, plot_loss, thinned
from tests.helpers.report import LINES, Read, fill

pytestmark = pytest.mark.drawn


def test_the_examples_in_the_docstrings() -> None:
    found = doctest.testmod(curves, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 1
    assert found.failed == 0


def test_a_line_goes_through_its_values() -> None:
    drawn = chart("Loss", [Series("training", [(0, 4.0), (50, 2.0), (100, 0.0)])])
    (points,) = re.findall(r'<path d="M ([^"]+)" style="fill: none; stroke: var\(--a\)', drawn.svg)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split()) for pair in points.strip().split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y1 - y0 == pytest.approx(y2 - y1)
    assert y0 < y1 < y2  # down the page is less
    assert drawn.keys == [("training", "0")]
    assert drawn.rows == [["0", "4"], ["50", "2"], ["100", "0"]]
    assert "<title>Loss</title><desc>training from 4 to 0</desc>" in drawn.svg
    assert not re.search("#[0-9a-f]{6}", drawn.svg)  # every colour follows the page
    assert chart("Loss", [Series("training", [])]) is None
    for points in ([(5, 1.0)], [(5, 0.0), (6, 0.0)], [(1, -3.0), (2, -3.0)], [(1, 1e-9), (2, 1e12)]):
        Read(chart("one", [Series("a", points)]).svg)
    with pytest.raises(ValueError, match="2 bars need 3 edges"):
        bars("x", [0, 1], [1, 2])
    assert len(thinned([(i, float(i % 7)) for i in range(10_000)], 100)) <= 100


def test_the_loss_is_drawn_for_papers_under_any_name(tmp_path: Path) -> None:
    run = fill(tmp_path / "run", LINES, [])
    png, pdf = plot_loss(run, "costs $5_0 and $\\frac$")  # a name is no formula
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"/CIDFontType2" in pdf.read_bytes()  # TrueType
    assert b"/Type3" not in pdf.read_bytes()
    first = pdf.read_bytes()
    plot_loss(run, "costs $5_0 and $\\frac$")
    assert pdf.read_bytes() == first
    assert plot_loss(fill(tmp_path / "none", [], []), "x") == []


def test_values_that_span_decades_get_a_log_axis() -> None:
    falls = [(step, 8 * 0.5**step) for step in range(12)]
    drawn = chart("Loss", [Series("training", falls)], "nats")
    (points,) = re.findall(r'<path d="M ([^"]+)" style="fill: none; stroke: var\(--a\)', drawn.svg)
    heights = [float(pair.split()[1]) for pair in points.strip().split("L")]
    assert heights[1] - heights[0] == pytest.approx(heights[-1] - heights[-2], rel=1e-3)
    assert drawn.unit == "nats, on a log axis"
    assert chart("Loss", [Series("training", falls[:6])], "nats").unit == "nats"
    assert chart("Rate", [Series("rate", falls, from_zero=True)]).unit == ""
    assert chart("Loss", [Series("training", [*falls, (12, 0.0)])]).unit == ""


def test_the_perplexities_of_a_log_axis_can_be_read(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 8 * 0.5 ** (step / 8) + 0.01} for step in range(100)]
    assert plot_loss(fill(tmp_path / "run", lines, []), "x")


def test_a_run_keeps_its_colour_where_others_have_no_values() -> None:
    drawn = chart("Loss", [Series("one", [], colour=0), Series("two", [(1, 2.0)], colour=1)])
    assert drawn.colours == [1]
    assert "var(--b)" in drawn.svg
