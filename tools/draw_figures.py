"""Draws the two figures of the README: docs/figures/method.svg and docs/figures/architecture.svg.

    python tools/draw_figures.py [--out docs/figures]

Both are plain text without a drawing library, so that a change of wording is a change of one line here. Each picture
brings its own background and follows the reader's light or dark setting. The scores in the method's figure are made
up; which tokens they select is worked out by the rule of the paper.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

LIGHT = {
    "ground": "#ffffff",
    "panel": "#f4f6f8",
    "edge": "#c4cad1",
    "text": "#1d2024",
    "soft": "#59616b",
    "visual": "#0067a8",
    "temporal": "#a8327c",
    "entropy": "#b36b00",
    "key": "#00664c",
    "ball": "#d9480f",
}
DARK = {
    "ground": "#14171a",
    "panel": "#20252a",
    "edge": "#4a525b",
    "text": "#e9ebed",
    "soft": "#aab2bb",
    "visual": "#5cb4f0",
    "temporal": "#e88fc4",
    "entropy": "#f0ae3c",
    "key": "#56d3ab",
    "ball": "#ff8a4c",
}
"""Okabe and Ito's palette, as in the report: entropy, visual and temporal have the same colours there."""

WIDTH = 960
MARGIN = 24

TOKENS = ("A", "red", "ball", "comes", "first", ",", "then", "a", "blue", "one", ",", "so", "pick", "B")
SCORES: dict[str, tuple[str, tuple[float, ...]]] = {
    "visual": (
        "log p(token | video) - log p(token | no video)",
        (0.02, 0.95, 0.70, 0.12, 0.20, 0.0, 0.04, 0.02, 0.88, 0.10, 0.0, 0.03, 0.02, 0.46),
    ),
    "temporal": (
        "log p(token | video) - log p(token | shuffled)",
        (0.02, 0.18, 0.05, 0.30, 0.97, 0.0, 0.62, 0.02, 0.22, 0.05, 0.0, 0.03, 0.04, 0.83),
    ),
    "entropy": (
        "how unsure the model is before the token",
        (0.78, 0.30, 0.22, 0.66, 0.25, 0.04, 0.12, 0.10, 0.28, 0.16, 0.05, 0.90, 0.14, 0.20),
    ),
}
"""For each signal, what it measures and its score of every token. The scores are invented; the longest bar is 1."""
RATIO = 0.2
"""The share of tokens that a signal selects."""
ORDER = (2, 0, 3, 1)
"""The frame at each place of the shuffled video."""


def write_figures(folder: Path) -> list[Path]:
    """Draws both figures into ``folder`` and returns their paths."""
    paths = []
    for name, drawing in (("method", method_figure()), ("architecture", architecture_figure())):
        path = folder / f"{name}.svg"
        path.write_text(drawing, encoding="utf-8")
        paths.append(path)
    return paths


# The method


def method_figure() -> str:
    """The figure of the method: three views of one video, the scores that they give each token, and the key tokens."""
    parts = [
        text(MARGIN, 40, "Video-KTR trains only the tokens that depend on the video, on its order, or on doubt", "h1")
    ]
    parts.append(
        text(
            MARGIN,
            62,
            "One response is scored under three views of one video. The scores are without gradient.",
            "soft",
        )
    )
    width = (WIDTH - 2 * MARGIN - 2 * 18) / 3
    views = (
        ("intact", "The video as it is", (0, 1, 2, 3), "its entropy is the third signal"),
        ("shuffled", "Frames in random order", ORDER, "compared with intact: temporal"),
        ("hidden", "Video hidden, text alone", (), "compared with intact: visual"),
    )
    for index, (_, title, frames, note) in enumerate(views):
        parts += _view(MARGIN + index * (width + 18), 80, width, title=title, frames=frames, note=note)
    parts += _token_table(top=262)
    return document("Video-KTR: three views of one video and the tokens that each signal marks", parts, height=566)


