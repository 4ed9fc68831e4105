"""``benchmarks/gpu_suite/run.py`` up to the device itself: every part at tiny sizes on CPU, and what failures leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_suite.common import Part, Skipped
from megatron_ktr.distributed.platform import start
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Part]:
    from megatron_ktr.distributed.groups import destroy_parallel

    platform = start("cpu")
    platform.seed(0)
    yield Part(platform, True, tmp_path / "results.jsonl", time.monotonic() + PATIENCE_SECONDS)
    destroy_parallel()


def entries(part: Part) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in map(json.loads, part.results.read_text().splitlines())}


def outcome(part: Part) -> dict[str, set[str]]:
    """Names of the entries that ran, were skipped, failed."""
    found: dict[str, set[str]] = {"ran": set(), "skipped": set(), "error": set()}
    for name, entry in entries(part).items():
        found[next((word for word in ("error", "skipped") if word in entry), "ran")].add(name)
    return found


def test_an_entry_that_fails_or_cannot_run_leaves_the_others_their_turn(part: Part) -> None:
    def skip() -> dict[str, Any]:
        raise Skipped("no such device")

    def fail() -> dict[str, Any]:
        raise ValueError("two\nlines")

    part.entry("skipped", skip)
    part.entry("failed", fail)
    assert part.entry("ran", lambda: {"value": 3}) == {"value": 3}
    part.deadline = 0.0
    part.entry("late", lambda: {"value": 4})
    found = entries(part)
    assert found["skipped"]["skipped"] == "no such device" and found["late"]["skipped"] == "out of time"
    assert found["failed"]["error"] == "ValueError: two lines" and found["ran"]["value"] == 3
    assert all(entry["seconds"] >= 0 for entry in found.values())


def test_smoke_and_kernels_run_and_skip_what_needs_a_gpu(part: Part) -> None:
    from benchmarks.gpu_suite.smoke import measure_kernels, run_smoke

    run_smoke(part)
    found = outcome(part)
    assert not found["error"]
    assert found["ran"] == {"machine", "matmul", "process group", "attention torch", "attention merged", "head chunked"}
    part.results.unlink()
    measure_kernels(part)
    found = outcome(part)
    assert not found["error"] and len(found["ran"]) == 4 + 2 * 2
    assert all(entry["forward_milliseconds"] > 0 for name, entry in entries(part).items() if "merged" in name)


def test_positions_and_save_run_and_the_long_response_is_right_everywhere(part: Part) -> None:
    from benchmarks.gpu_suite.positions import run_positions
    from benchmarks.gpu_suite.save import run_save

    run_positions(part)
    run_save(part)
    assert outcome(part) == {
        "ran": {"hugging face", "local fp32", "local bf16, merged", "one checkpoint"},
        "skipped": {"local bf16, varlen", "te bf16"},
        "error": set(),
    }
    # 96 tokens: bf16's error is far above fp32's, else one of them was not computed in what it says.
    found = entries(part)
    assert max(found["local fp32"]["error_by_quarter"]) < 1e-5 < min(found["hugging face"]["bf16_error_by_quarter"])
    assert 13 < found["one checkpoint"]["checkpoint_bytes_per_parameter"] < 40


def test_steps_and_training_run_and_their_numbers_follow(part: Part) -> None:
    from benchmarks.gpu_suite.common import PEAK_TFLOPS
    from benchmarks.gpu_suite.step import NUM_TRAINING_STEPS, measure_steps, run_training

    measure_steps(part)
    found = outcome(part)
    bf16 = {f"{size} {frames} frames bf16" for size in ("3B", "7B") for frames in (32, 64)}
    assert not found["error"] and found["ran"] == bf16 | {"baseline 3B 32 frames"}
    passes = entries(part)["3B 32 frames bf16"]["passes"]
    assert passes.keys() == {"hidden", "shuffled", "reference", "forward_backward"}
    for numbers in passes.values():
        assert numbers["mfu"] == pytest.approx(numbers["tflops"] / PEAK_TFLOPS) and numbers["median_seconds"] > 0
    part.results.unlink()
    run_training(part)
    (run,) = entries(part).values()
    assert len(run["steps"]) == NUM_TRAINING_STEPS and all(step["grad_norm"] > 0 for step in run["steps"])


def test_more_layers_fit_a_larger_device_and_none_more_than_the_model_has(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_suite import step as gpu_suite_step

    part.is_tiny = False
    fitting = {}
    for gigabytes in (20, 80, 141, 10_000):
        monkeypatch.setattr(gpu_suite_step, "device_bytes", lambda platform, size=gigabytes: size * 1e9)
        fitting[gigabytes] = gpu_suite_step.layers_that_fit(part, "7B", frames=32, has_optimizer=False)
    assert fitting[20] < fitting[80] < fitting[141] <= fitting[10_000] == 28
    monkeypatch.setattr(gpu_suite_step, "device_bytes", lambda platform: 80e9)
    with_optimizer = gpu_suite_step.layers_that_fit(part, "7B", frames=32, has_optimizer=True)
    assert with_optimizer < fitting[80] and fitting[80] >= 6, "a measurement of a few layers would be one of the head"


def test_a_wrong_number_is_outside_the_tolerances() -> None:
    from benchmarks.gpu_suite.parity import distances, tolerances

    generator = torch.Generator().manual_seed(0)

    def numbers(noise: float) -> dict[str, Any]:
        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            return tensor + noise * torch.randn(tensor.shape, generator=generator)

        values = torch.arange(1.0, 65.0)
        return {
            "logprobs": {"intact": rounded(-values / 64), "hidden": rounded(-values / 32)},
            "loss": 0.5 + noise,
            "gradients": {"a": rounded(values), "b": rounded(-values.flip(0))},
        }

    reference = {"fp32": numbers(0.0), "bf16": numbers(0.004)}

    def is_within(ours: dict[str, Any], **values: Any) -> bool:
        found = distances(ours, reference["fp32"])
        return all(found[name] <= limit for name, limit in tolerances(values, reference)[1].items())

    assert is_within(numbers(0.0), params_dtype="fp32") and not is_within(numbers(0.004), params_dtype="fp32")
    assert is_within(numbers(0.005)) and not is_within(numbers(0.04))
    assert is_within(numbers(0.05), fp8_format="hybrid") and not is_within(numbers(0.5), fp8_format="hybrid")
    swapped = numbers(0.0)
    swapped["gradients"] = {"a": swapped["gradients"]["b"], "b": swapped["gradients"]["a"]}
    assert not is_within(swapped)


@pytest.mark.slow
def test_the_command_writes_every_part_and_says_what_failed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/gpu_suite/run.py", "--tiny", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    result = run("--only", "parity", "--seconds", str(PATIENCE_SECONDS))
    report = json.loads(out.read_text())
    assert result.returncode == 0 and report["failures"] == [], (result.stderr, report)
    found = {entry["name"]: entry for entry in report["parts"]["parity"]["entries"]}
    assert found["local fp32"]["within"] and found["local bf16, merged"]["within"]
    assert "skipped" in found["te fp8 tensorwise"]

    result = run("--only", "smoke", "--device", "no such platform")
    report = json.loads(out.read_text())
    assert result.returncode == 1 and "--platform must be" in report["failures"][0]
    assert report["parts"]["smoke"]["entries"] == []
