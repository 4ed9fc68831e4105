"""Two evaluations on the same items: the difference of their accuracies, its interval, and two tests.

    difference = accuracy of B - accuracy of A, over the items that both have answered

The bootstrap resamples videos, with the same samples for both sides. McNemar's exact test takes the items that only one
side has right; it needs scores of 0 and 1. Within one axis of categories, p-values are adjusted by Holm as well,
because among many categories some differ by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ktr.data.records import NORMALISED
from megatron_ktr.errors import UserError, printable
from megatron_ktr.evaluation.item import Evaluation, Item, Outcome
from megatron_ktr.evaluation.results.aggregate import VERSION, Column, columns_of, paired_differences
from megatron_ktr.evaluation.results.figures import (
    UNKNOWN,
    Figure,
    Figures,
    Headings,
    figures_of,
    protocols_of,
    score_of,
)
from megatron_ktr.evaluation.results.statistics import (
    DEFAULT_RESAMPLING,
    Resampling,
    holm,
    mcnemar_p_value,
    rounded,
    rounded_p,
)
from megatron_ktr.evaluation.results.table import NOTHING, Table, markdown_of, p_text, percent, with_interval

NOT_BINARY = "scores between 0 and 1: McNemar's test does not apply"
MACRO = "the figure is a mean over categories, McNemar's test is over items"
Pair = tuple[Outcome, Outcome]
Sides = tuple[Figure, Figure]
"""The accuracies of A and of B."""


def compare(
    a: Evaluation,
    b: Evaluation,
    headings: Mapping[str, Headings],
    *,
    names: tuple[str, str] = ("A", "B"),
    conditions: tuple[str, str] | None = None,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Any]:
    """B against A as plain data, for every benchmark, condition, protocol and category that both have.

    Args:
        names: what the two are called, such as their directories.
        conditions: compares this condition of A with this one of B; None compares conditions of the same name.

    Raises:
        UserError: the two have no answered item in common, an item differs between them, or there is no such condition.
    """
    columns_a, columns_b = columns_of(a), columns_of(b)
    benchmarks = {}
    for name in columns_a:
        if name not in columns_b:
            continue
        _check_same_items(columns_a[name][0].items, columns_b[name][0].items, benchmark=name, names=names)
        found = [
            _pair_of_columns(left, right, Headings.known(name, headings), resampling=resampling)
            for left, right in _matching(columns_a[name], columns_b[name], conditions)
        ]
        benchmarks[name] = {"title": Headings.known(name, headings).title, "comparisons": found}
    if not any(found["num_items"] for benchmark in benchmarks.values() for found in benchmark["comparisons"]):
        wanted = f" under {conditions[0]!r} and {conditions[1]!r}" if conditions else ""
        raise UserError(
            f"compare: {names[0]} and {names[1]} have no answered item in common{wanted} "
            f"({_contents(names[0], columns_a)}; {_contents(names[1], columns_b)})"
        )
    settings_a, settings_b = dict(_flat(a.settings)), dict(_flat(b.settings))
    return {
        "version": VERSION,
        "a": {"name": names[0], "settings": dict(a.settings)},
        "b": {"name": names[1], "settings": dict(b.settings)},
        "settings_that_differ": sorted(
            name
            for name in settings_a.keys() | settings_b.keys()
            if name != "asked" and settings_a.get(name) != settings_b.get(name)
        ),
        "bootstrap": {"num_resamples": resampling.num_resamples, "seed": resampling.seed, "level": resampling.level},
        "only_a_benchmarks": sorted(columns_a.keys() - columns_b.keys()),
        "only_b_benchmarks": sorted(columns_b.keys() - columns_a.keys()),
        "benchmarks": benchmarks,
    }


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by dotted names, such as "benchmarks.mmvu.sampling.temperature"."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _contents(name: str, columns: Mapping[str, Sequence[Column]]) -> str:
    words = [
        f"{benchmark} under {', '.join(column.condition.name for column in of)}" for benchmark, of in columns.items()
    ]
    return f"{name} has {'; '.join(words) or 'nothing'}"


def _matching(
    a: Sequence[Column], b: Sequence[Column], conditions: tuple[str, str] | None
) -> list[tuple[Column, Column]]:
    by_name = {column.condition.name: column for column in b}
    if conditions is None:
        return [(column, by_name[name]) for column in a if (name := column.condition.name) in by_name]
    return [
        (column, by_name[conditions[1]])
        for column in a
        if column.condition.name == conditions[0] and conditions[1] in by_name
    ]


def _check_same_items(a: Sequence[Item], b: Sequence[Item], *, benchmark: str, names: tuple[str, str]) -> None:
    others = {item.item_id: item for item in b}
    for item in a:
        other = others.get(item.item_id)
        if other is None:
            continue
        # Where media lie and how the record was normalised does not matter.
        fields = sorted({*item.record, *other.record} - {*NORMALISED})
        differing = [field for field in fields if item.record.get(field) != other.record.get(field)]
        differing += [field for field in ("categories", "video_id") if getattr(item, field) != getattr(other, field)]
        if differing:
            raise UserError(
                f"compare: item {item.item_id} of {benchmark} is not the same question in {names[0]} and {names[1]}: "
                f"its {differing[0]} differs ({_short(item, differing[0])} and {_short(other, differing[0])})"
            )


def _short(item: Item, field: str) -> str:
    text = printable(repr(item.record[field] if field in item.record else getattr(item, field, None)))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _pair_of_columns(a: Column, b: Column, headings: Headings, *, resampling: Resampling) -> dict[str, Any]:
    only_b = [outcome.item.item_id for outcome in b.answered if outcome.item.item_id not in a.outcomes]
    pairs = [
        (outcome, b.outcomes[outcome.item.item_id]) for outcome in a.answered if outcome.item.item_id in b.outcomes
    ]
    protocols: dict[str, Any] = {}
    if pairs:
        known = set(protocols_of([right for _, right in pairs]))
        shared = [name for name in protocols_of([left for left, _ in pairs]) if name in known]
        differences = paired_differences(pairs, shared, headings, resampling=resampling)
        a_figures, b_figures = (_side([pair[side] for pair in pairs], shared, headings) for side in (0, 1))
        protocols = {
            name: _protocol(pairs, name, differences[name], (a_figures[name], b_figures[name]), headings)
            for name in shared
        }
    return {
        "condition_a": a.condition.name,
        "condition_b": b.condition.name,
        "num_items": len(pairs),
        "only_a": [outcome.item.item_id for outcome in a.answered if outcome.item.item_id not in b.outcomes],
        "only_b": only_b,
        "protocols": protocols,
    }


def _side(outcomes: Sequence[Outcome], protocols: Sequence[str], headings: Headings) -> dict[str, Figures]:
    """The accuracies of one side, as ``results.json`` would have them of these items."""
    scores = {name: [score_of(outcome, name) for outcome in outcomes] for name in protocols}
    return figures_of([outcome.item for outcome in outcomes], scores, headings, resampling=None)


def _protocol(
    pairs: Sequence[Pair], protocol: str, found: Figures, sides: tuple[Figures, Figures], headings: Headings
) -> dict[str, Any]:
    by_category = {}
    for axis, figures in found.by_category.items():
        of_axis = {}
        for name, figure in figures.items():
            of_category = [pair for pair in pairs if _category(pair, axis) == name]
            both = (sides[0].by_category[axis][name], sides[1].by_category[axis][name])
            of_axis[name] = _cell(of_category, protocol, figure, both)
            inner = headings.inner_axis if axis == headings.macro_axis else None
            if inner is not None and len({_category(pair, inner) for pair in of_category}) > 1:
                _note_macro(of_axis[name])
        for key, adjusted in (("p_value", "p_holm"), ("mcnemar_p", "mcnemar_p_holm")):
            _adjust(of_axis, key, adjusted)
        by_category[axis] = of_axis
    overall = _cell(pairs, protocol, found.overall, (sides[0].overall, sides[1].overall))
    if headings.macro_axis is not None:
        _note_macro(overall)
    return {**overall, "by_category": by_category}


def _note_macro(cell: dict[str, Any]) -> None:
    if cell["mcnemar_p"] is not None:
        cell["mcnemar_note"] = MACRO


def _category(pair: Pair, axis: str) -> str:
    return pair[0].item.categories.get(axis) or UNKNOWN


def _cell(pairs: Sequence[Pair], protocol: str, figure: Figure, sides: Sides) -> dict[str, Any]:
    scores = [(score_of(left, protocol), score_of(right, protocol)) for left, right in pairs]
    is_binary = all(score in (0.0, 1.0) for both in scores for score in both)
    only_a, only_b = sum(left > right for left, right in scores), sum(right > left for left, right in scores)
    return {
        "accuracy_a": rounded(sides[0].value),
        "accuracy_b": rounded(sides[1].value),
        **figure.as_difference(),
        "num_a_better": only_a,
        "num_b_better": only_b,
        "mcnemar_p": rounded_p(mcnemar_p_value(only_a, only_b)) if is_binary else None,
        "mcnemar_note": "" if is_binary else NOT_BINARY,
    }


def _adjust(cells: Mapping[str, dict[str, Any]], key: str, adjusted: str) -> None:
    """Adds Holm's p-values over the categories of an axis that have one."""
    tested = [cell for cell in cells.values() if cell[key] is not None]
    for cell in cells.values():
        cell[adjusted] = None
    for cell, value in zip(tested, holm([cell[key] for cell in tested]), strict=True):
        cell[adjusted] = rounded_p(value)


