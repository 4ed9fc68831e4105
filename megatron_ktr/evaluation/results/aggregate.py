"""The results of an evaluation as one JSON object, ``results.json``. ``docs/evaluation_results.md`` has every field.

    Evaluation -> {"benchmarks": {"video_holmes": {"conditions": [...], "controls": [...], "scaling": [...]}}, ...}

The object is a function of the evaluation alone: it has no times of day, no NaN, and the same bytes for the same input.
Figures of an incomplete run are over the answered items, with ``complete`` false and a lower bound that counts every
missing item as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_ktr.evaluation.item import Condition, Evaluation, Item, Outcome
from megatron_ktr.evaluation.results.figures import Figures, Headings, figures_of, protocols_of, score_of
from megatron_ktr.evaluation.results.statistics import DEFAULT_RESAMPLING, Resampling, rounded
from megatron_ktr.files.json_files import to_json

VERSION = 1
"""Of the layout of ``results.json``. It changes when a field changes its meaning or goes."""
MEASURES = {"shuffled": "order_dependence", "blank": "vision_dependence", "hidden": "vision_dependence"}
"""What the accuracy that a control takes away is called."""


@dataclass(frozen=True)
class Column:
    """The outcomes of one benchmark under one condition, in the order of its items."""

    condition: Condition
    items: tuple[Item, ...]
    """All items of the benchmark, answered or not."""
    outcomes: Mapping[str, Outcome]
    """By item id."""

    @property
    def answered(self) -> list[Outcome]:
        return [self.outcomes[item.item_id] for item in self.items if item.item_id in self.outcomes]


def columns_of(evaluation: Evaluation) -> dict[str, list[Column]]:
    """The columns of each benchmark, in the order in which items and conditions stand in the evaluation.

    Raises:
        ValueError: an item has two outcomes under one condition, or an outcome's item or condition is not among those
            of the evaluation.
    """
    items: dict[str, list[Item]] = {}
    for item in evaluation.items:
        items.setdefault(item.benchmark, []).append(item)
    asked = evaluation.asked or [(name, condition) for name in items for condition in evaluation.conditions]
    found: dict[tuple[str, Condition], dict[str, Outcome]] = {pair: {} for pair in asked if pair[0] in items}
    for outcome in evaluation.outcomes:
        of_condition = found[outcome.item.benchmark, outcome.condition]
        if outcome.item.item_id in of_condition:
            raise ValueError(f"two outcomes of {outcome.item.item_id} under {outcome.condition.name}")
        of_condition[outcome.item.item_id] = outcome
    columns: dict[str, list[Column]] = {}
    for (benchmark, condition), outcomes in found.items():
        columns.setdefault(benchmark, []).append(Column(condition, tuple(items[benchmark]), outcomes))
    return columns


def results_of(
    evaluation: Evaluation, headings: Mapping[str, Headings], *, resampling: Resampling = DEFAULT_RESAMPLING
) -> dict[str, Any]:
    """The results as plain data.

    Args:
        headings: by benchmark; a benchmark that is not among them has its name as title and the axes of its items.
    """
    benchmarks = {
        name: _benchmark(columns, Headings.known(name, headings), resampling=resampling)
        for name, columns in columns_of(evaluation).items()
    }
    return {
        "version": VERSION,
        "settings": dict(evaluation.settings),
        "complete": len(evaluation.outcomes) == evaluation.num_wanted,
        "num_wanted": evaluation.num_wanted,
        "num_answered": len(evaluation.outcomes),
        "bootstrap": {
            "num_resamples": resampling.num_resamples,
            "seed": resampling.seed,
            "level": resampling.level,
            "resampled": "videos",
        },
        "benchmarks": benchmarks,
    }


def results_text(results: Mapping[str, Any]) -> str:
    """The text of ``results.json``: sorted keys, one field a line, and ASCII, because a data set may hold characters
    that are no text."""
    return to_json(results, sort_keys=True, indent=1) + "\n"


def _benchmark(columns: Sequence[Column], headings: Headings, *, resampling: Resampling) -> dict[str, Any]:
    items = columns[0].items
    protocols = protocols_of([outcome for column in columns for outcome in column.answered])
    return {
        "title": headings.title,
        "axes": list(headings.shown_axes(items)),
        "macro_axis": headings.macro_axis,
        "inner_axis": headings.inner_axis,
        "num_items": len(items),
        "num_videos": len({item.video_id for item in items if item.video_id}),
        "protocols": list(protocols),
        "conditions": [_condition(column, protocols, headings, resampling) for column in columns],
        "controls": _controls(columns, protocols, headings, resampling),
        "scaling": _scaling(columns, protocols, headings, resampling),
    }


def _condition(column: Column, protocols: Sequence[str], headings: Headings, resampling: Resampling) -> dict[str, Any]:
    answered = column.answered
    asked = [outcome for outcome in answered if not outcome.problem]
    num_missing = len(column.items) - len(answered)
    return {
        "name": column.condition.name,
        "frames": column.condition.frames,
        "control": column.condition.control,
        "scaling": column.condition.scaling,
        "complete": num_missing == 0,
        "num_items": len(column.items),
        "num_answered": len(answered),
        "num_missing": num_missing,
        "num_asked": len(asked),
        "problems": [
            {"item_id": outcome.item.item_id, "reason": outcome.problem} for outcome in answered if outcome.problem
        ],
        "num_truncated": sum(outcome.is_truncated for outcome in asked),
        "format_rate": _mean([outcome.has_format for outcome in asked]),
        "cost": cost_of(asked),
        "protocols": _accuracies(column, protocols, headings, resampling),
        "disagreements": _disagreements(asked, protocols),
    }


def _accuracies(
    column: Column, protocols: Sequence[str], headings: Headings, resampling: Resampling
) -> dict[str, dict[str, Any]]:
    answered = column.answered
    items = [outcome.item for outcome in answered]
    scores = {protocol: [score_of(outcome, protocol) for outcome in answered] for protocol in protocols}
    figures = figures_of(items, scores, headings, resampling=resampling) if answered else {}
    # The same without resampling, where missing items are wrong.
    bounds = figures
    if len(answered) < len(column.items):
        bounds = figures_of(
            column.items,
            {
                protocol: [
                    score_of(column.outcomes[item.item_id], protocol) if item.item_id in column.outcomes else 0.0
                    for item in column.items
                ]
                for protocol in protocols
            },
            headings,
            resampling=None,
        )
    found = {}
    for protocol in protocols:
        empty = {"accuracy": None, "interval": None, "num_items": 0, "by_category": {}}
        found[protocol] = {
            **(figures[protocol].as_accuracies() if figures else empty),
            "lower_bound": rounded(bounds[protocol].overall.value),
            "num_unparsed": sum(
                outcome.verdicts[protocol].answer is None for outcome in answered if not outcome.problem
            ),
        }
    return found


def cost_of(asked: Sequence[Outcome]) -> dict[str, float | None]:
    """Means over items of what asking them took; all responses of an item that votes are counted."""
    answers = [outcome.answers for outcome in asked]
    return {
        "responses": _mean([len(of) for of in answers]),
        "response_tokens": _mean([sum(answer.num_tokens for answer in of) for of in answers]),
        "prompt_tokens": _mean([sum(answer.num_prompt_tokens for answer in of) for of in answers]),
        "frames": _mean([sum(answer.num_frames for answer in of) for of in answers]),
        "seconds": _mean([sum(answer.seconds for answer in of) for of in answers]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return rounded(sum(values) / len(values)) if values else None


def _disagreements(asked: Sequence[Outcome], protocols: Sequence[str]) -> list[dict[str, Any]]:
    """Items to which two protocols give different scores, for each pair of protocols that has some."""
    found = []
    for pair in combinations(protocols, 2):
        ids = [o.item.item_id for o in asked if o.verdicts[pair[0]].score != o.verdicts[pair[1]].score]
        if ids:
            found.append({"protocols": list(pair), "num_items": len(ids), "item_ids": ids})
    return found


def paired_differences(
    pairs: Sequence[tuple[Outcome, Outcome]],
    protocols: Sequence[str],
    headings: Headings,
    *,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Figures]:
    """The second's score minus the first's, on the same items, by protocol. There must be at least one pair."""
    differences = {
        protocol: [score_of(second, protocol) - score_of(first, protocol) for first, second in pairs]
        for protocol in protocols
    }
    return figures_of([first.item for first, _ in pairs], differences, headings, resampling=resampling)


def _controls(
    columns: Sequence[Column], protocols: Sequence[str], headings: Headings, resampling: Resampling
) -> list[dict[str, Any]]:
    """What each control takes away: acc(intact) - acc(control), on the items that both have and that it changes."""
    found = []
    for column in columns:
        condition = column.condition
        intact = _column(columns, Condition(condition.frames, "intact", condition.scaling))
        if condition.control == "intact" or intact is None:
            continue
        both = [
            (outcome, intact.outcomes[outcome.item.item_id])
            for outcome in column.answered
            if outcome.item.item_id in intact.outcomes
        ]
        asked = [pair for pair in both if not pair[0].problem and not pair[1].problem]
        pairs = [pair for pair in asked if pair[0].is_control_felt]
        differences = paired_differences(pairs, protocols, headings, resampling=resampling) if pairs else {}
        found.append(
            {
                "condition": condition.name,
                "intact": intact.condition.name,
                "control": condition.control,
                "measure": MEASURES[condition.control],
                "num_pairs": len(pairs),
                "num_unchanged": len(asked) - len(pairs),
                "protocols": {protocol: figures.as_differences() for protocol, figures in differences.items()},
            }
        )
    return found


def _scaling(
    columns: Sequence[Column], protocols: Sequence[str], headings: Headings, resampling: Resampling
) -> list[dict[str, Any]]:
    """What voting gains over a single answer, and how many times its cost it takes. The single answer is that with the
    same frames; if none was asked for, that with the most frames below them."""
    found = []
    for column in columns:
        condition = column.condition
        singles = [
            other
            for other in columns
            if (other.condition.scaling, other.condition.control) == ("single", condition.control)
            and other.condition.frames <= condition.frames
        ]
        if condition.scaling == "single" or not singles:
            continue
        single = max(singles, key=lambda other: other.condition.frames)
        pairs = [
            (single.outcomes[outcome.item.item_id], outcome)
            for outcome in column.answered
            if outcome.item.item_id in single.outcomes
        ]
        differences = paired_differences(pairs, protocols, headings, resampling=resampling) if pairs else {}
        asked = [pair for pair in pairs if not pair[0].problem and not pair[1].problem]
        before, after = cost_of([first for first, _ in asked]), cost_of([second for _, second in asked])
        num_rounds = Counter(len(second.answers) for _, second in asked)
        found.append(
            {
                "condition": condition.name,
                "single": single.condition.name,
                "num_pairs": len(pairs),
                "cost": after,
                "single_cost": before,
                "cost_ratio": {
                    name: rounded(value / base) if value is not None and (base := before[name]) else None
                    for name, value in after.items()
                },
                "responses": {str(number): count for number, count in sorted(num_rounds.items())},
                "protocols": {protocol: figures.as_differences() for protocol, figures in differences.items()},
            }
        )
    return found


def _column(columns: Sequence[Column], condition: Condition) -> Column | None:
    return next((column for column in columns if column.condition == condition), None)