def _view(x: float, y: float, width: float, *, title: str, frames: Sequence[int], note: str) -> list[str]:
    """One card of a view: its title, its four frames (or four empty places), and its purpose."""
    parts = [box(x, y, width, 146, "panel"), text(x + 14, y + 24, title, "h2")]
    size, gap = 56, 9
    left = x + (width - 4 * size - 3 * gap) / 2
    for place in range(4):
        at = left + place * (size + gap)
        if not frames:
            parts.append(f'<rect x="{at:.1f}" y="{y + 38}" width="{size}" height="{size}" rx="4" class="empty"/>')
            continue
        frame = frames[place]
        # A red ball appears first and rolls to the right; a blue one follows in the last two frames.
        parts.append(f'<rect x="{at:.1f}" y="{y + 38}" width="{size}" height="{size}" rx="4" class="frame"/>')
        parts.append(f'<circle cx="{at + 12 + 11 * frame:.1f}" cy="{y + 58}" r="7" class="f-ball"/>')
        if frame >= 2:
            parts.append(f'<circle cx="{at + 12 + 11 * (frame - 2):.1f}" cy="{y + 78}" r="7" class="f-visual"/>')
        parts.append(text(at + size / 2, y + 110, f"frame {frame + 1}", "soft small", anchor="middle"))
    if not frames:
        parts.append(
            text(x + width / 2, y + 110, "its tokens are taken out of the prompt", "soft small", anchor="middle")
        )
    return [*parts, text(x + 14, y + 134, note, "soft")]


def _token_table(*, top: float) -> list[str]:
    """The response with a row of scores for each signal, and the union below."""
    label = 196
    step = (WIDTH - 2 * MARGIN - label) / len(TOKENS)

    def centre(index: int) -> float:
        return MARGIN + label + step * (index + 0.5)

    parts = [
        text(MARGIN, top, "Which colour comes second? (A) red (B) blue", "h2"),
        text(MARGIN, top + 20, "a response", "soft"),
    ]
    parts += [text(centre(index), top + 20, token, "token", anchor="middle") for index, token in enumerate(TOKENS)]
    y, height, key = top + 38, 40, [False] * len(TOKENS)
    for signal, (meaning, scores) in SCORES.items():
        selected = top_share(scores, RATIO)
        key = [before or now for before, now in zip(key, selected, strict=True)]
        parts.append(text(MARGIN, y + 18, f"{signal}: top {RATIO:.0%}", f"h2 f-{signal}"))
        first, second = _halves(meaning)
        parts += [text(MARGIN, y + 34, first, "soft small"), text(MARGIN, y + 48, second, "soft small")]
        for index, score in enumerate(scores):
            length = max(1.5, height * score)
            style = f"f-{signal}" if selected[index] else "weak"
            parts.append(
                f'<rect x="{centre(index) - 11:.1f}" y="{y + 8 + height - length:.1f}" width="22" '
                f'height="{length:.1f}" rx="2" class="{style}"/>'
            )
        parts.append(line(MARGIN, y + 56, WIDTH - MARGIN, y + 56))
        y += 62
    parts.append(text(MARGIN, y + 18, "key tokens: the union", "h2 f-key"))
    parts.append(text(MARGIN, y + 34, "the only ones with a loss", "soft small"))
    for index, token in enumerate(TOKENS):
        style = "key" if key[index] else "rest"
        parts.append(
            f'<rect x="{centre(index) - step / 2 + 2:.1f}" y="{y + 6}" width="{step - 4:.1f}" height="26" rx="4" '
            f'class="{style}"/>'
        )
        parts.append(
            text(centre(index), y + 24, token, "token on-key" if key[index] else "token soft", anchor="middle")
        )
    formula = "loss = mean over responses of the mean over key tokens of -(ratio x advantage - beta x KL)"
    parts.append(text(MARGIN, y + 60, formula, "mono"))
    parts.append(text(WIDTH - MARGIN, y + 60, "Scores are made up.", "soft small", anchor="end"))
    return parts


