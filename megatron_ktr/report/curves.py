"""Draws curves over steps as inline SVG, without a library. The charts are readable without colour and without sight.

Each chart is a figure with a title, the drawing, and a table that gives the first, last, lowest and highest value of
each curve and is also the legend. Lines differ in colour and dashes, areas in colour and hatching. If there are more
than ``MAX_POINTS`` steps, equal stretches of steps are averaged, and a band shows the lowest and highest value of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_ktr.report.markup import Html, element, format_number

MAX_POINTS = 240
WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 24
_MAX_HOVER = 60
"""The largest number of strips in one chart that show values under the pointer."""
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "1 3")
NUM_STYLES = 6
"""The number of classes s0 .. s5 in the style sheet. A seventh curve uses s0 again."""


@dataclass(frozen=True)
class Series:
    """One curve. NaN means that a step has no value."""

    label: str
    values: tuple[float, ...]
    style: int = 0
    """The number of the colour (and hatching), 0 .. NUM_STYLES - 1."""
    dash: int = 0
    """The number of the dash pattern, 0 (solid) .. NUM_STYLES - 1."""


@dataclass(frozen=True)
class Point:
    """One stretch of steps, usually a single step, with its mean, lowest and highest finite value; NaN without any."""

    first_step: int
    last_step: int
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first_step + self.last_step) / 2


def downsample(steps: Sequence[int], values: Sequence[float], *, max_points: int = MAX_POINTS) -> list[Point]:
    """At most ``max_points`` points that cover all steps. Their stretches differ in length by at most one step.

    >>> downsample([1, 2, 3, 4], [0.0, 2.0, 4.0, 8.0], max_points=2)[1]
    Point(first_step=3, last_step=4, mean=6.0, low=4.0, high=8.0)
    """
    num_points = min(len(steps), max_points)
    points = []
    for index in range(num_points):
        start, end = len(steps) * index // num_points, len(steps) * (index + 1) // num_points
        finite = [value for value in values[start:end] if math.isfinite(value)] or [math.nan]
        mean = math.fsum(finite) / len(finite) if len(finite) > 1 else finite[0]
        points.append(Point(steps[start], steps[end - 1], mean, min(finite), max(finite)))
    return points


class Scale:
    """Maps values on one axis to pixels. The scale may be logarithmic if all values are positive and span more than a
    factor of 100."""

    def __init__(self, values: Sequence[float], *, start: float, end: float, may_be_log: bool = False) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        self.is_log = may_be_log and low > 0 and high / low > 100
        if self.is_log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):  # a flat line in the middle
            room = abs(high) * 0.1 or 1.0
            low, high = low - room, high + room
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.is_log:
            value = math.log10(value)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, *, is_whole: bool = False) -> list[float]:
        """A few round values inside the range, for the ticks of the axis."""
        span = self.high - self.low
        if self.is_log and span > 1.5:
            step = math.ceil(span / 4)
            return [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1, step)]
        unit = 10.0 ** math.floor(math.log10(span / 4))
        step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
        if is_whole:
            step = max(step, 1.0)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def line_chart(
    title: str, steps: Sequence[int], series: Sequence[Series], *, note: str = "", from_zero: bool = False
) -> Html:
    """A figure with lines over ``steps``. A line has gaps where values are not finite; a value between two gaps is a
    dot."""
    drawn = [(item, downsample(steps, item.values)) for item in series]
    values = [value for _, points in drawn for point in points for value in (point.low, point.high)]
    y = Scale([*values, 0.0] if from_zero else values, start=HEIGHT - BOTTOM, end=TOP, may_be_log=not from_zero)
    x = Scale(steps, start=LEFT, end=WIDTH - RIGHT)
    marks = []
    for item, points in drawn:
        for run in _runs(points):
            if any(point.high > point.low for point in run):
                band = [(x(p.x), y(p.high)) for p in run] + [(x(p.x), y(p.low)) for p in reversed(run)]
                marks.append(element("polygon", points=_coordinates(band), class_=f"band s{item.style}"))
            where = [(x(point.x), y(point.mean)) for point in run]
            if len(run) == 1:
                marks.append(element("circle", cx=_px(where[0][0]), cy=_px(where[0][1]), r=3, class_=f"s{item.style}"))
            else:
                dash = _DASHES[item.dash] or None
                line = element("polyline", points=_coordinates(where), class_=f"s{item.style}", stroke_dasharray=dash)
                marks.append(line)
    notes = [note, "logarithmic scale" if y.is_log else "", _gaps_note(series)]
    return _figure(title, notes=notes, x=x, y=y, marks=marks, drawn=drawn, swatch=_line_swatch)


def stacked_chart(title: str, steps: Sequence[int], series: Sequence[Series], *, note: str = "", prefix: str) -> Html:
    """A figure with areas on top of each other, the first series at the bottom. Values that are not finite count as 0.

    ``prefix`` makes the ids of the hatchings unique on the page.
    """
    cleaned = [Series(s.label, tuple(v if math.isfinite(v) else 0.0 for v in s.values), s.style) for s in series]
    drawn = [(item, downsample(steps, item.values)) for item in cleaned]
    columns = zip(*([point.mean for point in points] for _, points in drawn), strict=True)
    levels = [[0.0, *accumulate(column)] for column in columns]
    y = Scale([0.0, *(column[-1] for column in levels)], start=HEIGHT - BOTTOM, end=TOP)
    x = Scale(steps, start=LEFT, end=WIDTH - RIGHT)
    marks: list[Html] = [element("defs", *(_hatching(f"{prefix}-{item.style}", item.style) for item in series))]
    for number, (item, points) in enumerate(drawn):
        centres = [x(point.x) for point in points]
        if len(points) == 1:  # one step: a bar
            centres, column = [centres[0] - 20, centres[0] + 20], [levels[0], levels[0]]
        else:
            column = levels
        above = [(where, y(level[number + 1])) for where, level in zip(centres, column, strict=True)]
        below = [(where, y(level[number])) for where, level in zip(centres, column, strict=True)]
        outline = _coordinates(above + below[::-1])
        marks.append(element("polygon", points=outline, class_=f"area s{item.style}"))
        marks.append(element("polygon", points=outline, fill=f"url(#{prefix}-{item.style})", class_="hatch"))

    def swatch(item: Series) -> Html:
        return _area_swatch(f"{prefix}-{item.style}", item.style)

    return _figure(title, notes=[note], x=x, y=y, marks=marks, drawn=drawn[::-1], swatch=swatch)


def _figure(title, *, notes, x, y, marks, drawn, swatch) -> Html:
    notes = [note for note in notes if note]
    summary = "; ".join(f"{item.label}: {_in_words(points)}" for item, points in drawn)
    drawing = element(
        "svg",
        _axes(x, y),
        marks,
        _hover(x, drawn),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} over steps. {summary}.",
    )
    heading = element("figcaption", element("strong", title), [element("span", note, class_="note") for note in notes])
    return element("figure", heading, drawing, _legend(drawn, swatch), class_="chart")


def _axes(x: Scale, y: Scale) -> list[Html]:
    parts = []
    for value in y.ticks():
        at = _px(y(value))
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", format_number(value, digits=3), x=LEFT - 5, y=_px(y(value) + 3.5), class_="y"))
    for value in x.ticks(is_whole=True):
        if value != int(value) or not LEFT - 1 <= x(value) <= WIDTH - RIGHT + 1:
            continue
        at = x(value)
        anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
        parts.append(element("line", x1=_px(at), x2=_px(at), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick"))
        label = format_number(int(value))
        parts.append(element("text", label, x=_px(at), y=HEIGHT - 8, class_="x", text_anchor=anchor))
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    return parts


def _hover(x: Scale, drawn: Sequence[tuple[Series, Sequence[Point]]]) -> list[Html]:
    """Invisible strips that show the values under the pointer."""
    num_points = len(drawn[0][1])
    stride = -(-num_points // _MAX_HOVER)
    centres = [x(point.x) for point in drawn[0][1]][::stride]
    edges = [LEFT, *((a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)), WIDTH - RIGHT]
    strips = []
    for number, index in enumerate(range(0, num_points, stride)):
        texts = [f"{item.label} {format_number(points[index].mean)}" for item, points in drawn]
        title = element("title", f"{_span(drawn[0][1][index])}: {', '.join(texts)}")
        width = _px(edges[number + 1] - edges[number])
        strip = element(
            "rect", title, x=_px(edges[number]), y=TOP, width=width, height=HEIGHT - TOP - BOTTOM, class_="hover"
        )
        strips.append(strip)
    return strips


def _legend(drawn: Sequence[tuple[Series, Sequence[Point]]], swatch) -> Html:
    head = element("tr", element("td"), [element("th", name, scope="col") for name in ("first", "last", "min", "max")])
    rows = []
    for item, _ in drawn:
        finite = [value for value in item.values if math.isfinite(value)]
        numbers = [finite[0], finite[-1], min(finite), max(finite)] if finite else [math.nan] * 4
        name = element("th", swatch(item), " ", item.label, scope="row")
        rows.append(element("tr", name, [element("td", format_number(value, digits=3)) for value in numbers]))
    return element("table", element("thead", head), element("tbody", rows), class_="legend")


def _line_swatch(item: Series) -> Html:
    dash = _DASHES[item.dash] or None
    line = element("line", x1=0, x2=26, y1=5, y2=5, class_=f"s{item.style}", stroke_dasharray=dash)
    return element("svg", line, viewBox="0 0 26 10", class_="swatch", aria_hidden="true")


def _area_swatch(pattern: str, style: int) -> Html:
    fill = element("rect", width=26, height=10, class_=f"area s{style}")
    hatch = element("rect", width=26, height=10, fill=f"url(#{pattern})", class_="hatch")
    return element("svg", fill, hatch, viewBox="0 0 26 10", class_="swatch", aria_hidden="true")


def _hatching(name: str, style: int) -> Html:
    """Six hatchings: none, rising, falling, dots, level, upright lines."""
    drawings = {
        1: element("path", d="M0 6L6 0M-1 1L1 -1M5 7L7 5"),
        2: element("path", d="M0 0L6 6M-1 5L1 7M5 -1L7 1"),
        3: element("circle", cx=3, cy=3, r=1.1),
        4: element("path", d="M0 3L6 3"),
        5: element("path", d="M3 0L3 6"),
    }
    size = {"width": 6, "height": 6, "patternUnits": "userSpaceOnUse"}
    return element("pattern", drawings.get(style), id=name, **size)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The longest runs of neighbouring points with finite values."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.mean):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _gaps_note(series: Sequence[Series]) -> str:
    gaps = max((sum(not math.isfinite(value) for value in item.values) for item in series), default=0)
    return f"no finite value on {gaps:,} step{'s' if gaps > 1 else ''}" if gaps else ""


def _in_words(points: Sequence[Point]) -> str:
    finite = [point for point in points if math.isfinite(point.mean)]
    if not finite:
        return "no finite value"
    if len(finite) == 1:
        return f"{format_number(finite[0].mean)} at {_span(finite[0])}"
    first, last = finite[0], finite[-1]
    return f"{format_number(first.mean)} at {_span(first)}, {format_number(last.mean)} at {_span(last)}"


def _span(point: Point) -> str:
    if point.first_step == point.last_step:
        return f"step {point.first_step}"
    return f"steps {point.first_step} to {point.last_step}"


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_px(x)},{_px(y)}" for x, y in points)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
