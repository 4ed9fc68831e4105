"""``tools/benchmark_throughput.py`` on a tiny model: one and two ranks, its numbers follow from one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS, to_hf_config
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import tiny_hf_config

SIZES = ["--frames", "4", "--frame-size", "56x84", "--text-length", "20", "--response-length", "6,3"]
GROUP = dict(num_generations=4, prompt_tokens=20 + 2 * 2 * 3, response_tokens=6 + 3 + 6 + 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_hf_config().save_pretrained(directory)
    return directory


def _run(*flags: str, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launch if num_ranks > 1 else []), "tools/benchmark_throughput.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment
    )


def _report(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _check(report: dict[str, Any], *, prompts: int, num_ranks: int) -> None:
    assert {name: report[name] for name in GROUP} == GROUP
    assert report["prompts_per_step"] == prompts and report["num_gpus"] == num_ranks
    seconds = report["step_seconds"]
    assert report["tokens_per_second"] == pytest.approx(prompts * (32 + 18) / seconds)
    assert report["samples_per_second"] == pytest.approx(prompts * 4 / seconds)
    assert report["seconds"].keys() == {"pack", "vision", "score", "update"}
    # How they add up is the machine's affair: each is the slowest rank's, and a median.
    assert all(value > 0 for value in report["seconds"].values())
    assert report["peak_memory_gb"] > 0.1 and report["tflops_per_gpu"] > 0


@pytest.mark.slow
def test_one_rank_reports_throughput_as_json_and_plot(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    flags = ["--peak-tflops", "0.5", "--num-generations", "4", "--steps", "2", "--json", "--plot", str(plot)]
    report = _report(_run("--model", str(model), *SIZES, *flags))
    _check(report, prompts=1, num_ranks=1)
    assert report["mfu"] == pytest.approx(report["tflops_per_gpu"] / 0.5)
    assert len(report["steps"]) == 2
    ElementTree.parse(plot)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_two_ranks_of_any_layout_report_once(model: Path, split: str) -> None:
    layout = [f"--{split}-model-parallel-size", "2", "--num-generations", "4", "--num-layers", "2"]
    report = _report(_run("--model", str(model), *SIZES, *layout, "--steps", "1", "--json", num_ranks=2))
    _check(report, prompts=2 if split == "pipeline" else 1, num_ranks=2)
    assert report["layout"][split] == 2 and report["num_layers"] == 2 and report["mfu"] is None


def test_bad_input_is_one_line() -> None:
    for flags, message in (
        (["--model", "8b"], "--model 8b: neither one of 3b, 7b, 32b, 72b, tiny nor a directory"),
        (["--model", "7b", "--steps", "0"], "--steps: expected a whole number from 1"),
    ):
        result = _run(*flags)
        assert result.returncode == 2 and not result.stdout
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_published_configurations_survive_their_json() -> None:
    for name, config in PUBLISHED_CONFIGS.items():
        assert Qwen2_5_VLConfig.from_hf(json.loads(json.dumps(to_hf_config(config)))) == config, name
