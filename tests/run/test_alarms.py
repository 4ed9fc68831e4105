"""Alarms: each formula by numbers worked out by hand, no false one on runs that go well, the same after a resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.run.alarm_rules import Fall, Level, Spike, Unseen, build_rules
from megatron_ktr.run.alarms import AlarmBoard, Alarms, earlier_values
from megatron_ktr.run.hook import Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import MetricsWriter
from megatron_ktr.run.step_report import StepReport

ALL: dict[str, Any] = dict(
    alarm_grad_norm=10.0, alarm_reward_drop=0.5, alarm_entropy=0.05, alarm_length=3.0, alarm_kl=0.5
)


def test_a_spike_is_compared_with_the_median_of_the_window_before_it() -> None:
    rule = Spike("grad_norm", "grad_norm", what="norm", times=10.0, window=4)
    # Nothing before two values are known; NaN, None, 0 and a missing value are passed over.
    given = [1000.0, None, math.nan, 0.0, 1.0, 3.0, 30.0, 31.0]
    found = [rule.read({"grad_norm": value}) for value in given]
    assert rule.read({}) is None
    # Before 30: 1000, 1, 3 with median 3, and 30 is not above 30. Before 31: 1000, 1, 3, 30 with median 16.5.
    assert found == [None] * 8
    assert rule.read({"grad_norm": 165.0}) is None, "10 times the median of 1, 3, 30, 31"
    assert rule.read({"grad_norm": 306.0}) == "the norm is 306, 10.0 times the median 30.5 of the 4 steps before"


def test_a_fall_is_measured_from_the_best_window_of_the_run() -> None:
    rule = Fall("reward", "reward_mean", what="reward", share=0.5, window=2)
    found = [rule.read({"reward_mean": value}) for value in (0.9, 0.9, 0.6, 0.6, 0.32, 0.4, 0.52)]
    # Means of two: 0.9, 0.75, 0.6, 0.46, 0.36, 0.46; half of the best is 0.45.
    assert [bool(one) for one in found] == [False] * 5 + [True, False]
    assert found[5] == "the reward over 2 steps is 0.36, 60% less than the run's best 0.9"
    rule = Fall("reward", "reward_mean", what="reward", share=0.5, window=2)
    assert not any(rule.read({"reward_mean": value}) for value in (-1.0, -1.0, -9.0, -9.0)), "no share of a loss"


@pytest.mark.parametrize("is_upper", [True, False])
def test_a_level_is_compared_with_the_median_of_five_steps(is_upper: bool) -> None:
    rule = Level("kl", ["kl_full", "kl"], what="KL", level=1.0, is_upper=is_upper, window=20)
    beyond, within = (2.0, 0.5) if is_upper else (0.5, 2.0)
    found = [rule.read({"kl": value}) for value in (beyond, beyond, within, within, beyond)]
    assert [bool(one) for one in found] == [False] * 4 + [True]
    assert rule.read({"kl_full": within, "kl": beyond}) is None, "the first name that is there is read"


def test_vision_is_unseen_after_three_steps_with_the_same_fault() -> None:
    rule = Unseen()
    faults = ["vision/no_shift", "vision/no_shift", "vision/tokens_alike", "", *["vision/no_gradient"] * 3]
    found = [rule.read({fault: 1.0} if fault else {"loss": 0.0}) for fault in faults]
    assert found[:6] == [None] * 6
    assert found[6] is not None and "no gradient came back" in found[6]


def test_every_alarm_but_the_default_ones_is_off_unless_it_is_asked_for() -> None:
    assert [rule.name for rule in build_rules(ResilienceSection())] == ["vision", "grad_norm"]
    assert [rule.name for rule in build_rules(ResilienceSection(alarm_grad_norm=None))] == ["vision"]
    names = [rule.name for rule in build_rules(ResilienceSection(**ALL))]
    assert names == ["vision", "grad_norm", "reward", "entropy", "length", "kl"]


class _Run:
    """A run directory whose steps are recorded and watched as a run does it."""

    def __init__(self, run_dir: Path, *, first_step: int = 1, **options: Any) -> None:
        self.writer = MetricsWriter(run_dir, first_step=first_step)
        self.alarms = Alarms(
            ResilienceSection(alarm_window=4, **options),
            run_dir=run_dir,
            first_step=first_step,
            ranks=SimpleNamespace(rank=0, world=None),  # type: ignore[arg-type]
            incidents=Incidents(run_dir),
        )

    def step(self, step: int, values: dict[str, float]) -> Stop | None:
        report = StepReport(step, dict(values), (), tuple)
        stop = self.alarms.after_step(report)
        self.writer.write(step, report.values)
        return stop


def _events(run_dir: Path) -> list[tuple[int, str]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(event["step"], event["name"]) for event in map(json.loads, lines)]


NORMS = [1.0, 1.1, 0.9, 1.0, 50.0, 60.0, 1.0, 1.0, 1.0, 1.0, 1.0, 70.0, 1 / 3]


def test_a_resumed_run_raises_the_alarms_that_an_uninterrupted_one_raises_once(tmp_path: Path) -> None:
    whole = _Run(tmp_path / "whole")
    for step, norm in enumerate(NORMS, start=1):
        assert whole.step(step, {"grad_norm": norm}) is None
    expected = [(5, "grad_norm"), (12, "grad_norm")]
    assert _events(tmp_path / "whole") == expected, "step 6 is part of the alarm of step 5"
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("alarm/grad_norm")] == [5, 6, 12]
    for cut in range(1, len(NORMS)):
        run_dir = tmp_path / f"cut {cut}"
        first = _Run(run_dir)
        # The first part comes two steps further than its checkpoint; these are done again.
        for step, norm in enumerate(NORMS[: cut + 2], start=1):
            first.step(step, {"grad_norm": norm})
        first.writer.close()
        (run_dir / "events.jsonl").unlink(missing_ok=True)
        second = _Run(run_dir, first_step=cut + 1)
        for step, norm in enumerate(NORMS[cut:], start=cut + 1):
            second.step(step, {"grad_norm": norm})
        assert _events(run_dir) == [event for event in expected if event[0] > cut]


def test_an_alarm_stops_the_run_only_if_it_is_told_to(tmp_path: Path) -> None:
    run = _Run(tmp_path, alarm_action="stop")
    stops = [run.step(step, {"grad_norm": norm}) for step, norm in enumerate(NORMS[:6], start=1)]
    assert [stop is not None for stop in stops] == [False] * 4 + [True, False]
    assert stops[4] is not None and stops[4].is_state_sound and "50.0 times the median" in stops[4].reason


def test_a_fault_of_vision_is_told_again_and_again(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for step in range(1, 12):
        run.step(step, {"vision/tokens_alike": 1.0})
    assert _events(tmp_path) == [(3, "vision"), (7, "vision"), (11, "vision")]


def _healthy_run(seed: int, *, num_steps: int) -> Iterator[dict[str, float]]:
    """Metrics as runs that go well have them: norms of a log-normal with heavy tails and a trend, rewards of 64 binary
    answers that get better, entropy that sinks to 0.2, lengths that grow by half, KL that grows to 0.1."""
    draw = random.Random(seed)
    for step in range(num_steps):
        share = step / num_steps
        skill = 0.3 + 0.4 * share
        tail = draw.lognormvariate(0.0, 0.5) if draw.random() < 0.05 else 1.0
        yield {
            "grad_norm": draw.lognormvariate(0.0, 0.35) * (1.5 - share) * tail,
            "reward_mean": sum(draw.random() < skill for _ in range(64)) / 64,
            "entropy": 1.0 - 0.8 * share + draw.gauss(0.0, 0.05),
            "response_length": 200 * (1 + 0.5 * share) * draw.lognormvariate(0.0, 0.15),
            "kl": 0.1 * share * draw.lognormvariate(0.0, 0.5),
        }


def test_runs_that_go_well_raise_no_alarm_and_runs_that_break_raise_theirs() -> None:
    """100 seeded runs of 400 steps with every alarm on; then the same with one number broken at step 300."""
    breaks = {
        "grad_norm": ("grad_norm", 30.0),
        "reward": ("reward_mean", 0.3),
        "entropy": ("entropy", 0.02),
        "length": ("response_length", 5.0),
        "kl": ("kl", 20.0),
    }
    num_found = dict.fromkeys(breaks, 0)
    for seed in range(100):
        steps = list(_healthy_run(seed, num_steps=400))
        board = AlarmBoard(ResilienceSection(**ALL))
        assert not [found for values in steps if (found := board.next(values))], seed
        name = list(breaks)[seed % len(breaks)]
        metric, factor = breaks[name]
        board = AlarmBoard(ResilienceSection(**ALL))
        raised: set[str] = set()
        for step, values in enumerate(steps[:340]):
            raised |= board.next({**values, metric: values[metric] * (factor if step >= 300 else 1.0)}).keys()
        assert raised <= {name}
        num_found[name] += name in raised
    assert set(num_found.values()) == {20}


def test_a_damaged_record_does_not_end_a_run_that_resumes(tmp_path: Path) -> None:
    values = [1.5, 10**400, "x", None, True, [1], math.inf]
    lines = [json.dumps({"step": step, "grad_norm": value}) for step, value in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = earlier_values(tmp_path, names=frozenset({"grad_norm"}), before=100)
    assert [one["grad_norm"] for one in found] == [1.5, *[None] * 6]
