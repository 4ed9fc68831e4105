"""The result of ``run.py`` as an SVG of horizontal bars: CPU time by point and side, then memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

SIDES = {
    "ours_recomputed": ("this project", "#1f6f8b"),
    "ours": ("this project, nothing recomputed", "#6aa9bd"),
    "strong": ("Hugging Face, vision once, few logits", "#c28e2c"),
    "weak": ("Hugging Face, as usually written", "#8c8c8c"),
}
OURS = "ours_recomputed"
"""What the others are multiples of: recomputes what the baselines do."""
OBJECTIVES = {
    "grpo": "GRPO",
    "ktr_frame": "Video-KTR, frames shuffled",
    "ktr_temporal_patch": "Video-KTR, temporal patches shuffled",
    "grpo_no_reference": "GRPO without reference model",
    "ktr_frame_no_reference": "Video-KTR, frames, without reference",
}
LABEL, BAR, VALUE, LINE = 290, 420, 130, 18
WIDTH = LABEL + BAR + VALUE


@dataclass(frozen=True)
class Row:
    label: str
    colour: str
    value: float
    text: str


def draw(report: dict[str, Any]) -> str:
    """A complete SVG document."""
    parts, y = [], LINE
    for title, rows in _blocks(report):
        parts.append(f'<text x="8" y="{y}" class="title">{escape(title)}</text>')
        longest = max(row.value for row in rows)
        for row in rows:
            y += LINE
            width = max(1.0, BAR * row.value / longest)
            parts.append(
                f'<text x="{LABEL - 8}" y="{y}" text-anchor="end">{escape(row.label)}</text>'
                f'<rect x="{LABEL}" y="{y - 11}" width="{width:.1f}" height="13" fill="{row.colour}"/>'
                f'<text x="{LABEL + width + 4:.1f}" y="{y}">{escape(row.text)}</text>'
            )
        y += 2 * LINE
    height = y - LINE
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Time and memory of a training step by implementation"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _blocks(report: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """(title, rows): time by point, in order; memory where it was measured; objectives."""
    points: dict[str, list[dict[str, Any]]] = {}
    for entry in report["results"]:
        points.setdefault(entry["point"], []).append(entry)
    times = [(f"CPU time of a step: {_size(entries[0])}", _rows(entries, "seconds")) for entries in points.values()]
    memories = [
        (f"Peak memory of a step: {_size(entries[0])}", _rows(entries, "allocator_bytes"))
        for entries in points.values()
        if all("allocator_bytes" in entry for entry in entries)
    ]
    objectives = [
        Row(OBJECTIVES[entry["objective"]], SIDES["ours"][1], entry["seconds"], f"{entry['seconds']:.2f} s")
        for entry in report["objectives"]
    ]
    title = "CPU time in this project by objective, nothing recomputed: 1,024 visual tokens, 8 responses of 128"
    return [*times, *memories, *([(title, objectives)] if objectives else [])]


def _size(entry: dict[str, Any]) -> str:
    return (
        f"{entry['visual']:,} visual tokens, 8 responses of {entry['response']}; {entry['layers']} layers, "
        f"vocabulary {entry['vocabulary']:,}"
    )


def _rows(entries: list[dict[str, Any]], quantity: str) -> list[Row]:
    values = {entry["side"]: entry[quantity] for entry in entries}
    rows = []
    for side in sorted(values, key=list(SIDES).index):
        (label, colour), value = SIDES[side], values[side]
        text = f"{value:.2f} s" if quantity == "seconds" else f"{value / 1e6:,.0f} MB"
        if side != OURS:
            text += f", {value / values[OURS]:.1f} x"
        rows.append(Row(label, colour, value, text))
    return rows
