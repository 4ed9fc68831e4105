"""Raises alarms while a run trains: gradient norm, reward, entropy, length, KL, and vision that reaches no loss.

The rules are in ``alarm_rules.py``. While an alarm is on, each step has the metric ``alarm/<name>`` of value 1. When it
goes on it is raised: that is a warning on the console and an incident. It is raised again only if it was off for
``alarm_window`` steps in between. The alarm ``vision`` is different, because a run does not recover from it by itself:
as long as it is on, it is raised every ``alarm_window`` steps.

With ``alarm_action: stop`` an alarm that is raised also saves a checkpoint and ends the run. A run that is resumed
reads the metrics of the steps before. So it raises exactly what an uninterrupted run would raise, and does not raise
again what had ended it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.distributed.agreement import result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.run.alarm_rules import AlarmRule, build_rules
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import read_records, rounded
from megatron_ktr.run.step_report import StepReport


@dataclass
class _State:
    """One rule, and when its alarm was last on and last raised, in steps ago."""

    rule: AlarmRule
    since_on: float = float("inf")
    since_raised: float = float("inf")

    def next(self, values: Mapping[str, float | None], *, window: int) -> tuple[str | None, bool]:
        """Takes the values of a step. Returns why the alarm is on, if it is, and whether it is raised."""
        self.since_on += 1
        self.since_raised += 1
        reason = self.rule.read(values)
        if reason is None:
            return None, False
        is_raised = self.since_on > window or (self.rule.is_repeated and self.since_raised >= window)
        self.since_on = 0
        if is_raised:
            self.since_raised = 0
        return reason, is_raised


class AlarmBoard:
    """The alarms of a run, without anything that reads or writes files."""

    def __init__(self, options: ResilienceSection) -> None:
        self._window = options.alarm_window
        self._states = [_State(rule) for rule in build_rules(options)]
        self.metrics = frozenset(name for state in self._states for name in state.rule.metrics)
        """What the rules read."""

    def next(self, values: Mapping[str, float | None]) -> dict[str, tuple[str, bool]]:
        """Takes the metrics of the next step. Returns the alarms that are on by name: why, and whether it is raised."""
        found = {state.rule.name: state.next(values, window=self._window) for state in self._states}
        return {name: (reason, is_raised) for name, (reason, is_raised) in found.items() if reason is not None}


class Alarms(StepHook):
    """Raises the alarms that the options ask for. Every rank reads the same values, so all find the same."""

    def __init__(
        self, options: ResilienceSection, *, run_dir: Path, first_step: int, ranks: ParallelGroups, incidents: Incidents
    ) -> None:
        self._stops = options.alarm_action == "stop"
        self._incidents = incidents
        self._board = AlarmBoard(options)
        earlier = result_of_rank_zero(
            lambda: earlier_values(run_dir, names=self._board.metrics, before=first_step), ranks=ranks
        )
        for values in earlier:
            self._board.next(values)

    def after_step(self, report: StepReport) -> Stop | None:
        # As the file holds them, so that a resumed run decides by the same numbers.
        values = {name: rounded(report.values[name]) for name in self._board.metrics if name in report.values}
        raised = []
        for name, (reason, is_raised) in self._board.next(values).items():
            report.values[f"alarm/{name}"] = 1.0
            if is_raised:
                self._incidents.add("alarm", reason, step=report.step, name=name)
                raised.append(reason)
        return Stop("alarm: " + "; ".join(raised)) if raised and self._stops else None


def earlier_values(run_dir: Path, *, names: frozenset[str], before: int) -> Sequence[Mapping[str, float | None]]:
    """The values called ``names`` of the steps 1 .. ``before`` - 1 of a run, as far as they are recorded."""
    return [
        {name: _sound(record[name]) for name in names if name in record}
        for record in read_records(run_dir)
        if 0 < record["step"] < before
    ]


def _sound(value: object) -> float | None:
    """A recorded value, or None for what is no number that a float can hold: a damaged line must not end a run."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None
