"""The curves of evaluation during training: figures of held-out questions over the steps that were evaluated.

eval/<set>/accuracy              all sets in one chart
eval/<set>/response_length       all sets in one chart, in tokens
eval_loss, eval/<set>/loss       losses of held-out responses in one chart
eval/<set>/<figure>              a chart of each set: its protocols, format, truncated and unusable answers
eval/<set>/<axis>/<category>     a chart of each axis
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_ktr.report.curves import NUM_STYLES, Series, line_chart
from megatron_ktr.report.markup import Html
from megatron_ktr.report.run_data import RunData

PREFIX = "eval/"
LENGTH = "response_length"
"""The one figure of answers that is no share."""
LOSSES = ("loss", "loss_skipped")
"""Figures of given responses, not of answers."""


def evaluation_charts(run: RunData) -> list[Html]:
    """The charts of a run; none if it was not evaluated."""
    names = {name: name.split("/", 3)[1:] for name in run.metrics if name.startswith(PREFIX) and name.count("/") > 1}
    charts = []
    losses = {name: parts[0] for name, parts in names.items() if parts[1:] == ["loss"]}
    if len(losses) > 1:
        losses["eval_loss"] = "all sets"
    charts += _chart("Evaluation: loss", run, losses, note="nats per token of given responses, by set")
    names = {name: parts for name, parts in names.items() if len(parts) > 2 or parts[1] not in LOSSES}
    sets = list(dict.fromkeys(parts[0] for parts in names.values()))
    accuracies = {name: parts[0] for name, parts in names.items() if parts[1:] == ["accuracy"]}
    charts += _chart("Evaluation", run, accuracies, note="share of right answers, by set")
    lengths = {name: parts[0] for name, parts in names.items() if parts[1:] == [LENGTH]}
    charts += _chart("Evaluation: response length", run, lengths, note="tokens, by set")
    for one in sets:
        # A length beside shares would leave the shares flat at the foot of their chart.
        of_set = {name: parts[1] for name, parts in names.items() if parts[0] == one and len(parts) == 2}
        figures = {name: figure for name, figure in of_set.items() if figure != LENGTH}
        if len(figures) > 1:
            labels = {
                name: "official" if label == "accuracy" else label.replace("_", " ") for name, label in figures.items()
            }
            charts += _chart(f"Evaluation: {one}", run, labels, note="shares, by protocol and kind")
        axes = dict.fromkeys(parts[1] for parts in names.values() if parts[0] == one and len(parts) == 3)
        for axis in axes:
            categories = {name: parts[2] for name, parts in names.items() if parts[:2] == [one, axis] and parts[2:]}
            charts += _chart(f"Evaluation: {one} by {axis}", run, categories, note="share of right answers")
    return charts


def _chart(title: str, run: RunData, labels: dict[str, str], *, note: str) -> list[Html]:
    """One chart of the metrics that ``labels`` names, over the steps that have one of them."""
    values = {name: run.metrics[name] for name in labels}
    places = [place for place in range(len(run.steps)) if any(math.isfinite(of[place]) for of in values.values())]
    if not places:
        return []
    steps = [run.steps[place] for place in places]
    series = [
        # After all colours the dashes move on by one, so that no two of 36 lines look alike.
        Series(
            label, _at(values[name], places), (number + 1) % NUM_STYLES, (number + number // NUM_STYLES) % NUM_STYLES
        )
        for number, (name, label) in enumerate(labels.items())
    ]
    return [line_chart(title, steps, series, note=note)]


def _at(values: Sequence[float], places: Sequence[int]) -> tuple[float, ...]:
    return tuple(values[place] for place in places)
