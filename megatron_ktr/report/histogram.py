"""Draws how many of some things lie in each of equal ranges, as inline SVG with the numbers as a table beside it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ktr.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale
from megatron_ktr.report.markup import Html, element, format_number

_NUM_BARS = 20


def histogram(
    title: str, values: Sequence[float], *, limit: float | None = None, what: str = "", note: str = ""
) -> Html:
    """A figure with bars. ``limit`` is marked by a line; bars beyond it have the colour of warnings.

    Args:
        what: of the values, for people who hear the page: "tokens".
    """
    high = max([*values, limit or 0.0])
    width = max(1.0, (high or 1.0) / _NUM_BARS)
    counts = [0] * _NUM_BARS
    for value in values:
        counts[min(int(value / width), _NUM_BARS - 1)] += 1
    x = Scale([0.0, width * _NUM_BARS], start=LEFT, end=WIDTH - RIGHT)
    y = Scale([0.0, float(max(counts))], start=HEIGHT - BOTTOM, end=TOP)
    parts = _axes(x, y)
    for number, count in enumerate(counts):
        if not count:
            continue
        start, end = x(number * width), x((number + 1) * width)
        is_beyond = limit is not None and number * width >= limit
        words = f"{format_number(number * width)} to {format_number((number + 1) * width)} {what}: {count:,}"
        parts.append(
            element(
                "rect",
                element("title", words),
                x=f"{start + 0.5:.1f}",
                y=f"{y(count):.1f}",
                width=f"{max(end - start - 1, 1):.1f}",
                height=f"{HEIGHT - BOTTOM - y(count):.1f}",
                class_="bar beyond" if is_beyond else "bar",
            )
        )
    if limit is not None:
        at = f"{x(limit):.1f}"
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="limit"))
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2] if ordered else None
    summary = f"{len(values):,} values from {format_number(min(values, default=None))} to " + (
        f"{format_number(max(values, default=None))}, median {format_number(middle)} {what}"
    )
    drawing = element("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {summary}.")
    heading = element("figcaption", element("strong", title), element("span", note, class_="note") if note else None)
    return element("figure", heading, drawing, element("p", f"{summary}.", class_="note"), class_="chart")


def _axes(x: Scale, y: Scale) -> list[Html]:
    parts = []
    for value in y.ticks(is_whole=True):
        at = y(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="grid"))
        parts.append(element("text", format_number(value, digits=3), x=LEFT - 5, y=f"{at + 3.5:.1f}", class_="y"))
    for value in x.ticks(is_whole=True):
        at = x(value)
        anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            element("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick")
        )
        label = format_number(value)
        parts.append(element("text", label, x=f"{at:.1f}", y=HEIGHT - 8, class_="x", text_anchor=anchor))
    level = HEIGHT - BOTTOM
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="axis"))
    return parts
