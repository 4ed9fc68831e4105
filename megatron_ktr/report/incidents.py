"""What went wrong in a run, for its section of the report: incidents, skipped updates, alarms, restarts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.files.listing import paths_in
from megatron_ktr.report.markup import Html, element, format_number
from megatron_ktr.report.run_data import RunData, read_lines
from megatron_ktr.run.incidents import FILE

MOST_ROWS = 100
MOST_STEPS = 20


def incident_section(run: RunData) -> Html | None:
    """The heading, what was counted, and a table of the last incidents; None if nothing happened.

    Raises:
        UserError: the file of incidents is damaged before its last line.
    """
    incidents = [values for _, values in read_lines(run.path / FILE)] if (run.path / FILE).is_file() else []
    notes = [*_restarts(run), *_skipped(run), *_alarms(run)]
    if not incidents and not notes:
        return None
    kinds = Counter(_text(one.get("kind")) for one in incidents)
    if kinds:
        notes.append("Incidents: " + ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()) + ".")
    if len(incidents) > MOST_ROWS:
        notes.append(f"The last {MOST_ROWS} are shown.")
    content = [element("p", note) for note in notes]
    table = _table(incidents[-MOST_ROWS:]) if incidents else None
    return element("div", element("h3", "Incidents"), content, table, class_="incidents")


def _table(incidents: Sequence[Mapping[str, Any]]) -> Html:
    names = ("time", "step", "kind", "text")
    head = element("tr", [element("th", name, scope="col") for name in names])
    rows = [element("tr", [element("td", _text(one.get(name))) for name in names]) for one in incidents]
    table = element("table", element("thead", head), element("tbody", rows), class_="config")
    return element("div", table, class_="scroll")


def _restarts(run: RunData) -> list[str]:
    """The first steps of the parts in which the run was taken up again, from the names of their files of options."""
    numbers = [_first_step(path) for path in paths_in(run.path, "config_from_step_*.yaml")]
    steps = [str(number) for number in numbers if number is not None]
    times = "once" if len(steps) == 1 else f"{len(steps)} times"
    return [f"Taken up again {times}, at step {', '.join(steps[:MOST_STEPS])}."] if steps else []


def _first_step(path: Path) -> int | None:
    number = path.stem.removeprefix("config_from_step_").split("_")[0]
    return int(number) if number.isdecimal() else None


def _skipped(run: RunData) -> list[str]:
    steps = _steps_above_zero(run, "skipped_updates")
    return [f"Updates were skipped in {_named(steps)}."] if steps else []


def _alarms(run: RunData) -> list[str]:
    found = {name.removeprefix("alarm/"): _steps_above_zero(run, name) for name in run.metrics if name[:6] == "alarm/"}
    return [f"Alarm {name.replace('_', ' ')} in {_named(steps)}." for name, steps in found.items() if steps]


def _steps_above_zero(run: RunData, name: str) -> list[int]:
    values = run.metrics.get(name, ())
    return [step for step, value in zip(run.steps, values, strict=False) if math.isfinite(value) and value > 0]


def _named(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:MOST_STEPS]))
    more = f" and {len(steps) - MOST_STEPS} more" if len(steps) > MOST_STEPS else ""
    return f"{len(steps)} step{'s' if len(steps) > 1 else ''} ({shown}{more})"


def _text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format_number(value)
    return "-" if value is None else str(value)
