"""Draws shares as bars with an interval, one row each, as inline SVG in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.report.markup import Html, element


@dataclass(frozen=True)
class Bar:
    """One row."""

    label: str
    value: float
    """In [0, 1]."""
    interval: tuple[float, float] | None
    text: str
    """The value in words."""
    note: str = ""


def bar_table(caption: str, bars: Sequence[Bar]) -> Html:
    """The bars below one another; the numbers stand beside them, so that the drawing is not needed to read them."""
    rows = []
    for bar in bars:
        value = element("td", element("b", bar.text), element("span", f" {bar.note}", class_="note"))
        drawing = element("td", bar_drawing(bar.value, bar.interval), class_="drawing")
        rows.append(element("tr", element("th", bar.label, scope="row"), drawing, value))
    return element("table", element("caption", caption), element("tbody", rows), class_="accuracies")


def bar_drawing(value: float, interval: tuple[float, float] | None) -> Html:
    """A bar from 0 to ``value`` on a track from 0 to 1, with a whisker over the interval."""
    whisker = None
    if interval is not None:
        low, high = max(interval[0], 0.0), min(interval[1], 1.0)
        whisker = [
            element("line", x1=_share(low), x2=_share(high), y1=9, y2=9, class_="whisker"),
            element("line", x1=_share(low), x2=_share(low), y1=5, y2=13, class_="whisker"),
            element("line", x1=_share(high), x2=_share(high), y1=5, y2=13, class_="whisker"),
        ]
    return element(
        "svg",
        element("rect", x=0, y=3, width=100, height=12, class_="track"),
        element("rect", x=0, y=3, width=_share(value), height=12, class_="bar"),
        whisker,
        viewBox="0 0 100 18",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _share(value: float) -> str:
    return f"{100 * value:.2f}"
