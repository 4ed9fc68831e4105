"""The results as tables: Markdown that is aligned, so that it can be read on a terminal, and plain data for the page.

tables_of({"video_ktr_7b": results}, protocol="official", paper=True) -> [Table(section, title, head, rows, note)]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ktr.errors import printable
from megatron_ktr.evaluation.results.paper import beside_paper

Models = Mapping[str, Mapping[str, Any]]
"""Results by the name of the model, in the order of the rows."""
NOTHING = "-"
MOST_PROBLEMS = 50
"""The largest number of items that the table of problems lists; ``results.json`` has all."""
DEPENDENCE = {"order_dependence": "order dep.", "vision_dependence": "vision dep."}


@dataclass(frozen=True)
class Table:
    """One table."""

    section: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables_of(models: Models, *, protocol: str, paper: bool = False) -> list[Table]:
    """All tables, with the chosen protocol first. A table without rows is left out."""
    tables = [
        *(accuracy_table(models, name, is_first=not place) for place, name in enumerate(_protocols(models, protocol))),
        *(_answers(models, name, is_first=not place) for place, name in enumerate(_benchmarks(models))),
        _controls(models, protocol),
        _scaling(models, protocol),
        *_categories(models, protocol),
        *([_paper(name, results, protocol) for name, results in models.items()] if paper else []),
        _problems(models),
    ]
    return [table for table in tables if table.rows]


def accuracy_table(models: Models, protocol: str, *, is_first: bool = True) -> Table:
    """One row a model and condition, one column a benchmark."""
    benchmarks = _benchmarks(models)
    rows = []
    for model, results in models.items():
        for condition in _condition_names(results):
            cells = [accuracy_cell(_condition(results, benchmark, condition), protocol) for benchmark in benchmarks]
            rows.append((model, condition, *cells))
    note = (
        f"Accuracy in % with its {_level(models)} % bootstrap interval over videos. The condition is the number of "
        "frames, with a control or a kind of voting if there is one."
    )
    note += "".join(
        f" {model} is incomplete: {_progress(results)}." for model, results in models.items() if not results["complete"]
    )
    return Table(
        "Accuracy",
        f"Accuracy, {protocol} protocol",
        ("model", "condition", *(_title(models, name) for name in benchmarks)),
        tuple(rows),
        note if is_first else "",
    )


def accuracy_cell(condition: Mapping[str, Any] | None, protocol: str) -> str:
    """The accuracy in % with its interval; of an incomplete run also what it is over, and its lower bound."""
    figures = (condition or {}).get("protocols", {}).get(protocol)
    if condition is None or figures is None:
        return NOTHING
    text = with_interval(figures["accuracy"], figures["interval"])
    if not condition["complete"]:
        share = f"{condition['num_answered']:,} of {condition['num_items']:,}"
        text += f" ({share} items; at least {percent(figures['lower_bound'])})"
    return text


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share in percent, or a difference in points.

    >>> percent(0.4162), percent(0.02, signed=True), percent(None)
    ('41.6', '+2.0', '-')
    """
    return NOTHING if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def with_interval(value: float | None, interval: Sequence[float] | None, *, signed: bool = False) -> str:
    text = percent(value, signed=signed)
    if interval is None:
        return text
    return f"{text} [{', '.join(percent(bound, signed=signed) for bound in interval)}]"


def _answers(models: Models, benchmark: str, *, is_first: bool) -> Table:
    """Format, truncated and unparsable answers, problems and costs."""
    protocols = list(
        dict.fromkeys(
            name
            for results in models.values()
            for name in results["benchmarks"].get(benchmark, {}).get("protocols", ())
        )
    )
    rows = []
    for model, results in models.items():
        for condition in results["benchmarks"].get(benchmark, {}).get("conditions", ()):
            cost = condition["cost"]
            rows.append(
                (
                    model,
                    condition["name"],
                    f"{condition['num_answered']:,} of {condition['num_items']:,}",
                    f"{len(condition['problems']):,}",
                    f"{condition['num_truncated']:,}",
                    percent(condition["format_rate"]),
                    *(f"{condition['protocols'][name]['num_unparsed']:,}" for name in protocols),
                    *(_number(cost[name]) for name in ("response_tokens", "prompt_tokens", "frames", "seconds")),
                )
            )
    head = (
        *("model", "condition", "answered", "problems", "truncated", "format %"),
        *(f"unread, {name}" for name in protocols),
        *("tokens", "prompt tokens", "frames", "seconds"),
    )
    note = (
        "Items with a problem could not be asked and count as wrong. Unread: no answer was found in the response. "
        "Tokens, frames and seconds are means over the items that were asked, with all responses of an item that votes."
    )
    return Table(
        "Answers and costs",
        f"{_title(models, benchmark)}: answers and costs",
        head,
        tuple(rows),
        note if is_first else "",
    )