def comparison_tables(comparison: Mapping[str, Any], *, protocol: str = "official") -> list[Table]:
    """The comparison as tables: all protocols over all items, then the categories under the chosen protocol."""
    a, b = comparison["a"]["name"], comparison["b"]["name"]
    overall, tables = [], []
    for benchmark in comparison["benchmarks"].values():
        for found in benchmark["comparisons"]:
            condition = " / ".join(dict.fromkeys((found["condition_a"], found["condition_b"])))
            names = sorted(found["protocols"], key=lambda name: name != protocol)
            only = f"{len(found['only_a']):,} / {len(found['only_b']):,}"
            overall += [
                (benchmark["title"], condition, name, *_cells(found["protocols"][name]), only) for name in names
            ]
            for axis, cells in found["protocols"].get(protocol, {}).get("by_category", {}).items():
                rows = tuple((name, *_cells(cell), p_text(cell["p_holm"])) for name, cell in cells.items())
                title = f"{benchmark['title']} by {axis}, {condition}, {protocol} protocol"
                tables.append(Table("By category", title, (axis, *_HEAD, "p, Holm"), rows))
    differing = ", ".join(comparison["settings_that_differ"]) or "none"
    note = (
        f"A is {a}, B is {b}. Figures in %, differences B - A in points on the items that both have, with a bootstrap "
        f"interval over videos. Settings that differ: {differing}."
    )
    head = ("benchmark", "condition", "protocol", *_HEAD, "only A / only B")
    return [Table("Comparison", f"{b} against {a}", head, tuple(overall), note), *tables]


_HEAD = ("items", "A", "B", "B - A", "p", "A better", "B better", "p, McNemar")


def _cells(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{cell['num_items']:,}",
        percent(cell["accuracy_a"]),
        percent(cell["accuracy_b"]),
        with_interval(cell["difference"], cell["interval"], signed=True),
        p_text(cell["p_value"]),
        f"{cell['num_a_better']:,}",
        f"{cell['num_b_better']:,}",
        NOTHING if cell["mcnemar_p"] is None else p_text(cell["mcnemar_p"]),
    )


def comparison_markdown(comparison: Mapping[str, Any], *, protocol: str = "official") -> str:
    return markdown_of(comparison_tables(comparison, protocol=protocol), title="Comparison")
