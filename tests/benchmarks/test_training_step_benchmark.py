"""``benchmarks/step/run.py``: its sides are the same step, it stops where they are not, its memory is exact."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.harness import allocated_peak_bytes
from benchmarks.step import run as training_step
from benchmarks.step.baseline import PAPER, OtherLogprobs, StepNumbers, WeakBaseline, finish_step
from benchmarks.step.ours import OurStep, frame_order, numbers_of, save_random_model, token_ids_of
from benchmarks.step.run import POINTS, RECOMPUTED, TOLERANCE, compare, summarise
from benchmarks.step.strong_baseline import StrongBaseline
from megatron_ktr.data.random_groups import SyntheticSizes, synthetic_group
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

SUMMARY = {
    "time_ratio_1024",
    "time_ratio_2048",
    "time_ratio_7b_shares",
    "time_ratio_strong_1024",
    "memory_ratio_2048",
    "ktr_over_grpo_1024",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "reference")):
        sizes = dict(hidden_size=128, vision_size=40)
        save_random_model(directory / name, vocab_size=199, num_layers=2, seed=seed, **sizes)
    return directory


@pytest.mark.parametrize("options", [{}, RECOMPUTED], ids=["nothing recomputed", "recomputed"])
def test_all_sides_take_the_same_steps(models: Path, one_rank: ParallelGroups, options: dict) -> None:
    from megatron_ktr.distributed.platform import current

    directories = (models / "policy", models / "reference")
    weak, strong = WeakBaseline(*directories), StrongBaseline(*directories)
    ours = OurStep(*directories, ranks=one_rank, platform=current(), options=options)
    # Two seconds between temporal patches: the video lasts longer than it is wide, which decides where text goes on.
    sizes = SyntheticSizes(8, 56, 84, 20, (12,) * 4, seconds_per_grid=2.0)
    for index in range(2):
        group = synthetic_group(sizes, tokens=token_ids_of(models / "policy"), seed=index)
        order = frame_order(group, index)
        found = {
            "ours": numbers_of(ours.step(group, index)),
            "weak": weak.step(group, order),
            "strong": strong.step(group, order),
        }
        assert max(compare(found).values()) <= TOLERANCE
        # Something to compare: a KL term that is not nothing, and signals that chose differently.
        assert found["weak"].loss > 0.01
        masks = list(found["weak"].is_selected.values())
        assert all(int(mask.sum()) >= 9 for mask in masks) and not torch.equal(masks[0], masks[1])


def test_only_ties_follow_the_other_side() -> None:
    """Scores 0 to 9 have their threshold at 7.2: the token of 7 is a tie where ties reach 0.3 far, that of 8 is not."""
    model = torch.nn.Linear(10, 1, bias=False)
    score_GR, zeros_GR = torch.arange(10.0).reshape(2, 5), torch.zeros(2, 5)

    def select(tied: dict | None) -> StepNumbers:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        views: dict = dict(entropy_GR=score_GR, others=OtherLogprobs(zeros_GR, zeros_GR, zeros_GR))
        logprob_GR = model.weight.reshape(2, 5) * 0
        return finish_step(model, optimizer, logprob_GR, rewards=[0.0, 1.0], settings=loose, tied=tied, **views)

    loose = dataclasses.replace(PAPER, tie=0.3)
    own = select(None)
    assert own.is_selected["entropy"].nonzero().tolist() == [[1, 3], [1, 4]]
    everything = {name: torch.ones(2, 5, dtype=torch.bool) for name in own.is_selected}
    following = select(everything)
    assert following.is_selected["entropy"].nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    assert own.num_ties == 0 and following.num_ties == 1


def test_benchmark_stops_where_sides_differ() -> None:
    one = StepNumbers(0.1, 2.0, torch.zeros(2, 3), {"entropy": torch.tensor([[True, False, False]] * 2)})
    assert max(compare({"weak": one, "ours": one}).values()) == 0
    flipped = {"entropy": torch.tensor([[True, False, True]] * 2)}
    for change in (
        {"loss": 0.1 * (1 + 2 * TOLERANCE)},
        {"loss": float("nan")},
        {"grad_norm": 2.0 * (1 - 2 * TOLERANCE)},
        {"logprob_GR": torch.full((2, 3), 2 * TOLERANCE)},
        {"is_selected": flipped},
    ):
        with pytest.raises(UserError, match="not the same step"):
            compare({"weak": one, "ours": dataclasses.replace(one, **change)})


def test_allocated_peak_counts_tensors_alive_at_once() -> None:
    def run() -> None:
        one = torch.ones(1_000_000)
        two = one + 1
        del one
        three = two + 1
        assert three.sum() == 3_000_000

    # Three tensors of 4 MB, of which two live at a time; a few bytes for the sum.
    assert 8_000_000 <= allocated_peak_bytes(run) <= 8_001_000


def test_summary_is_baseline_over_ours_and_leaves_out_what_was_not_measured() -> None:
    def entry(point: str, side: str, seconds: float, size: int | None = None) -> dict:
        return {"point": point, "side": side, "seconds": seconds} | ({"allocator_bytes": size} if size else {})

    results = [
        entry("1024x128", "weak", 60.0),
        entry("1024x128", "strong", 20.0),
        entry("1024x128", "ours_recomputed", 5.0),
        entry("1024x128", "ours", 4.0),
        entry("2048x128", "weak", 100.0, 9000),
        entry("2048x128", "ours_recomputed", 10.0, 300),
        entry("2048x128", "ours", 8.0, 900),
        entry("7b_shares", "weak", 50.0),
        entry("7b_shares", "ours_recomputed", 10.0),
    ]
    objectives = [
        {"objective": name, "seconds": value}
        for name, value in (("grpo", 4.0), ("ktr_frame", 5.0), ("ktr_temporal_patch", 4.5))
    ]
    assert summarise(results, objectives) == pytest.approx(
        {
            "time_ratio_1024": 12.0,
            "time_ratio_2048": 10.0,
            "time_ratio_7b_shares": 5.0,
            "time_ratio_strong_1024": 4.0,
            "memory_ratio_2048": 30.0,
            "time_ratio_1024_nothing_recomputed": 15.0,
            "time_ratio_2048_nothing_recomputed": 12.5,
            "time_ratio_strong_1024_nothing_recomputed": 5.0,
            "memory_ratio_2048_nothing_recomputed": 10.0,
            "ktr_over_grpo_1024": 1.25,
            "ktr_over_grpo_1024_temporal_patch": 1.125,
        }
    )
    assert summarise(results[:2], []) == {}


def test_stopped_benchmark_keeps_its_points_and_goes_on_from_them(
    one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ktr.distributed.platform import current

    measured: list[str] = []

    def measure(name: str, arguments: argparse.Namespace) -> object:
        measured.append(name)
        if name == "152k":
            raise KeyboardInterrupt
        if name == "objectives":
            return [{"objective": key, "seconds": 1.0} for key in training_step.OBJECTIVES]
        entries = [{"side": side, "seconds": value} for side, value in (("ours_recomputed", 1.0), ("weak", 7.0))]
        return {"entries": entries, "differences": {"loss": 0.0}, "num_ties": 0}

    monkeypatch.setattr(training_step, "_measure_in_fresh_processes", measure)
    arguments = argparse.Namespace(points=["1024x128", "objectives", "152k", "256x128"], repeats=1)
    written: list[dict] = []
    with pytest.raises(KeyboardInterrupt):
        training_step.run_benchmark(arguments, current(), done={}, write=written.append)
    assert written[-1]["summary"]["time_ratio_1024"] == 7.0 and written[-1]["summary"]["ktr_over_grpo_1024"] == 1.0
    arguments.points.remove("152k")
    report = training_step.run_benchmark(arguments, current(), done=written[-1], write=written.append)
    assert measured == ["1024x128", "objectives", "152k", "256x128"]
    assert [entry["point"] for entry in report["results"]] == ["256x128"] * 2 + ["1024x128"] * 2
    assert report["summary"] == written[1]["summary"] and len(report["objectives"]) == len(training_step.OBJECTIVES)


def test_points_have_the_visual_tokens_they_are_named_for() -> None:
    for name, point in POINTS.items():
        assert point.sizes.num_visual_tokens == point.visual, name


def test_committed_result_has_every_number_of_the_summary() -> None:
    report = json.loads((REPOSITORY / "benchmarks/results/training_step_cpu.json").read_text())
    assert report["summary"].keys() >= SUMMARY
    assert report["summary"] == pytest.approx(summarise(report["results"], report["objectives"]))
    assert {entry["point"] for entry in report["results"]} == POINTS.keys() - {"tiny"}
    assert all(max(values.values()) <= TOLERANCE for values in report["differences"].values())
    assert report["machine"]["threads"] == 1


@pytest.mark.slow
def test_benchmark_writes_results_and_figure(tmp_path: Path) -> None:
    files = ["--out", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.svg")]
    command = [sys.executable, "benchmarks/step/run.py", "--points", "tiny", "--repeats", "1", "--json", *files]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    assert [entry["side"] for entry in report["results"]] == list(POINTS["tiny"].sides)
    assert all(
        min(entry[name] for name in ("seconds", "allocator_bytes", "resident_bytes")) > 0 for entry in report["results"]
    )
    assert report["summary"] == {}, "the summary is of other points"
    ElementTree.parse(tmp_path / "a.svg")
