"""The page of an evaluation: tables and charts that need no script, and below them every item, to be filtered.

The page comes with a folder ``frames`` beside it (``strips.py``), from which a browser loads what is looked at. All
text in tables is escaped here; the items travel as JSON, of which the script makes text (``evaluation_script.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.errors import printable
from megatron_ktr.report.bars import Bar, bar_table
from megatron_ktr.report.evaluation_script import SCRIPT, STYLE
from megatron_ktr.report.markup import Html, element
from megatron_ktr.report.page import Extras, whole_page, write_page
from megatron_ktr.report.strips import MediaPlace, StripFolder

GENERATOR = "Megatron-KTR evaluation"
LONG_TEXT = 40
"""Cells of more characters may break into lines."""
MANY_BARS = 14
"""Charts with more bars are folded."""
_VERDICTS = (("", "any"), ("right", "right"), ("wrong", "wrong"), ("partial", "between"))
_STATES = (
    *(("", "any"), ("problem", "could not be asked"), ("truncated", "truncated")),
    *(("unread", "no answer found"), ("no_format", "not in the format")),
)
_DIFFERS = (("", "any"), ("protocols", "between protocols"), ("models", "between models"))


@dataclass(frozen=True)
class PageTable:
    """One table; tables of one section stand together."""

    section: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class PageChart:
    """Accuracies as bars."""

    section: str
    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class PageMedium:
    """An image or video of some items."""

    group: str
    """The benchmark."""
    source: MediaSource


@dataclass(frozen=True)
class EvaluationPage:
    """All that the page shows."""

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    """Sentences that stand at the top, such as that the run is not complete."""
    notes: Sequence[str]
    """Lines about how the questions were asked."""
    tables: Sequence[PageTable]
    charts: Sequence[PageChart]
    data: Mapping[str, Any]
    """For the script: ``models``, ``conditions`` and ``protocols`` (names), ``benchmarks`` (name, title, axes) and
    ``items``. An item has b (benchmark), id, q (question), o (options), s (solution), c (categories, by axis), v
    (numbers of its media) and r (runs). A run has m (model), c (condition), j (score and answer, by protocol), f
    (flags), p (problem), t (responses) and n (frames, tokens of response and prompt, seconds)."""
    media: Sequence[PageMedium]
    places: Mapping[str, MediaPlace] = field(default_factory=dict)
    """By group. Media without a place are shown only if their strip is there already."""


def write_evaluation_page(path: Path, page: EvaluationPage) -> int:
    """Writes the page and the strips of its media that are not there yet, and returns the page's size in bytes.

    Raises:
        UserError: something is there that is no such page, or it cannot be written.
    """
    strips = StripFolder(path)
    media = [strips.find(one.source, group=one.group, place=page.places.get(one.group)) for one in page.media]
    extras = Extras(style=STYLE, script=SCRIPT, data={**page.data, "media": media}, generator=GENERATOR)
    return write_page(path, whole_page(printable(page.title), _body(page), extras=extras), generator=GENERATOR)


def _body(page: EvaluationPage) -> list[Html]:
    sections = list(dict.fromkeys([*(one.section for one in page.tables), *(one.section for one in page.charts)]))
    anchors = {name: f"section-{number}" for number, name in enumerate(sections, start=1)}
    links = [(f"#{anchor}", name) for name, anchor in anchors.items()] + [("#items", "Items")]
    header = element(
        "header",
        element("h1", printable(page.title)),
        [element("p", element("strong", printable(text)), class_="warning") for text in page.warnings],
        element("p", [element("span", f"{n} ", element("b", printable(v))) for n, v in page.facts], class_="facts"),
        _notes(page.notes),
        element("nav", element("ul", [element("li", element("a", name, href=href)) for href, name in links])),
    )
    shown = [
        element(
            "section",
            element("h2", name),
            [_table(table) for table in page.tables if table.section == name],
            [_chart(chart) for chart in page.charts if chart.section == name],
            id=anchor,
        )
        for name, anchor in anchors.items()
    ]
    return [
        header,
        element("main", shown, _browser(page.data)),
        element(
            "footer", "Made by tools/evaluate.py of Megatron-KTR. Pictures lie in the folder frames beside the page."
        ),
    ]


def _notes(notes: Sequence[str]) -> Html | None:
    if not notes:
        return None
    lines = element("ul", [element("li", printable(note)) for note in notes])
    return element("details", element("summary", "How the questions were asked"), lines, class_="note")


def _table(table: PageTable) -> Html:
    head = element("tr", [element("th", printable(name), scope="col") for name in table.head])
    rows = [
        element(
            "tr",
            element("th", printable(row[0]), scope="row"),
            [element("td", printable(c), class_="long" if len(c) > LONG_TEXT else None) for c in row[1:]],
        )
        for row in table.rows
    ]
    caption = element("caption", printable(table.title))
    # A box that scrolls must take the keyboard's focus.
    return element(
        "div",
        element("p", table.note, class_="note") if table.note else None,
        element(
            "div",
            element("table", caption, element("thead", head), element("tbody", rows), class_="figures"),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label=printable(table.title),
        ),
    )


def _chart(chart: PageChart) -> Html:
    bars = [Bar(printable(bar.label), bar.value, bar.interval, bar.text, bar.note) for bar in chart.bars]
    drawn = bar_table(printable(chart.title), bars)
    if len(bars) <= MANY_BARS:
        return drawn
    return element("details", element("summary", f"{printable(chart.title)}: {len(bars)} bars"), drawn)


def _browser(data: Mapping[str, Any]) -> Html:
    protocols = [("" if number == 0 else str(number), name) for number, name in enumerate(data["protocols"])]
    benchmarks = [(one["name"], one["title"]) for one in data["benchmarks"]]
    fields = [
        _select("benchmark", "Benchmark", [("", "all"), *benchmarks]),
        element("span", id="categories"),
        _select("model", "Model", [("", "any"), *_numbered(data["models"])]),
        _select("condition", "Condition", [("", "any"), *_numbered(data["conditions"])]),
        _select("protocol", "Protocol", protocols),
        _select("verdict", "Verdict", _VERDICTS),
        _select("state", "Response", _STATES),
        _select("differs", "Verdict differs", _DIFFERS if len(data["models"]) > 1 else _DIFFERS[:-1]),
        element("label", "Text", element("input", name="text", type="search", placeholder="in question or response")),
        element("button", "Clear", type="reset"),
    ]
    return element(
        "section",
        element("h2", "Items", id="items"),
        element("noscript", element("p", "The items need scripts. The tables above do not.", class_="warning")),
        element("form", fields, id="filters"),
        element("div", element("p", "", id="count", role="status"), _steps(), class_="pager"),
        element("div", id="list"),
        element("div", _steps(), class_="pager"),
    )


def _steps() -> list[Html]:
    buttons = ((-1, "Previous"), (1, "Next"))
    return [element("button", text, type="button", data_step=step, disabled=True) for step, text in buttons]


def _numbered(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(str(number), name) for number, name in enumerate(names)]


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> Html:
    choices = [element("option", printable(text), value=value) for value, text in options]
    return element("label", label, element("select", choices, name=name))
