"""``benchmarks/sft/run.py``: its sides take the same step, and its committed result is of these sides."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sft.run import BOUNDS, KINDS, measure, padding_shares
from benchmarks.step.ours import save_random_model
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import current
from tests.support.paths import REPOSITORY


def test_packed_records_take_the_step_of_single_ones(tmp_path: Path, one_rank: ParallelGroups) -> None:
    """``measure`` itself compares loss and gradient norm."""
    save_random_model(tmp_path / "model", vocab_size=199, num_layers=1, hidden_size=128, vision_size=40, seed=0)
    entries = measure("video", tmp_path / "model", records=3, repeats=1, ranks=one_rank, platform=current())
    sides = {entry["side"]: entry for entry in entries}
    assert sides["off"]["micro_batches"] == 3 and sides["off"]["ratio"] == 1
    assert sides[f"packed {BOUNDS[-1]}"]["micro_batches"] == sides[f"packed {BOUNDS[-1]}"]["fewest_possible"] == 1


def test_the_committed_result_is_of_these_sides() -> None:
    report = json.loads((REPOSITORY / "benchmarks/results/sft_cpu.json").read_text(encoding="utf-8"))
    sides = ["off", *(f"packed {bound}" for bound in BOUNDS)]
    assert [(entry["records"], entry["side"]) for entry in report["results"]] == [(k, s) for k in KINDS for s in sides]
    assert report["padding"] == padding_shares(seed=0), "arithmetic alone"
    assert report["padding"]["16 buckets"] < report["padding"]["shuffled"] / 4