def _halves(words: str) -> tuple[str, str]:
    """``words`` on two lines, broken before " - " or else in the middle."""
    before, dash, after = words.partition(" - ")
    if dash:
        return before, f"- {after}"
    cut = words.index(" ", len(words) // 2)
    return words[:cut], words[cut + 1 :]


def top_share(scores: Sequence[float], ratio: float) -> list[bool]:
    """Selects the scores at or above the quantile ``1 - ratio`` (linear interpolation), with the rule of
    ``megatron_ktr/attribution/selection.py``."""
    ordered = sorted(scores)
    rank = (1 - ratio) * (len(ordered) - 1)
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return [score >= below + (above - below) * (rank - math.floor(rank)) for score in scores]


# The architecture

STAGES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "1  Rollout",
        (
            "Videos are decoded.",
            "An engine samples G",
            "responses to each",
            "question: transformers,",
            "vLLM in the ranks, or",
            "vLLM servers.",
        ),
        ("data/", "rollout/"),
    ),
    (
        "2  Reward",
        (
            "The answer and the",
            "format of a response",
            "earn points, while the",
            "engine still samples.",
            "Your own rewards are",
            "Python functions.",
        ),
        ("rewards/",),
    ),
    (
        "3  Packing",
        (
            "A sequence holds a",
            "prompt once, then its",
            "G responses. Groups",
            "change replicas until",
            "all have equal work.",
        ),
        ("batch/", "step/plan.py"),
    ),
    (
        "4  Scoring passes",
        (
            "Without gradient: the",
            "hidden view, shuffled",
            "views, the reference",
            "model on the intact",
            "view.",
        ),
        ("step/scoring.py", "attribution/"),
    ),
    (
        "5  Update",
        (
            "One forward with",
            "gradient; advantages,",
            "key tokens and loss on",
            "the last stage; then",
            "backward and the",
            "optimizer's step.",
        ),
        ("policy/", "objectives/"),
    ),
)
"""For each stage: its title, what happens in it, and its place in ``megatron_ktr/``."""
AXES = (
    ("TP", "tensor parallel", "each layer's weights,", "and with SP its activations"),
    ("PP", "pipeline parallel", "the layers, in stages;", "virtual stages too"),
    ("CP", "context parallel", "the packed sequence,", "whole responses to a rank"),
    ("DP", "data parallel", "the prompts of a step,", "and the optimizer's state"),
)
FLOORS = (
    ("below every stage", "models/qwen2_5_vl   ops/   distributed/   files/   config/"),
    ("around the step", "trainer.py   train.py   run/   accounting/   report/   doctor/   evaluation/"),
)


def architecture_figure() -> str:
    """The figure of the architecture: the five stages of a step, how ranks divide its work, and the other folders."""
    parts = [text(MARGIN, 40, "One training step, and the folders of megatron_ktr/ that make it", "h1")]
    gap = 20
    width = (WIDTH - 2 * MARGIN - gap * (len(STAGES) - 1)) / len(STAGES)
    top, height = 86, 206
    for index, (title, lines, folders) in enumerate(STAGES):
        x = MARGIN + index * (width + gap)
        parts += [box(x, top, width, height, "panel"), text(x + 12, top + 24, title, "h2")]
        parts += [text(x + 12, top + 46 + 17 * row, words, "body") for row, words in enumerate(lines)]
        parts += [text(x + 12, top + 172 + 18 * row, folder, "mono f-visual") for row, folder in enumerate(folders)]
        if index:
            parts.append(arrow(f"M {x - gap + 2:.1f} {top + 60} H {x - 3:.1f}"))
    first, last = MARGIN + width / 2, WIDTH - MARGIN - width / 2
    parts.append(arrow(f"M {last:.1f} {top - 2} V {top - 18} H {first:.1f} V {top - 4}"))
    parts.append(label(WIDTH / 2, top - 13, "new weights"))
    parts += _axes(top=top + height + 36)
    for row, (where, folders) in enumerate(FLOORS):
        y = top + height + 160 + 40 * row
        parts += [box(MARGIN, y, WIDTH - 2 * MARGIN, 32, "panel"), text(MARGIN + 12, y + 21, where, "h2")]
        parts.append(text(MARGIN + 180, y + 21, folders, "mono f-visual"))
    return document("Architecture: rollout, reward, packing, scoring passes, update", parts, height=548)


