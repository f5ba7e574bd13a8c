"""Curves and bars for `report.html`, drawn as inline SVG: no library, no script, values shown on hover.

Colours are CSS variables of the page, so that a chart is light or dark as the page is. Each point has a strip of its
own that shows its value when the pointer, or a finger, is on it::

    chart("Loss", [Series("training", [(10, 2.1), (20, 1.7)])], unit="nats per token")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 236  # of a chart, in the units of its drawing; it is as wide as the page lets it be
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 38
MOST_POINTS = 600  # drawn in a line
MOST_STRIPS = 160  # that show a value


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: as the legend says it.
        points: (step, value), steps rising; values are finite.
        dots: mark each point, for values that are few.
        from_zero: the axis begins at zero, for what is read as a height.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    from_zero: bool = False


def number(value: float) -> str:
    """A value as a person reads it: four figures at most.

    >>> number(0.000123456), number(12033.28), number(1.5), number(0.0)
    ('1.235e-04', '12,033', '1.5', '0')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round figures from `low` to `high`, at most `most` + 1 of them.

    >>> ticks(0, 7.1)
    [0.0, 2.0, 4.0, 6.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


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
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def chart(title: str, series: Sequence[Series], unit: str = "") -> str:
    """Lines over steps as one `<figure>`; "" where no series has a point."""
    series = [line for line in series if line.points]
    if not series:
        return ""
    values = [value for line in series for _, value in line.points]
    steps = [step for line in series for step, _ in line.points]
    low, high = min(values), max(values)
    zero = 0 <= low < 0.5 * high or low == high > 0 or any(line.from_zero for line in series)
    low = min(low, 0.0) if zero else low - 0.05 * (high - low)
    high = high + 0.05 * (high - low) if high > low else low + 1
    frame = _Frame(min(steps), max(steps), low, high)
    drawn = [frame.axes("step")]
    for n, line in enumerate(series):
        points = thinned(line.points, MOST_POINTS)
        path = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in points)
        drawn.append(f'<polyline class="s{n}" points="{path}"/>')
        if line.dots or len(points) == 1:
            drawn += [
                f'<circle class="d{n}" cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.5"/>'
                for s, v in thinned(points, MOST_STRIPS)
            ]
    drawn.append(_strips(frame, series))
    keys = "".join(
        f'<span class="key"><i class="b{n}"></i>{escape(line.name)} <b>{number(line.points[-1][1])}</b></span>'
        for n, line in enumerate(series)
    )
    said = ", ".join(f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in series)
    return _figure(title, unit, keys, f"{title}: {said}", "".join(drawn))


def bars(title: str, edges: Sequence[int], counts: Sequence[int], unit: str = "") -> str:
    """A histogram of whole numbers as one `<figure>`; `counts[i]` lies from `edges[i]` up to, not at, `edges[i + 1]`.

    Raises:
        ValueError: there are not as many bars as gaps between edges.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} bars need {len(counts) + 1} edges, found {len(edges)}")
    frame = _Frame(edges[0], edges[-1], 0, max([*counts, 1]) * 1.05)
    drawn = [frame.axes(unit)]
    for (left, right), count in zip(itertools.pairwise(edges), counts, strict=True):
        x, width, y = frame.x(left), frame.x(right) - frame.x(left), frame.y(count)
        text = f"{left:,} to {right - 1:,}: {count:,}" if right - left > 1 else f"{left:,}: {count:,}"
        drawn.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 1):.1f}" ')
        drawn.append(f'height="{frame.bottom - y:.1f}"/>')
        drawn.append(frame.strip(x, x + width, x + width / 2, [text], []))
    return _figure(title, "", "", f"{title}: {sum(counts):,} rows", "".join(drawn))


@dataclass(frozen=True)
class _Frame:
    """Where a value lies in the drawing."""

    left: float
    right: float
    low: float
    high: float

    bottom = HEIGHT - _BOTTOM

    def x(self, step: float) -> float:
        share = (step - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - _TOP)

    def axes(self, below: str) -> str:
        drawn = []
        for value in ticks(self.low, self.high, 4):
            y = self.y(value)
            drawn.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
        for value in ticks(self.left, self.right, 4):
            drawn.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - 21}" text-anchor="middle">{_tick(value)}</text>')
        drawn.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(below)}</text>')
        return "".join(drawn)

    def strip(
        self, left: float, right: float, x: float, lines: Sequence[str], dots: Sequence[tuple[int, float]]
    ) -> str:
        """What lies under the pointer between two places: a line, dots, and a small label that stays inside."""
        width = 7.0 * max(map(len, lines)) + 14
        at = min(max(x - width / 2, 2), WIDTH - width - 2)
        shown = [f'<line class="cursor" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{self.bottom}"/>'] if dots else []
        shown += [f'<circle class="d{n}" cx="{x:.1f}" cy="{self.y(value):.1f}" r="4"/>' for n, value in dots]
        size = f'width="{width:.1f}" height="{16 * len(lines) + 6}"'
        shown.append(f'<rect class="tip" x="{at:.1f}" y="1" rx="4" {size}/>')
        for n, line in enumerate(lines):
            shown.append(f'<text class="tip" x="{at + 7:.1f}" y="{16 * n + 16}">{escape(line)}</text>')
        hit = f'<rect class="hit" x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" height="{self.bottom}"/>'
        return f'<g class="p">{hit}<g class="now">{"".join(shown)}</g></g>'


def _tick(value: float) -> str:
    """A figure at an axis, short.

    >>> _tick(12000), _tick(0.0005), _tick(2.5)
    ('12k', '5e-4', '2.5')
    """
    if value and (abs(value) < 1e-3):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.6g}"


def _strips(frame: _Frame, series: Sequence[Series]) -> str:
    """One strip for each step that is shown, with the values of all series at it."""
    at = [dict(line.points) for line in series]
    steps = sorted({step for line in series for step, _ in thinned(line.points, MOST_STRIPS)})
    places = [frame.x(step) for step in steps]
    borders = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), WIDTH - _RIGHT]
    drawn = []
    for n, step in enumerate(steps):
        known = [(m, found[step]) for m, found in enumerate(at) if step in found]
        lines = [f"step {step:,.0f}", *(f"{series[m].name} {number(value)}" for m, value in known)]
        drawn.append(frame.strip(borders[n], borders[n + 1], places[n], lines, known))
    return "".join(drawn)


def _figure(title: str, unit: str, keys: str, said: str, drawn: str) -> str:
    unit = f' <span class="facts">{escape(unit)}</span>' if unit else ""
    keys = f'<div class="keys">{keys}</div>' if keys else ""
    return (
        f"<figure><figcaption><h3>{escape(title)}{unit}</h3>{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{drawn}</svg></figure>'
    )
