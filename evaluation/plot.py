"""Small plots as inline SVG, coloured by the page's own style sheet: two logarithmic axes, points, lines, labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 600, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 150, 30, 46  # margins; labels of series stand in the right one
_LINE = 13.0  # height of a label


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        x: positive.
        y: positive.
        told: what the mouse is told of it.
    """

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        name: written beside the last point.
        colour: a class of the page's style sheet.
        points: from left to right.
    """

    name: str
    colour: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line: something that has a height and no place on the axis."""

    name: str
    colour: str
    y: float


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis over `low` to `high`, drawn from pixel `start` to `end`, with labelled `ticks`."""

    label: str
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    x_ticks: Sequence[float] = (),
) -> str:
    """An SVG element.

    Args:
        title: above the plot, and what a screen reader says first.
        x_label: under the logarithmic axis.
        y_label: beside the logarithmic axis.
        series: with their points; several are joined by a line.
        levels: dashed horizontal lines.
        x_ticks: where the axis has labels; none: at 1, 2 and 5 times powers of ten.
    """
    points = [point for one in series for point in one.points]
    xs, ys = [point.x for point in points], [point.y for point in points] + [level.y for level in levels]
    x = _axis(x_label, xs, _LEFT, _WIDTH - _RIGHT, x_ticks)
    y = _axis(y_label, ys, _HEIGHT - _BOTTOM, _TOP, ())
    ends = [_End(one.name, one.colour, x(one.points[-1].x), y(one.points[-1].y)) for one in series]
    ends += [_End(level.name, level.colour, x.end, y(level.y)) for level in levels]
    marks = [_series(one, x, y) for one in series] + [_level(level, y) for level in levels]
    named = zip(ends, _apart([end.y for end in ends], y.end, y.start), marks, strict=True)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
        *_frame(x, y),
        *(f'<g class="{end.colour}">{_label(end, height, x.end)}{mark}</g>' for end, height, mark in named),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _End:
    """Where a series ends and its name belongs, in pixels."""

    name: str
    colour: str
    x: float
    y: float


def _axis(label: str, values: Sequence[float], start: float, end: float, ticks: Sequence[float]) -> Axis:
    """From a little below the smallest value to a little above the largest one."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.08)
    low, high = low / margin, high * margin
    given = ticks or _round_numbers(low, high)
    return Axis(label, low, high, start, end, tuple(tick for tick in given if low <= tick <= high))


def _round_numbers(low: float, high: float) -> list[float]:
    """Round values in the range: powers of ten alone, or as many between them as it takes for three labels."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        values = [digit * 10.0**n for n in decades for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if len(inside) > 2:
            return inside
    return [low, (low * high) ** 0.5, high]


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in x.ticks:
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="rule" x1="{at}" x2="{at}" y1="{y.start}" y2="{y.end}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{y.start + 16}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y.ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="rule" x1="{x.start}" x2="{x.end}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    middle, height = (x.start + x.end) / 2, (y.start + y.end) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f'transform="rotate(-90 14 {height})"'
    parts.append(f'<text class="axis" x="14" y="{height}" text-anchor="middle" {turned}>{escape(y.label)}</text>')
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _level(level: Level, y: Axis) -> str:
    at = f"{y(level.y):.1f}"
    told = f"<title>{escape(level.name)}: {level.y:.3g}</title>"
    return f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}">{told}</line>'


def _series(one: Series, x: Axis, y: Axis) -> str:
    places = [(x(point.x), y(point.y)) for point in one.points]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts = [f'<polyline class="line" points="{line}"/>'] if len(places) > 1 else []
    for (a, b), point in zip(places, one.points, strict=True):
        told = f"<title>{escape(point.told)}</title>"
        parts.append(f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="4">{told}</circle>')
    return "".join(parts)


def _label(end: _End, height: float, edge: float) -> str:
    """The name in the right margin at `height`, with a thin line to the point that it belongs to."""
    lead = f"{end.x + 6:.1f},{end.y:.1f} {edge + 2:.1f},{end.y:.1f} {edge + 12:.1f},{height:.1f}"
    text = f'<text class="name" x="{edge + 15:.1f}" y="{height + 4:.1f}">{escape(end.name)}</text>'
    return f'<polyline class="lead" points="{lead}"/>{text}'


def _apart(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Heights in their order, moved as far as a line of text each needs, and back where they ran over the end."""
    step = min(_LINE, (high - low) / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    out = list(heights)
    floor, limit = low, high
    for i in order:
        out[i] = max(out[i], floor)
        floor = out[i] + step
    for i in reversed(order):
        out[i] = min(out[i], limit)
        limit = out[i] - step
    return out
