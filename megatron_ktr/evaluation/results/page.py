"""What the page of one or more evaluations shows, as the plain data that ``report/evaluation_page.py`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.data.conversation import text_of
from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.item import Evaluation, Item, Outcome
from megatron_ktr.evaluation.results.figures import UNKNOWN, Headings, protocols_of, score_of
from megatron_ktr.evaluation.results.statistics import rounded
from megatron_ktr.evaluation.results.table import Models, Table, percent, tables_of
from megatron_ktr.report.bars import Bar
from megatron_ktr.report.evaluation_page import (
    EvaluationPage,
    PageChart,
    PageMedium,
    PageTable,
    write_evaluation_page,
)
from megatron_ktr.report.strips import MediaPlace

PROBLEM, TRUNCATED, NO_FORMAT = 1, 2, 4
"""Flags of a run, as the page's script knows them."""
_ANSWER_TAGS = re.compile(r"^\s*<answer>(.*)</answer>\s*$", re.DOTALL)


def write_page_of(
    path: Path,
    evaluations: Mapping[str, Evaluation],
    models: Models,
    headings: Mapping[str, Headings],
    *,
    protocol: str = "official",
    tables: Sequence[Table] | None = None,
    places: Mapping[str, MediaPlace] | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Writes the page of evaluations and returns its size in bytes.

    Args:
        evaluations: by the name of the model, in the order of the page.
        models: ``aggregate.results_of`` of each.
        protocol: the one whose figures come first.
        tables: those of the page, such as ``tables_of(...)`` behind those of a comparison; None means ``tables_of``.
        places: by benchmark, to decode media of which no picture is there. Without, they are named only.
        notes: lines about how the questions were asked.

    Raises:
        UserError: an item is not the same question in all evaluations, or the page cannot be written.
    """
    media: dict[tuple[str, MediaSource], int] = {}
    data = page_data(evaluations, headings, protocol=protocol, media=media)
    incomplete = [
        f"{name} is not complete: {results['num_answered']:,} of {results['num_wanted']:,} answers are there, and "
        "figures are over these."
        for name, results in models.items()
        if not results["complete"]
    ]
    tables = tables_of(models, protocol=protocol) if tables is None else tables
    page = EvaluationPage(
        title="Evaluation of " + " and ".join(models),
        facts=[
            ("items", f"{len(data['items']):,}"),
            ("answers", f"{sum(len(item['r']) for item in data['items']):,}"),
            ("protocol shown first", protocol),
        ],
        warnings=incomplete,
        notes=notes,
        tables=[PageTable(one.section, one.title, one.head, one.rows, one.note) for one in tables],
        charts=charts_of(models, protocol=protocol),
        data=data,
        media=[PageMedium(group, source) for group, source in media],
        places=places or {},
    )
    return write_evaluation_page(path, page)


def page_data(
    evaluations: Mapping[str, Evaluation],
    headings: Mapping[str, Headings],
    *,
    protocol: str,
    media: dict[tuple[str, MediaSource], int],
) -> dict[str, Any]:
    """The items for the page's script; ``media`` receives the number of each medium that they have."""
    items: dict[tuple[str, str], Item] = {}
    outcomes: dict[tuple[str, str], list[tuple[int, Outcome]]] = {}
    for number, evaluation in enumerate(evaluations.values()):
        for item in evaluation.items:
            known = items.setdefault((item.benchmark, item.item_id), item)
            if known.record.get("problem") != item.record.get("problem"):
                raise UserError(f"item {item.item_id} of {item.benchmark} is not the same question in all evaluations")
        for outcome in evaluation.outcomes:
            outcomes.setdefault((outcome.item.benchmark, outcome.item.item_id), []).append((number, outcome))
    of_benchmark: dict[str, list[Item]] = {}
    for item in items.values():
        of_benchmark.setdefault(item.benchmark, []).append(item)
    known_headings = {name: Headings.known(name, headings) for name in of_benchmark}
    axes = {name: known_headings[name].shown_axes(of) for name, of in of_benchmark.items()}
    protocols = [protocol]
    for name in of_benchmark:
        judged = [o for found in outcomes.values() for _, o in found if o.item.benchmark == name]
        protocols += [other for other in protocols_of(judged) if other not in protocols]
    conditions = list(
        dict.fromkeys(condition.name for evaluation in evaluations.values() for condition in evaluation.conditions)
    )
    numbers = {name: number for number, name in enumerate(of_benchmark)}
    return {
        "models": list(evaluations),
        "conditions": conditions,
        "protocols": protocols,
        "benchmarks": [
            {"name": name, "title": known_headings[name].title, "axes": list(axes[name])} for name in of_benchmark
        ],
        "items": [
            {
                "b": numbers[item.benchmark],
                "id": item.item_id,
                **_question(item.record),
                "c": [item.categories.get(axis) or UNKNOWN for axis in axes[item.benchmark]],
                "v": [media.setdefault((item.benchmark, source), len(media)) for source in media_sources(item.record)],
                "r": [
                    _run(outcome, protocols, model=number, condition=conditions.index(outcome.condition.name))
                    for number, outcome in outcomes.get(key, ())
                ],
            }
            for key, item in items.items()
        ],
    }


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    solution = record.get("solution")
    tagged = _ANSWER_TAGS.match(str(solution))
    turns = [text_of(turn) for turn in record.get("messages") or () if turn.get("role") == "user"]
    return {
        "q": str(record.get("problem") or "\n".join(turns)),
        "o": [str(option) for option in record.get("options") or ()],
        "s": tagged.group(1).strip() if tagged else "" if solution is None else str(solution),
    }


def _run(outcome: Outcome, protocols: Sequence[str], *, model: int, condition: int) -> dict[str, Any]:
    has_problem = bool(outcome.problem)
    judged: list[Any] = []
    for protocol in protocols:
        verdict = outcome.verdicts.get(protocol)
        if has_problem:
            judged.append([0, None])
        else:
            judged.append(None if verdict is None else [rounded(score_of(outcome, protocol)), verdict.answer])
    flags = PROBLEM * has_problem + TRUNCATED * outcome.is_truncated
    flags += NO_FORMAT * (not has_problem and not outcome.has_format)
    answers = outcome.answers
    return {
        "m": model,
        "c": condition,
        "j": judged,
        "f": flags,
        "p": outcome.problem,
        "t": [answer.text for answer in answers if not answer.problem],
        "n": [
            sum(answer.num_frames for answer in answers),
            sum(answer.num_tokens for answer in answers),
            sum(answer.num_prompt_tokens for answer in answers),
            round(sum(answer.seconds for answer in answers), 2),
        ],
    }


def charts_of(models: Models, *, protocol: str) -> list[PageChart]:
    """Accuracy by condition, and by category under the last intact condition of a single answer."""
    charts = []
    for model, results in models.items():
        for benchmark in results["benchmarks"].values():
            name = benchmark["title"] + (f", {model}" if len(models) > 1 else "")
            shown = [c for c in benchmark["conditions"] if protocol in c["protocols"]]
            bars = [_bar(c["name"], c["protocols"][protocol]) for c in shown]
            charts.append(PageChart("Accuracy", f"{name}: accuracy by condition, {protocol}", _drawn(bars)))
            plain = [c for c in shown if c["control"] == "intact" and c["scaling"] == "single"] or shown
            if not plain:
                continue
            condition = max(plain, key=lambda c: c["frames"])
            for axis, found in condition["protocols"][protocol]["by_category"].items():
                bars = [_bar(category, figures) for category, figures in found.items()]
                title = f"{name} by {axis}, {condition['name']}, {protocol}"
                charts.append(PageChart("By category", title, _drawn(bars)))
    return [chart for chart in charts if chart.bars]


def _drawn(bars: Sequence[Bar | None]) -> list[Bar]:
    return [bar for bar in bars if bar is not None]


def _bar(label: str, figures: Mapping[str, Any]) -> Bar | None:
    if figures["accuracy"] is None:
        return None
    interval = figures["interval"]
    bounds = "" if interval is None else f", {percent(interval[0])} to {percent(interval[1])}"
    return Bar(
        label,
        figures["accuracy"],
        None if interval is None else (interval[0], interval[1]),
        percent(figures["accuracy"]),
        f"{figures['num_items']:,} items{bounds}",
    )
