"""The result of ``training_step.py`` as an SVG of horizontal bars: CPU time by point and side, memory beside it."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

SIDES = {
    "weak": ("Hugging Face, as usually written", "#8c8c8c"),
    "strong": ("Hugging Face, vision once, few logits", "#c28e2c"),
    "ours": ("this project", "#1f6f8b"),
    "ours_recomputed": ("this project, recomputed", "#6aa9bd"),
}
OBJECTIVES = {
    "grpo": "GRPO",
    "ktr_frame": "Video-KTR, frames shuffled",
    "ktr_temporal_patch": "Video-KTR, temporal patches shuffled",
}
LABEL, BAR, GAP, LINE, TOP = 290, 220, 130, 18, 40
WIDTH = LABEL + 2 * (BAR + GAP)


def draw(report: dict[str, Any]) -> str:
    """A complete SVG document."""
    parts, y = [], TOP
    for title, rows in _blocks(report):
        parts.append(f'<text x="8" y="{y}" class="title">{escape(title)}</text>')
        scales = [max(row[column] or 0.0 for row in rows) for column in (2, 3)]
        for label, colour, *values in rows:
            y += LINE
            parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end">{escape(label)}</text>')
            for column, (value, scale) in enumerate(zip(values, scales, strict=True)):
                if value is None:
                    continue
                x, width = LABEL + column * (BAR + GAP), max(1.0, BAR * value / scale)
                text = f"{value / 1e6:,.0f} MB" if column else f"{value:.2f} s"
                parts.append(
                    f'<rect x="{x}" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>'
                    f'<text x="{x + width + 4:.1f}" y="{y}">{text}</text>'
                )
        y += 2 * LINE
    header = (
        f'<text x="{LABEL}" y="16" class="title">CPU time of a step, one thread</text>'
        f'<text x="{LABEL + BAR + GAP}" y="16" class="title">peak memory of a step</text>'
    )
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="Time and memory of a training step by implementation"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{header}{"".join(parts)}</svg>\n'
    )


def _blocks(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, float, float | None]]]]:
    """(title, rows of label, colour, seconds, bytes) by point, in order."""
    blocks: dict[str, list[tuple[str, str, float, float | None]]] = {}
    for entry in report["results"]:
        title = (
            f"{entry['visual']:,} visual tokens, 8 responses of {entry['response']}, {entry['layers']} layers, "
            f"vocabulary {entry['vocabulary']:,}"
        )
        label, colour = SIDES[entry["side"]]
        blocks.setdefault(title, []).append((label, colour, entry["seconds"], entry.get("allocator_bytes")))
    rows = [
        (OBJECTIVES[entry["objective"]], SIDES["ours"][1], entry["seconds"], None) for entry in report["objectives"]
    ]
    if rows:
        blocks["1,024 visual tokens, 8 responses of 128: objectives"] = rows
    return list(blocks.items())
