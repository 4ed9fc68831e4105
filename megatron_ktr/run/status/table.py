"""The state of a run as a table for people, and as an object for programs. All text of files is escaped."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from typing import Any

from megatron_ktr.errors import printable
from megatron_ktr.run.status.files import RUNNING
from megatron_ktr.run.status.judge import (
    GOOD_STATES,
    Verdict,
    duration,
    incidents_of_this_part,
    is_stale,
    mean_of,
    newest,
    size,
)
from megatron_ktr.run.status.read import RankStatus, RunFacts

MOST_RANKS = 8
"""Ranks that the table lists: those whose heartbeats are oldest."""
MOST_INCIDENTS = 5
MOST_SECONDS_LEFT = 1e10
"""Three hundred years: an end that is later is no estimate, and no date far beyond it can be shown."""
_SHOWN = ("reward_mean", "loss", "grad_norm", "kl", "entropy", "response_length", "key_token_ratio", "learning_rate")


def table(run: RunFacts, verdict: Verdict) -> str:
    rows = [("run", str(run.run_dir)), ("state", _state(verdict)), ("step", _step(run, verdict))]
    if verdict.seconds_left is not None and verdict.seconds_left <= MOST_SECONDS_LEFT:
        end = datetime.datetime.fromtimestamp(run.now + verdict.seconds_left).astimezone()
        rows.append(("ends", f"in about {duration(verdict.seconds_left)}, {end:%Y-%m-%d %H:%M %Z}"))
    if run.num_parts > 1:
        rows.append(("parts", f"{run.num_parts}: begun once, taken up {run.num_parts - 1} times"))
    rows += [("last values", text) for text in _values(run)]
    rows += [("left out", text) for text in _skipped(run)]
    if (wait := mean_of(run.recent, "data_wait_fraction")) is not None:
        rows.append(("waiting", f"for data {wait:.0%} of the time"))
    rows += [("memory", text) for text in _memory(run)]
    rows += [("checkpoint", _checkpoint(run)), ("disk", f"{size(run.free_bytes or 0)} free")]
    kinds = Counter(str(one["kind"]) for one in run.incidents)
    if kinds:
        here = len(incidents_of_this_part(run))
        counts = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
        rows.append(("incidents", f"{counts} ({here} since the last start)"))
        rows += [("", f"{one.get('time')} step {one.get('step')}: {one.get('text')}") for one in _last(run)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", *_ranks(run)] if run.ranks else []
    lines += [""]
    lines += [f"{'WRONG' if one.is_wrong else 'note '}  {one.text}" for one in verdict.findings]
    lines.append("looks wrong" if verdict.looks_wrong else "nothing looks wrong")
    return "\n".join(printable(line) for line in lines)


def as_json(run: RunFacts, verdict: Verdict) -> dict[str, Any]:
    """The same for programs; names are stable."""
    checkpoint = run.checkpoint
    return {
        "run_dir": str(run.run_dir),
        "state": verdict.state,
        "looks_wrong": verdict.looks_wrong,
        "step": verdict.step,
        "num_steps": verdict.num_steps,
        "seconds_per_step": verdict.seconds_per_step,
        "seconds_left": verdict.seconds_left,
        "num_parts": run.num_parts,
        "last": dict(run.records[-1]) if run.records else None,
        "checkpoint": None
        if checkpoint is None
        else {
            "name": checkpoint.name,
            "step": checkpoint.step,
            "age_seconds": checkpoint.age_seconds,
            "bytes": checkpoint.num_bytes,
            "verdict": checkpoint.verdict,
        },
        "free_bytes": run.free_bytes,
        "has_export": run.has_export,
        "incidents": [dict(one) for one in run.incidents[-100:]],
        "ranks": [
            {**one.facts, "rank": one.rank, "age_seconds": one.age_seconds, "process": one.process} for one in run.ranks
        ],
        "findings": [{"is_wrong": one.is_wrong, "text": one.text} for one in verdict.findings],
    }


def _state(verdict: Verdict) -> str:
    return verdict.state if verdict.state in GOOD_STATES else verdict.state.upper()


def _step(run: RunFacts, verdict: Verdict) -> str:
    text = f"{verdict.step} of {'?' if verdict.num_steps is None else verdict.num_steps} done"
    if verdict.seconds_per_step is not None:
        text += f", {duration(verdict.seconds_per_step)} a step"
    if verdict.state == "running" and run.ranks:
        first = run.ranks[0]
        phase, seconds = first.text("phase"), first.seconds_since("phase_since")
        since = "" if seconds is None else f" for {duration(seconds)}"
        at = int(first.number("step") or 0)
        # A heartbeat is some seconds old, and the metrics of a later step may be there already.
        when = "now" if at > verdict.step else f"{duration(first.age_seconds)} ago"
        text += f"; {when} step {at}, {f'phase {phase}' if phase else 'between phases'}{since}"
    return text


def _values(run: RunFacts) -> list[str]:
    if not run.records:
        return []
    last = run.records[-1]
    names = [name for name in _SHOWN if name in last]
    parts = [f"{name} {_number(last[name])}" for name in names]
    return [f"step {last['step']}: " + ", ".join(parts)] if parts else []


def _skipped(run: RunFacts) -> list[str]:
    if not run.records:
        return []
    last, parts = run.records[-1], []
    if (skipped := newest(run, "num_skipped")) is not None:
        kinds = {name.removeprefix("skipped/"): value for name, value in last.items() if name.startswith("skipped/")}
        detail = ", ".join(f"{kind} {_number(value)}" for kind, value in kinds.items())
        parts.append(f"samples skipped {_number(skipped)}" + (f" ({detail})" if detail else ""))
    for name, word in (
        ("skipped_updates", "updates skipped"),
        ("filter/rejected", "groups rejected"),
        ("filter/refilled", "groups refilled"),
    ):
        values = [one[name] for one in run.records if isinstance(one.get(name), int | float)]
        if values and (total := math.fsum(values)):
            parts.append(f"{word} {_number(total)} in the last {len(values)} steps")
    return ["; ".join(parts)] if parts else []


def _memory(run: RunFacts) -> list[str]:
    device, host = newest(run, "ranks/device_memory_peak_gb"), newest(run, "ranks/host_memory_gb")
    if device is None or host is None:
        return []
    return [f"device at most {size(device * 1e9)}, host {size(host * 1e9)} (the rank that has most)"]


def _checkpoint(run: RunFacts) -> str:
    one = run.checkpoint
    if one is None:
        return "none"
    note = "; tools/run_status.py --verify reads every byte" if one.verdict == "complete" else ""
    return f"step {one.step}, {duration(one.age_seconds)} old, {size(one.num_bytes)}, {one.verdict}{note}"


def _last(run: RunFacts) -> list[Any]:
    return list(run.incidents[-MOST_INCIDENTS:])


def _ranks(run: RunFacts) -> list[str]:
    order = sorted(run.ranks, key=lambda one: (not is_stale(one), -one.age_seconds, one.rank))
    shown = sorted(order[:MOST_RANKS], key=lambda one: one.rank)
    head = ("rank", "host", "pid", "process", "heartbeat", "step", "phase", "for", "memory", "files", "threads")
    rows = [head, *map(_rank_row, shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(run.ranks) > MOST_RANKS:
        lines.append(f"and {len(run.ranks) - MOST_RANKS} further ranks with newer heartbeats")
    return lines


def _rank_row(one: RankStatus) -> tuple[str, ...]:
    seconds, rss = one.seconds_since("phase_since"), one.number("rss_bytes")
    return tuple(
        printable(cell)
        for cell in (
            str(one.rank),
            one.text("host"),
            _number(one.number("pid")),
            one.process,
            f"{duration(one.age_seconds)} ago",
            _number(one.number("step")),
            one.text("phase") or ("between phases" if one.text("state") == RUNNING else one.text("state")),
            "-" if seconds is None else duration(seconds),
            "-" if rss is None else size(rss),
            _number(one.number("open_files")),
            _number(one.number("threads")),
        )
    )


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