def _controls(models: Models, protocol: str) -> Table:
    rows = []
    for model, results in models.items():
        for benchmark in results["benchmarks"].values():
            for control in benchmark["controls"]:
                figures = control["protocols"].get(protocol)
                if figures is None:
                    continue
                cell = with_interval(figures["difference"], figures["interval"], signed=True)
                rows.append(
                    (
                        *(model, benchmark["title"], control["condition"], control["measure"].replace("_", " ")),
                        *(cell, p_text(figures["p_value"])),
                        *(f"{control['num_pairs']:,}", f"{control['num_unchanged']:,}"),
                    )
                )
    note = (
        "Accuracy with the media intact minus accuracy under the control, in points, on the same items. Items that the "
        "control cannot change (one frame has no order) are left out and counted as unchanged."
    )
    head = ("model", "benchmark", "condition", "measure", "points", "p", "items", "unchanged")
    return Table("Controls", f"What the controls take away, {protocol} protocol", head, tuple(rows), note)


def _scaling(models: Models, protocol: str) -> Table:
    rows = []
    for model, results in models.items():
        for benchmark in results["benchmarks"].values():
            for scaling in benchmark["scaling"]:
                figures = scaling["protocols"].get(protocol)
                if figures is None:
                    continue
                costs = [
                    f"{_number(scaling['cost'][name])} ({_number(scaling['cost_ratio'][name])}x)"
                    for name in ("frames", "response_tokens", "seconds")
                ]
                cell = with_interval(figures["difference"], figures["interval"], signed=True)
                rows.append((model, benchmark["title"], scaling["condition"], scaling["single"], cell, *costs))
    note = "Gain in points over a single answer to the same items, and the cost of an item, also as a multiple."
    head = ("model", "benchmark", "condition", "beside", "points", "frames", "tokens", "seconds")
    return Table("Test-time scaling", f"What voting gains, {protocol} protocol", head, tuple(rows), note)


def _categories(models: Models, protocol: str) -> list[Table]:
    """One table a benchmark, model and axis: accuracy under each condition, then what each control takes away."""
    tables = []
    for model, results in models.items():
        for benchmark in results["benchmarks"].values():
            if protocol not in benchmark["protocols"]:
                continue
            conditions = [(c["name"], c["protocols"][protocol]["by_category"]) for c in benchmark["conditions"]]
            controls = [c for c in benchmark["controls"] if protocol in c["protocols"]]
            for axis in benchmark["axes"]:
                names = sorted({name for _, found in conditions for name in found.get(axis, {})})
                rows = []
                for name in names:
                    found = [of.get(axis, {}).get(name) for _, of in conditions]
                    changes = [c["protocols"][protocol]["by_category"].get(axis, {}).get(name) for c in controls]
                    num = max((figure["num_items"] for figure in found if figure), default=0)
                    cells = [with_interval(f["accuracy"], f["interval"]) if f else NOTHING for f in found]
                    cells += [
                        with_interval(f["difference"], f["interval"], signed=True) if f else NOTHING for f in changes
                    ]
                    rows.append((name, f"{num:,}", *cells))
                head = (
                    *(axis, "items", *(name for name, _ in conditions)),
                    *(f"{DEPENDENCE[control['measure']]}, {control['condition']}" for control in controls),
                )
                title = f"{benchmark['title']} by {axis}, {protocol} protocol" + (
                    f": {model}" if len(models) > 1 else ""
                )
                tables.append(Table("By category", title, head, tuple(rows)))
    return tables


