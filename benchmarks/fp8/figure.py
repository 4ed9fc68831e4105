"""The result of ``run.py`` as an SVG: one row a precision, one column a question about it."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

COLOURS = {"bf16": "#8c8c8c", "tensorwise": "#1f6f8b", "blockwise": "#5b7f3a", "mxfp8": "#a3527d", "delayed": "#c28e2c"}
TITLES = {"everything": "all passes in FP8", "scoring": "only the counterfactual passes in FP8"}
LABEL, BAR, GAP, LINE, TOP = 190, 130, 74, 18, 92
WIDTH = LABEL + 4 * (BAR + GAP)


def draw(report: dict[str, Any]) -> str:
    """A complete SVG document."""
    entries = report["results"]
    columns = [_column(entries, index) for index in range(4)]
    parts, y = [_header()], TOP
    for case, title in TITLES.items():
        parts.append(f'<text x="8" y="{y}" class="title">{escape(title)}</text>')
        for row, entry in enumerate(entries):
            # bf16 has no FP8 pass in either case: it stands above both, to compare with.
            if entry["case"] != case and entry["name"] != "bf16":
                continue
            y += LINE
            parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end">{escape(_label(entry))}</text>')
            parts += [_bar(column, *values[row], y=y, name=entry["name"]) for column, values in enumerate(columns)]
        y += 2 * LINE
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.small{font-size:11px;fill:#555}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="Key tokens and gradients in FP8 against fp32"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _header() -> str:
    titles = (
        ("log-probs off by", "mean, video hidden, in nats"),
        ("key tokens differ", "of those either run chooses"),
        ("gradient turned by", "of the whole model"),
        ("key tokens lost", "gradient rounded away"),
    )
    headline = "One training step of the tiny model against the same step in fp32. Shorter bars are better."
    return f'<text x="8" y="18">{headline}</text>' + "".join(
        f'<text x="{LABEL + index * (BAR + GAP)}" y="44" class="title">{title}</text>'
        f'<text x="{LABEL + index * (BAR + GAP)}" y="60" class="small">{more}</text>'
        for index, (title, more) in enumerate(titles)
    )


def _column(entries: list[dict[str, Any]], index: int) -> list[tuple[float | None, float, str]]:
    """Value, share of the column's largest, and text of every entry."""
    read, form = (
        (lambda entry: entry["against_fp32"]["logprob_error_hidden_mean"], "{:.3f}"),
        (lambda entry: _rest(entry["against_fp32"]["agreement_union"]), "{:.1%}"),
        (lambda entry: _degrees(entry["against_fp32"]["gradient_cosine"]), "{:.1f}°"),
        (lambda entry: 0.0 if entry["name"] == "bf16" else entry.get("quantised_rows_lost_last_fc2"), "{:.1%}"),
    )[index]
    found = [read(entry) for entry in entries]
    largest = max((value for value in found if value is not None), default=0.0) or 1.0
    return [(value, (value or 0.0) / largest, "" if value is None else form.format(value)) for value in found]


def _bar(column: int, value: float | None, share: float, text: str, *, y: int, name: str) -> str:
    if value is None:
        return ""
    x, width = LABEL + column * (BAR + GAP), max(1.0, BAR * share)
    colour = COLOURS[name.split(",")[0].split(" ")[0]]
    return (
        f'<rect x="{x}" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>'
        f'<text x="{x + width + 4:.1f}" y="{y}">{text}</text>'
    )


def _label(entry: dict[str, Any]) -> str:
    return "bf16, no FP8" if entry["name"] == "bf16" else entry["name"]


def _degrees(cosine: float | None) -> float | None:
    return None if cosine is None else math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def _rest(agreement: float | None) -> float | None:
    return None if agreement is None else 1 - agreement
