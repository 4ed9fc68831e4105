"""The best checkpoint stays until a better one is complete; all others go when they are not among the newest."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config.part_options import CheckpointOptions
from megatron_ktr.errors import UserError
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import list_checkpoints
from megatron_ktr.run.kept import BestCheckpoint, BestStep, open_best
from megatron_ktr.run.metrics import MetricsWriter
from tests.run.test_checkpoint import NoData, lone_policy
from tests.run.test_checkpoint import data_dir as data_dir  # a fixture

METRIC = "eval/held_out/accuracy"


def saved_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


def named(run_dir: Path) -> tuple[int, float, str]:
    best = json.loads((run_dir / "best.json").read_text())
    assert best["metric"] == METRIC and (run_dir / best["checkpoint"]).is_dir()
    return best["step"], best["value"], best["checkpoint"]


def test_best_is_the_first_of_the_highest_and_never_one_that_is_no_number() -> None:
    best = BestCheckpoint(METRIC)
    values = {1: math.nan, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.5 + 1e-12, 6: math.inf, 7: 0.6}
    assert [step for step, value in values.items() if best.take(step, {METRIC: value})] == [2, 7]
    assert not best.take(8, {"eval/other/accuracy": 1.0})
    assert best.steps == {7} and not best.publish(6) and best.publish(7) and best.kept == BestStep(7, 0.6)


def run_steps(checkpoints: Checkpoints, writer: MetricsWriter, values: dict[int, float]) -> None:
    assert checkpoints.best is not None
    for step, value in values.items():
        writer.write(step, {METRIC: value})
        checkpoints.after_step(step)
        checkpoints.best.take(step, {METRIC: value})
        checkpoints.after_evaluation(step)
    checkpoints.close()


def test_best_checkpoint_stays_and_a_resumed_run_knows_it(one_rank, data_dir, tmp_path, monkeypatch, caplog) -> None:
    run_dir = tmp_path / "run"
    policy = lone_policy(data_dir, run_dir, one_rank)
    options = CheckpointOptions(resolved="", num_steps=99, save_interval=3, keep_checkpoints=1)
    writer = MetricsWriter(run_dir)

    def opened(start_step: int) -> Checkpoints:
        best = open_best(run_dir, metric=METRIC, start_step=start_step, ranks=one_rank)
        return Checkpoints(run_dir, policy=policy, source=NoData(), options=options, best=best)

    checkpoints = opened(0)
    run_steps(checkpoints, writer, {1: 0.1, 2: 0.7, 3: 0.2})
    assert saved_steps(run_dir) == [2, 3] and named(run_dir)[:2] == (2, 0.7), "2 is not due, and not the newest"

    # A better one whose checkpoint cannot be written: the old best one stays, and is still the best one.
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("megatron_ktr.distributed.checkpoint_writer.save_tensor", fail)
        with pytest.raises(UserError, match="disk full"):
            run_steps(checkpoints, writer, {4: 0.9})
    assert saved_steps(run_dir) == [2, 3] and named(run_dir)[0] == 2

    # The record of step 4 is there, its checkpoint is not; a run that continues after 3 does it again.
    checkpoints = opened(3)
    assert checkpoints.best is not None and checkpoints.best.kept == BestStep(2, 0.7)
    run_steps(checkpoints, writer, {4: 0.7, 5: 0.1, 6: 0.2})
    assert saved_steps(run_dir) == [2, 6], "a tie keeps the earlier"
    run_steps(checkpoints, writer, {7: 0.8, 8: 0.2, 9: 0.1})
    assert saved_steps(run_dir) == [7, 9] and named(run_dir)[:2] == (7, 0.8)
    run_steps(checkpoints, writer, {12: 0.85})
    assert saved_steps(run_dir) == [12] and named(run_dir)[0] == 12, "it was due, and was being saved already"
    checkpoints.best.take(12, {METRIC: 0.95})
    checkpoints.after_evaluation(12)
    assert named(run_dir)[:2] == (12, 0.95), "it was complete already"

    # After a step before the best one, the best of what is left; without the option, no file that says otherwise.
    earlier = open_best(run_dir, metric=METRIC, start_step=6, ranks=one_rank)
    assert earlier is not None and earlier.kept is None
    assert not (run_dir / "best.json").exists()
    opened(12)
    assert named(run_dir)[:2] == (12, 0.85)
    other = open_best(run_dir, metric="eval/other/accuracy", start_step=12, ranks=one_rank)
    assert other is not None and other.kept is None and "by eval/other/accuracy there is none so far" in caplog.text
    assert f"named the checkpoint of step 12 as the best by {METRIC}" in caplog.text
    opened(12)
    assert open_best(run_dir, metric=None, start_step=12, ranks=one_rank) is None
    assert not (run_dir / "best.json").exists()


def test_values_that_come_late_join_their_step(tmp_path) -> None:
    writer = MetricsWriter(tmp_path, first_step=1)
    for step in (1, 2):
        writer.write(step, {"loss": step, "seconds/offload": 0.5})
    writer.add(2, {METRIC: 0.25, "seconds/offload": 0.5, "seconds/evaluate": 3})
    writer.write(3, {"loss": 3})
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 1, "loss": 1, "seconds/offload": 0.5},
        {"step": 2, "loss": 2, "seconds/offload": 1.0, METRIC: 0.25, "seconds/evaluate": 3},
        {"step": 3, "loss": 3},
    ]
