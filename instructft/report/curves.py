"""The curves of a run, drawn by matplotlib: `loss.png`, `loss.pdf`, and the charts of `report.html` as inline SVG.

The SVG takes its colours from CSS variables of the page, so that a chart is light or dark as the page is.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from instructft.report.logs import read_log

MOST_POINTS = 600  # drawn in a line
_APART = 0.045  # share of an axis between two ticks that are read apart
MOST_ROWS = 120  # of a chart's values as a table
LINES = ("#2f66b0", "#c8405a", "#2f8f5b", "#a86a00", "#7a4fb5", "#0b8494", "#8a5a3c", "#6b7280")  # of a chart, at most
_TRAINING, _TEXT, _LINE = LINES[0], "#5c6672", "#dfe3e8"
_COLOURS = {_TEXT: "var(--quiet)", _LINE: "var(--line)"} | {
    colour: f"var(--{name})" for colour, name in zip(LINES, "abcdefgh", strict=True)
}
DECADES = 100  # times the lowest value of a curve that the highest is: a linear axis would show the highest alone
_STYLE = {
    "axes.edgecolor": _LINE, "axes.labelcolor": _TEXT, "font.size": 10, "grid.color": _LINE, "text.color": _TEXT,
    "xtick.color": _TEXT, "ytick.color": _TEXT,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for and programs can search
    "svg.fonttype": "none", "svg.hashsalt": "instructft",  # text as text; the same run gives the same bytes
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: as the legend says it.
        points: (step, value), steps rising; values are finite.
        dots: mark each point, for values that are few.
        from_zero: the axis begins at zero, for what is read as a height.
        band: (step, low, high), the interval of each point that has one.
        colour: its place in `LINES`; default: that in the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    from_zero: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """What the page shows of a chart: the drawing, and its values as a table.

    Args:
        keys: name and last value of each line.
        head, rows: of the table.
        colours: of the lines, as places in `LINES`.
    """

    title: str
    unit: str
    svg: str
    keys: list[tuple[str, str]]
    head: list[str]
    rows: list[list[str]]
    colours: Sequence[int] = range(len(LINES))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`."""
    return read_log(run / "metrics.jsonl")


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn or written.

    >>> finite(1.5), finite(float("nan")), finite("nan")
    (True, False, False)
    """
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float) -> str:
    """A value as a person reads it: four figures at most.

    >>> number(0.000123456), number(12033.28), number(1.5), number(0.0)
    ('1.235e-04', '12,033', '1.5', '0')
    """
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e9):
        return f"{value:.3e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` points, of which each stretch keeps its lowest and its highest: no spike is lost.

    >>> thinned([(0, 1.0), (1, 9.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.0)], 4)
    [(0, 1.0), (1, 9.0), (3, 1.0), (5, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / max(most // 2, 1))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def series_of(records: Sequence[dict[str, Any]], key: str, name: str, **more: Any) -> Series:
    """One line of a chart, from the lines of `metrics.jsonl`, with its interval where `key_low` and `key_high` are."""
    low, high = f"{key}_low", f"{key}_high"
    band = [(r["step"], r[low], r[high]) for r in records if finite(r.get(low)) and finite(r.get(high))]
    return Series(name, [(r["step"], r[key]) for r in records if finite(r.get(key))], band=band, **more)


def plot_loss(run: Path, title: str) -> list[Path]:
    """Draw training and validation loss over steps, with perplexity on the right-hand axis.

    Returns the files written, `loss.png` and `loss.pdf`; none when nothing was logged.
    """
    import matplotlib

    records = read_metrics(run)
    series = [series_of(records, "loss", "training"), series_of(records, "eval_loss", "validation", dots=True)]
    if not any(line.points for line in series):
        return []
    paths = [run / "loss.png", run / "loss.pdf"]
    with matplotlib.rc_context(_STYLE):
        fig, ax = _axes(7.2, 4.2)
        _draw(ax, series)
        if not _log_axis(ax, series):
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        ax.set_title(title, loc="left", fontsize=11, parse_math=False)
        ax.set_ylabel("loss (nats per supervised token)")
        ax.legend(frameon=False)
        _perplexity_axis(ax)
        _lay_out(fig)
        fig.savefig(paths[0], dpi=160)
        fig.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def chart(title: str, series: Sequence[Series], unit: str = "") -> Chart | None:
    """Lines over steps; None where no series has a point."""
    import matplotlib

    series = [line for line in series if line.points]
    if not series:
        return None
    values = [value for line in series for _, value in line.points]
    values += [value for line in series for _, *span in line.band for value in span]
    said = ", ".join(f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in series)
    with matplotlib.rc_context(_STYLE):
        fig, ax = _axes()
        _draw(ax, series)
        low, high = min(values), max(values)
        if _log_axis(ax, series):
            unit = f"{unit}, on a log axis".removeprefix(", ")
        elif 0 <= low < 0.5 * high or low == high >= 0 or any(line.from_zero for line in series):
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        svg = _svg(fig, title, said)
    at = [dict(line.points) for line in series]
    steps = sorted({step for line in series for step, _ in thinned(line.points, MOST_ROWS)})
    rows = [[f"{step:,.0f}", *(number(found[step]) if step in found else "" for found in at)] for step in steps]
    head = ["step", *(line.name for line in series)]
    for line in (line for line in series if line.band):
        spans = {step: f"{number(low)} to {number(high)}" for step, low, high in line.band}
        head.append("95% interval")
        rows = [[*row, spans.get(step, "")] for step, row in zip(steps, rows, strict=True)]
    keys = [(line.name, number(line.points[-1][1])) for line in series]
    colours = [_colour(line, at) for at, line in enumerate(series)]
    return Chart(title, unit, svg, keys, head, rows, colours)


def bars(title: str, edges: Sequence[int], counts: Sequence[int], unit: str = "") -> Chart:
    """A histogram of whole numbers; `counts[i]` lies from `edges[i]` up to, not at, `edges[i + 1]`.

    Raises:
        ValueError: there are not as many bars as gaps between edges.
    """
    import matplotlib

    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} bars need {len(counts) + 1} edges, found {len(edges)}")
    gaps = list(itertools.pairwise(edges))
    with matplotlib.rc_context(_STYLE):
        fig, ax = _axes()
        ax.bar(edges[:-1], counts, [0.92 * (right - left) for left, right in gaps], align="edge", color=_TRAINING)
        ax.set_xlabel(unit)
        svg = _svg(fig, title, f"{sum(counts):,} rows")
    names = [f"{left:,} to {right - 1:,}" if right - left > 1 else f"{left:,}" for left, right in gaps]
    rows = [[name, f"{count:,}"] for name, count in zip(names, counts, strict=True)]
    return Chart(title, "", svg, [], [unit, "rows"], rows)


def _axes(width: float = 5.6, height: float = 3.1) -> tuple[Any, Any]:
    """A figure of so many inches that belongs to no window."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    ax = fig.add_subplot()
    ax.grid(axis="y", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.tick_params(length=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_tick)
    ax.locator_params(nbins=6)
    ax.locator_params(axis="x", integer=True)  # steps, and tokens, are whole
    return fig, ax


def _tick(value: float, at: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _colour(line: Series, at: int) -> int:
    return (at if line.colour is None else line.colour) % len(LINES)


def _log_axis(ax: Any, series: Sequence[Series]) -> bool:
    """Make the axis of values logarithmic where these span decades; whether it is."""
    values = [value for line in series for _, value in line.points]
    if any(line.from_zero for line in series) or min(values) <= 0 or max(values) < DECADES * min(values):
        return False
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_tick)
    ax.yaxis.set_minor_formatter(lambda value, at: "")
    ax.tick_params(which="minor", length=0)
    return True


def _draw(ax: Any, series: Sequence[Series]) -> None:
    for at, line in enumerate(series):
        if line.points:
            colour = LINES[_colour(line, at)]
            steps, values = zip(*thinned(line.points, MOST_POINTS), strict=True)
            dots = "o" if line.dots or len(steps) == 1 else ""
            label = f"{line.name}, at last {values[-1]:.3f}"
            ax.plot(steps, values, color=colour, marker=dots, markersize=4, linewidth=1.5, label=label)
        if line.band:
            steps, low, high = zip(*line.band, strict=True)
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.set_xlabel("step")
    ax.margins(x=0.02)


def _perplexity_axis(ax: Any) -> None:
    """Perplexity, exp(loss), at round figures on the right-hand side."""
    import numpy as np

    to_perplexity = (lambda loss: np.exp(np.clip(loss, -50, 50)), lambda ppl: np.log(np.clip(ppl, 1e-20, None)))
    right = ax.secondary_yaxis("right", functions=to_perplexity)
    right.set_ylabel("perplexity")
    right.spines["right"].set_visible(False)
    right.minorticks_off()
    near_one = [1 + step / 1000 for step in (1, 2, 5, 10, 20, 50, 100, 200, 500)] if ax.get_yscale() == "log" else []
    steps = [1, *near_one, *(10**power * step for power in range(6) for step in (1, 2, 5) if 10**power * step > 1)]
    to_height = ax.transScale + ax.transLimits  # of a loss: the share of the axis below it
    ticks: list[float] = []
    low, high = ax.get_ylim()
    for step in steps:
        if not low <= np.log(step) <= high:
            continue
        heights = [to_height.transform((0, np.log(one)))[1] for one in (step, *ticks[-1:])]
        if len(heights) < 2 or heights[0] - heights[1] > _APART:
            ticks.append(step)
    right.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])


def _lay_out(fig: Any) -> None:
    """Place what a figure holds, once: `savefig` would do so for each file, and draw all of it once more for that."""
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")


def _svg(fig: Any, title: str, said: str) -> str:
    """A figure as SVG for the middle of a page, with a title and a description for who cannot see it."""
    for artist in fig.findobj(lambda one: hasattr(one, "set_clip_on")):
        artist.set_clip_on(False)  # a clip path has an id, which another chart on the page could have too
    _lay_out(fig)
    written = io.StringIO()
    fig.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', text, count=1)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)  # the page's own
    start = text.index(">") + 1
    return f"{text[:start]}<title>{escape(title)}</title><desc>{escape(said)}</desc>{text[start:]}"
