"""The result of ``run.py`` as an SVG of horizontal bars: time and extra memory, one block a point."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from benchmarks.head.methods import METHODS

COLOURS = {
    "naive": "#8c8c8c",
    "megatron": "#c28e2c",
    "chunked": "#1f6f8b",
    "triton": "#1f6f8b",
    "k3": "#4a7fb5",
    "full_kl": "#12324a",
    "liger": "#a3527d",
    "cut_cross_entropy": "#5b7f3a",
}
LABEL, BAR, GAP, LINE, TOP = 290, 200, 80, 18, 40
WIDTH = LABEL + 2 * (BAR + GAP)


def draw(report: dict[str, Any]) -> str:
    """A complete SVG document."""
    parts, y = [], TOP
    for title, entries in _blocks(report).items():
        parts.append(f'<text x="8" y="{y}" class="title">{escape(title)}</text>')
        scales = {name: max(entry[name] for entry in entries) for name in ("seconds", "extra_bytes")}
        for entry in entries:
            y += LINE
            parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end">{escape(_label(entry))}</text>')
            texts = (f"{entry['seconds']:.2f} s", f"{entry['extra_bytes'] / 1e6:,.0f} MB")
            for column, (name, text) in enumerate(zip(scales, texts, strict=True)):
                x, width = LABEL + column * (BAR + GAP), max(1.0, BAR * entry[name] / scales[name])
                colour, opacity = COLOURS[entry["method"]], 1.0 if entry["share"] == 1 else 0.55
                parts.append(
                    f'<rect x="{x}" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}" opacity="{opacity}"/>'
                    f'<text x="{x + width + 4:.1f}" y="{y}">{text}</text>'
                )
        y += 2 * LINE
    header = (
        f'<text x="{LABEL}" y="16" class="title">time, forward + backward</text>'
        f'<text x="{LABEL + BAR + GAP}" y="16" class="title">peak memory beside the inputs</text>'
    )
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="Time and memory of key-token log-probs by method"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{header}{"".join(parts)}</svg>\n'
    )


def _blocks(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    blocks: dict[str, list[dict[str, Any]]] = {}
    for entry in report["results"]:
        shard = -(-entry["vocabulary"] // entry["tensor_parallel"])
        title = f"{entry['rows']:,} rows x hidden {entry['hidden']:,} x {shard:,} of {entry['vocabulary']:,} tokens"
        blocks.setdefault(f"{title}, {entry['dtype']}", []).append(entry)
    return blocks


def _label(entry: dict[str, Any]) -> str:
    return f"{METHODS[entry['method']].label}, {entry['share']:.0%} key rows"