def _paper(model: str, results: Mapping[str, Any], protocol: str) -> Table:
    """The published figures beside ours: paper, ours, difference."""
    published = beside_paper(results, protocol=protocol)
    benchmarks = [name for name in results["benchmarks"] if any(name in row["figures"] for row in published)]
    rows = []
    for row in published:
        cells = []
        for name in benchmarks:
            figure = row["figures"].get(name)
            if figure is None:
                cells.append(NOTHING)
                continue
            ours = NOTHING if figure["ours"] is None else f"{figure['ours']:.1f} ({figure['difference']:+.1f})"
            differs = "".join(f"; {words}" for words in figure["differs"])
            cells.append(f"{_published(figure['paper'])} / {ours}{differs}")
        frames = "not stated" if row["frames"] is None else str(row["frames"])
        rows.append((row["model"], frames, *cells, row["harness"], row["source"]))
    head = (
        *("published model", "frames"),
        *(results["benchmarks"][name]["title"] for name in benchmarks),
        *("harness", "source"),
    )
    note = (
        "Each cell: the published figure / ours, with ours minus the published one in brackets, and what is known to "
        "differ. The published sources name no intervals, and do not name every setting: a difference within our "
        "interval says nothing."
    )
    return Table("Beside published figures", f"{model} beside published figures, {protocol}", head, tuple(rows), note)


def _published(figure: float) -> str:
    """With the decimals of the source, and at least one."""
    text = f"{figure:g}"
    return text if "." in text else f"{text}.0"


def _problems(models: Models) -> Table:
    found = [
        (model, benchmark["title"], condition["name"], problem["item_id"], problem["reason"])
        for model, results in models.items()
        for benchmark in results["benchmarks"].values()
        for condition in benchmark["conditions"]
        for problem in condition["problems"]
    ]
    more = len(found) - MOST_PROBLEMS
    note = f"{more:,} more are in results.json." if more > 0 else ""
    head = ("model", "benchmark", "condition", "item", "reason")
    return Table("Problems", "Items that could not be asked", head, tuple(found[:MOST_PROBLEMS]), note)


def p_text(p_value: float | None) -> str:
    """A p-value for a table.

    >>> p_text(0.0312), p_text(0.0001), p_text(None)
    ('0.031', '<0.001', '-')
    """
    if p_value is None:
        return NOTHING
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _benchmarks(models: Models) -> list[str]:
    return list(dict.fromkeys(name for results in models.values() for name in results["benchmarks"]))


def _title(models: Models, benchmark: str) -> str:
    return next(r["benchmarks"][benchmark]["title"] for r in models.values() if benchmark in r["benchmarks"])


def _protocols(models: Models, first: str) -> list[str]:
    found = [
        name
        for results in models.values()
        for benchmark in results["benchmarks"].values()
        for name in benchmark["protocols"]
    ]
    return list(dict.fromkeys([first, *found]))


def _condition_names(results: Mapping[str, Any]) -> list[str]:
    found = [c["name"] for benchmark in results["benchmarks"].values() for c in benchmark["conditions"]]
    return list(dict.fromkeys(found))


def _condition(results: Mapping[str, Any], benchmark: str, name: str) -> Mapping[str, Any] | None:
    conditions = results["benchmarks"].get(benchmark, {}).get("conditions", ())
    return next((condition for condition in conditions if condition["name"] == name), None)


def _level(models: Models) -> str:
    return " and ".join(dict.fromkeys(f"{100 * results['bootstrap']['level']:g}" for results in models.values()))


def _progress(results: Mapping[str, Any]) -> str:
    return f"{results['num_answered']:,} of {results['num_wanted']:,} answers"


def markdown(models: Models, *, protocol: str = "official", paper: bool = False, title: str = "Evaluation") -> str:
    """All tables as Markdown.

    Args:
        protocol: the one whose figures come first, and which the tables of categories, controls and the paper show.
        paper: also the published figures beside ours.
    """
    return markdown_of(tables_of(models, protocol=protocol, paper=paper), title=title)


def markdown_of(tables: Sequence[Table], *, title: str) -> str:
    parts, section = [f"# {_escaped(title)}"], ""
    for table in tables:
        if table.section != section:
            section = table.section
            parts.append(f"## {section}")
        parts.append(f"### {_escaped(table.title)}")
        if table.note:
            parts.append(_escaped(table.note))
        parts.append(_markdown_table(table))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [[_escaped(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(table.head))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def _escaped(text: str) -> str:
    """Text of data sets and names in Markdown, still readable as it is: no cell ends, no tags, links or emphasis, and
    no control characters or halves of characters."""
    text = text.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return re.sub(r"[\\|`*]|<(?=[A-Za-z/!?])|\[(?=[^\]]*\]\()", r"\\\g<0>", printable(text))
