"""metrics.jsonl: every step once, no digits lost, and whole at every moment."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ktr.loop import _each_step
from megatron_ktr.report.run_data import read_run
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.metrics import MetricsWriter
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.sums import Metrics


def write_steps(run_dir: Path, steps: range, *, first_step: int = 0, **values: float) -> None:
    writer = MetricsWriter(run_dir, first_step=first_step)
    for step in steps:
        writer.write(step, values)
    writer.close()


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_means_weigh_by_count_and_maxima_are_the_largest_of_all_parts() -> None:
    parts = [Metrics(), Metrics(), Metrics()]
    for part, value, count in zip(parts, (6.0, 1.0), (3, 1), strict=False):
        part.add("mean", value, count)
    for part, value in zip(parts, (-3.0, -1.0), strict=False):
        part.add_max("largest", value)
    total = Metrics()
    for part in parts:
        total.merge(part)
    assert total.means() == {"mean": 7 / 4, "largest": -1.0}


@pytest.mark.parametrize("value", [2e-6 / 3, 1.2345678e-11, -3.3333333e-9, 0.1, 123456.78, 0.0])
def test_small_values_keep_eight_significant_digits(tmp_path: Path, value: float) -> None:
    write_steps(tmp_path, range(1, 2), learning_rate=value)
    # Half a unit of the eighth digit is at most 5e-8 of the value.
    assert records(tmp_path)[0]["learning_rate"] == pytest.approx(value, rel=5e-8, abs=0.0)


def test_values_that_are_not_finite_are_null_and_read_back_as_none(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2), loss=math.nan, kl=math.inf, num_skipped=3)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    (record,) = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").open()]
    assert record["loss"] is None and record["kl"] is None
    metrics = read_run(tmp_path).metrics
    assert math.isnan(metrics["loss"][0]) and math.isnan(metrics["kl"][0]) and metrics["num_skipped"] == (3.0,)


def test_a_resumed_run_has_every_step_once_whatever_the_crash_left(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_steps(tmp_path, range(4, 7), first_step=4, loss=2.0)
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6)),
    ]


def test_dropping_steps_replaces_the_file_instead_of_writing_over_it(tmp_path: Path) -> None:
    """Whoever reads while a run is resumed, and whoever finds the directory after a crash then, sees a whole file."""
    write_steps(tmp_path, range(1, 6), loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open() as reader:
        write_steps(tmp_path, range(3, 4), first_step=3, loss=2.0)
        assert reader.read() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"], "no scratch file"


def test_a_crash_while_steps_are_dropped_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(1, 6), loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.fsync", crash)
        MetricsWriter(tmp_path, first_step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    write_steps(tmp_path, range(3, 4), first_step=3, loss=2.0)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_numbers_on_a_device_are_read_once_and_add_up_like_others(monkeypatch) -> None:
    parts = [Metrics(), Metrics()]
    parts[0].add("a", 1.0, 2.0)
    parts[0].add_later(["a", "b"], torch.tensor([2, 3]), count=torch.tensor(4))
    parts[1].add_later(["a"], torch.tensor(0.1), count=1)
    parts[1].add_later(["top"], torch.tensor([5.0]), are_maxima=True)
    parts[1].add_max("top", 4.0)
    total = Metrics()
    for part in parts:
        total.merge(part)
    num_reads, is_inside = 0, False
    read = torch.Tensor.tolist

    def counted(tensor):
        # Where a test before this one has started the platform, its redirection calls the method once more inside.
        nonlocal num_reads, is_inside
        num_reads += not is_inside
        is_inside = True
        try:
            return read(tensor)
        finally:
            is_inside = False

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    assert total.sums == {"a": 1.0 + 2.0 + float(torch.tensor(0.1)), "b": 3.0}
    assert total.counts == {"a": 7.0, "b": 4.0} and total.maxima == {"top": 5.0}
    assert num_reads == 1
    assert pickle.loads(pickle.dumps(parts[1])) == parts[1]


def test_figures_are_added_to_the_record_of_a_step_or_make_it_if_it_is_lost(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3), loss=0.5)
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.add(2, {"eval/a/accuracy": 0.25})
    writer.close()
    assert records(tmp_path)[1] == {"step": 2, "loss": 0.5, "eval/a/accuracy": 0.25}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("eval/a/accuracy")] == [(2, 0.25)], "it is not purged"
    (tmp_path / "metrics.jsonl").unlink()
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.add(2, {"eval/a/accuracy": 0.25})
    writer.close()
    assert records(tmp_path) == [{"step": 2, "eval/a/accuracy": 0.25}]


def test_displays_are_shown_the_counts_of_saves_that_failed() -> None:
    shown: list[dict[str, float]] = []

    class Display(StepHook):
        def after_step(self, report: StepReport) -> None:
            shown.append(dict(report.values))

    class Trainer:
        options = SimpleNamespace(trainer=SimpleNamespace(train_steps=1))
        policy = SimpleNamespace(ranks=SimpleNamespace(world=None))

        def train_step(self, step: int) -> StepReport:
            return StepReport(step, {"loss": 1.0}, (), tuple)

    nothing = lambda *_: None  # noqa: E731
    counts = dict(counts=lambda: {"save_failures": 2.0}, after_step=nothing, close=nothing)
    checkpoints, leave = SimpleNamespace(**counts), SimpleNamespace(agreed=nothing, can_save=True)
    recorded: list[dict[str, float]] = []
    steps: dict[str, Any] = dict(trainer=Trainer(), hooks=[Display()], checkpoints=checkpoints, leave=leave)
    steps |= dict(between=SimpleNamespace(at_start=nothing, after=nothing), start=SimpleNamespace(step=0))
    _each_step(**steps, record=lambda report: recorded.append(dict(report.values)))
    assert shown == recorded == [{"loss": 1.0, "save_failures": 2.0}]
