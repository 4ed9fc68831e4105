"""Tables and figure of ``docs/scaling.md`` from ``benchmarks/results/scaling.json``."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

STATES = ("weights", "gradients", "optimizer", "reference")
REST = ("engine", "reserved")
PARTS = {"compute": "#1f6f8b", "bubble": "#c9c9c9", "tensor": "#c28e2c", "context": "#a3527d", "pipeline": "#5b7f3a",
         "data": "#8a4b32"}  # fmt: skip
EXPLAINED = {
    "compute": "matrix products",
    "bubble": "waiting for other stages",
    "tensor": "inside a layer (NVLink)",
    "context": "keys and values",
    "pipeline": "between stages",
    "data": "gradients, weights",
}
LIMITS = ("memory", "network", "links", "prompts", "vision")
LABEL, BAR, LINE, TOP = 250, 480, 22, 102


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Markdown by marker."""
    entries = report["entries"]
    return {
        "layouts": _table(
            "model, GPUs|frames|rows a prompt|PFLOP a prompt|tp|pp|vpp|cp|dp|recompute|encoder split|step|bubble|MFU",
            [_layout_row(entry) for entry in entries],
        ),
        "memory": _table(
            "model, GPUs|frames|weights|gradients|optimizer|reference|activations|vision|head|working|other|total",
            [_memory_row(entry) for entry in entries],
        ),
        "sent": _table(
            "model, GPUs|frames|tensor|vision|context|head|pipeline|data|NVLink in all|network in all",
            [_sent_row(entry) for entry in entries],
        ),
        "seconds": _table(
            "model, GPUs|frames|" + "|".join(PARTS) + "|step", [_seconds_row(entry) for entry in entries]
        ),
        "limits": _table(
            "model, GPUs|frames|endless memory|free network|all links free|4 x the prompts|frozen encoder",
            [_limits_row(entry) for entry in entries],
        ),
    }


def _table(header: str, rows: list[list[str]]) -> str:
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['model']}, {entry['gpus']:,}", str(entry["frames"])]


def _layout_row(entry: dict[str, Any]) -> list[str]:
    layout = entry["layout"]
    if layout is None:
        return [*_name(entry), *["-"] * 11, "nothing fits"]
    recompute = layout["recompute"] + " + vision" * layout["recompute_vision"]
    sizes = [str(layout[name]) for name in ("tensor", "pipeline", "virtual", "context", "data")]
    return [
        *_name(entry),
        f"{entry['rows']:,}",
        f"{entry['petaflop_per_prompt']:.2f}",
        *sizes,
        recompute,
        layout["vision_parallel"],
        f"{entry['step_seconds']:.1f} s",
        f"{entry['bubble_fraction']:.0%}",
        f"{entry['mfu']:.0%}",
    ]


def _memory_row(entry: dict[str, Any]) -> list[str]:
    if entry["layout"] is None:
        return [*_name(entry), *["-"] * 10]
    memory = entry["memory_gb"]
    parts = [memory[name] for name in (*STATES, "activations", "vision", "head", "working")]
    other = sum(memory[name] for name in REST)
    return [*_name(entry), *(f"{value:.1f}" for value in (*parts, other, sum(memory.values())))]


def _sent_row(entry: dict[str, Any]) -> list[str]:
    if entry["layout"] is None:
        return [*_name(entry), *["-"] * 8]
    sent = entry["sent_gb"]

    def cell(*parts: str) -> str:
        node, network = (sum(sent[part][link] for part in parts) for link in ("node", "network"))
        return f"{_gb(node)} + **{_gb(network)}**" if network else _gb(node)

    totals = [sent["total"][link] for link in ("node", "network")]
    columns = [cell(name) for name in ("tensor", "vision", "context", "head", "pipeline")]
    return [*_name(entry), *columns, cell("data", "embedding"), *(_gb(total) for total in totals)]


def _gb(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _seconds_row(entry: dict[str, Any]) -> list[str]:
    if entry["layout"] is None:
        return [*_name(entry), *["-"] * 7]
    values = [entry["seconds"][name] for name in PARTS]
    return [*_name(entry), *(f"{value:.2f}" for value in (*values, entry["step_seconds"]))]


def _limits_row(entry: dict[str, Any]) -> list[str]:
    if entry["layout"] is None:
        return [*_name(entry), *["-"] * 5]
    return [*_name(entry), *(f"{entry['gains'][name]:.2f} x" for name in LIMITS)]


def draw(report: dict[str, Any]) -> str:
    """A complete SVG document: a bar of a step's time by what it goes into, for every model, GPUs and frames."""
    title = "Where the time of a training step goes (estimates, H100; rollout excluded)"
    parts = [f'<text x="8" y="20" class="title">{title}</text>']
    for index, (name, colour) in enumerate(PARTS.items()):
        x, y = 8 + index % 3 * 250, 34 + index // 3 * 20
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}">{escape(f"{name}: {EXPLAINED[name]}")}</text>')
    y, last = TOP, None
    for entry in report["entries"]:
        if last not in (None, (entry["model"], entry["gpus"])):
            y += LINE // 2
        last = entry["model"], entry["gpus"]
        label = f"{entry['model']} on {entry['gpus']:,} GPUs, {entry['frames']} frames"
        parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end">{escape(label)}</text>')
        if entry["layout"] is not None:
            parts.append(_bar(entry, y))
        y += LINE
    width = LABEL + BAR + 140
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img" '
        f'aria-label="Shares of a training step by model, GPUs and frames"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _bar(entry: dict[str, Any], y: int) -> str:
    """Of equal length for every step: shares are compared, the seconds stand beside it."""
    x, parts = float(LABEL), []
    for name, colour in PARTS.items():
        width = BAR * entry["seconds"][name] / entry["step_seconds"]
        parts.append(f'<rect x="{x:.1f}" y="{y - 12}" width="{width:.1f}" height="15" fill="{colour}"/>')
        x += width
    text = f"{entry['step_seconds']:.1f} s, MFU {entry['mfu']:.0%}"
    return "".join(parts) + f'<text x="{LABEL + BAR + 8}" y="{y}">{text}</text>'