def _axes(*, top: float) -> list[str]:
    """The four ways of dividing stages 3 to 5 among ranks."""
    parts = [text(MARGIN, top, "Steps 3 to 5 run on Megatron-core, divided among ranks in any mix of four ways", "h2")]
    gap = 18
    width = (WIDTH - 2 * MARGIN - gap * (len(AXES) - 1)) / len(AXES)
    for index, (short, name, first, second) in enumerate(AXES):
        x = MARGIN + index * (width + gap)
        parts += [box(x, top + 14, width, 92, "outline"), text(x + 14, top + 58, short, "big f-key")]
        parts += [text(x + 62, top + 42, name, "h2"), text(x + 62, top + 63, "divides", "soft small")]
        parts += [text(x + 14, top + 80, first, "soft small"), text(x + 14, top + 96, second, "soft small")]
    return parts


# SVG


def document(title: str, parts: Sequence[str], *, height: int) -> str:
    """A complete SVG file. Colours are light, or dark if the reader prefers that, on an opaque background."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">'
    )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z" class="f-soft"/></marker></defs>'
    )
    ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" class="ground"/>'
    style = f"{SHAPES}\n{colours(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{colours(DARK)}\n}}"
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>\n{style}\n</style>", marker, ground, *parts, "</svg>\n"]
    )


SHAPES = """text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
.h1 { font-size: 18px; font-weight: 700; }
.h2 { font-weight: 700; }
.big { font-size: 26px; font-weight: 700; }
.body { font-size: 12.5px; }
.small { font-size: 12px; }
.mono { font: 13px ui-monospace, "SFMono-Regular", Menlo, "Liberation Mono", monospace; }
.token { font: 13px ui-monospace, "SFMono-Regular", Menlo, "Liberation Mono", monospace; }
.empty { fill: none; stroke-dasharray: 4 4; }
.arrow { fill: none; stroke-width: 1.6; }"""


def colours(palette: dict[str, str]) -> str:
    """The CSS rules that depend on the palette. They avoid CSS variables, which not every viewer supports."""
    rules = {
        "text": f"fill: {palette['text']}",
        ".soft": f"fill: {palette['soft']}",
        ".ground": f"fill: {palette['ground']}; stroke: {palette['edge']}",
        ".panel": f"fill: {palette['panel']}; stroke: {palette['edge']}",
        ".outline": f"fill: none; stroke: {palette['edge']}",
        ".frame": f"fill: {palette['ground']}; stroke: {palette['edge']}",
        ".empty": f"stroke: {palette['soft']}",
        ".line": f"stroke: {palette['edge']}",
        ".arrow": f"stroke: {palette['soft']}",
        ".weak": f"fill: {palette['edge']}",
        ".rest": f"fill: none; stroke: {palette['edge']}",
        ".key": f"fill: {palette['key']}",
        ".on-key": f"fill: {palette['ground']}; font-weight: 700",
        ".plate": f"fill: {palette['ground']}",
    }
    rules |= {
        f".f-{name}": f"fill: {palette[name]}" for name in ("visual", "temporal", "entropy", "key", "ball", "soft")
    }
    return "\n".join(f"{selector} {{ {rule}; }}" for selector, rule in rules.items())


def text(x: float, y: float, words: str, style: str, *, anchor: str = "start") -> str:
    """One line of text that begins, ends or is centred at ``x``, with its baseline at ``y``."""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{where} xml:space="preserve">{escape(words)}</text>'


def label(x: float, y: float, words: str) -> str:
    """Words in the middle of an arrow, on a background of their own."""
    half = 4.2 * len(words)
    plate = f'<rect x="{x - half:.1f}" y="{y - 13:.1f}" width="{2 * half:.1f}" height="18" class="plate"/>'
    return plate + text(x, y, words, "soft", anchor="middle")


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8" class="{style}"/>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="line"/>'


def arrow(path: str) -> str:
    return f'<path d="{path}" class="arrow" marker-end="url(#tip)"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "docs" / "figures"
    parser.add_argument("--out", type=Path, default=default, help="folder of the figures")
    for path in write_figures(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
