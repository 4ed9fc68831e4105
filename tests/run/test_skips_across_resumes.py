"""Updates that are skipped before and after a resume: the row goes on, and a run that has not stepped yet resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import EXIT_ALARM
from megatron_ktr.train import train
from tests.run.test_online_training import settings
from tests.support.ranks import RankContext, RankPool

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "whole copies": dict(use_distributed_optimizer=False),
    "whole copies, bf16": dict(use_distributed_optimizer=False, params_dtype="bf16"),
    "shards": dict(use_distributed_optimizer=True),
}


def train_part(context: RankContext, *, inputs: Path, run_dir: Path, spoils: bool, **options: Any) -> int:
    """A part of a run, all of whose updates see a log-prob that is not finite if it ``spoils``; the exit code."""
    from megatron_ktr.policy.policy import Policy

    original = Policy.backward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(original(*args, **kwargs), num_not_finite=1)

    if spoils:
        Policy.backward = spoiled  # type: ignore[method-assign]
    changes: dict[str, Any] = dict(auto_resume=True, save_interval=1, max_skipped_in_a_row=2, prompts_per_step=2)
    try:
        return train(settings(inputs, run_dir, **changes, optimizer="adam", lr=1e-3, **options))
    finally:
        Policy.backward = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skips")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=8, num_eval=1)
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_goes_on_over_a_resume_of_a_run_that_has_not_stepped_yet(
    ranks: RankPool, inputs: Path, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    options: dict[str, Any] = dict(inputs=inputs, run_dir=run_dir, **OPTIMIZERS[name])

    def records() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    assert ranks(train_part, 1, spoils=True, train_steps=2, **options) == [0]
    assert ranks(train_part, 1, spoils=True, train_steps=3, **options) == [EXIT_ALARM]
    assert [record["skipped_in_a_row"] for record in records()] == [1.0, 2.0, 3.0]
    # What is wrong is mended: the same directory goes on from the step before.
    assert ranks(train_part, 1, spoils=False, train_steps=4, **options) == [0]
    assert [record["has_stepped"] for record in records()] == [0.0, 0.0, 1.0, 1.0]
    assert all("skipped_in_a_row" not in record for record in records()[2:])
