"""``benchmarks/`` run at small sizes, and their memory claims hold where they can be measured exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.head.methods import METHODS
from benchmarks.head.run import summarise
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.token_statistics import Recorder


@pytest.mark.slow
def test_key_token_benchmark_writes_results_and_figure(tmp_path: Path) -> None:
    sizes = ["--rows", "32", "--hidden", "16", "--vocabulary", "501", "--tensor-parallel", "2", "--share", "0.5"]
    files = ["--out", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.svg")]
    command = [sys.executable, "benchmarks/head/run.py", "--json", "--repeats", "1", *sizes, *files]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    measured = {entry["method"] for entry in report["results"]}
    assert {"naive", "megatron", "chunked"} <= measured
    assert measured | report["not_run"].keys() == METHODS.keys() and not measured & report["not_run"].keys()
    assert all(entry["seconds"] > 0 for entry in report["results"])
    assert report["summary"] == {}, "the summary is of one size, which was not measured"
    ElementTree.parse(tmp_path / "a.svg")


@pytest.mark.slow
def test_scoring_precision_benchmark_runs_from_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/scoring_precision/run.py", "--json", "--prompts", "2", "--steps", "1"]
    command += ["--preamble-tokens", "0,600", "--remedies"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "a.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    short, long = report["lengths"]
    assert report["settings"]["prompts"] == 2 and short["response_tokens"] > 16
    assert short["prompt_tokens"]["longest"] < 100 and long["prompt_tokens"]["shortest"] > 600
    for values in [*short["results"].values(), *long["results"].values()]:
        assert 0 < values["agreement_union"] <= 1 and 0 < values["share_union"] < 1
        # bf16 keeps 8 bits: a pass in fp32 would have no noise, one that was not the same would have nats of it.
        assert 0 < values["noise_visual_mean"] < 0.5
    for length in (short, long):
        floors, remedies = length["floors"], length["remedies"]
        assert remedies.keys() == {"paper", "floor", "orders", "orders, floor"}
        assert all(100 * floors["fp32"][signal] < floors["bf16"][signal] for signal in ("visual", "temporal"))
        assert remedies["floor"]["chosen_union"] <= remedies["paper"]["chosen_union"]
        assert all(0.5 < values["gradient_cosine"] <= 1 for values in remedies.values())


def test_host_time_benchmark_runs_the_trainer_of_today() -> None:
    sizes = "--repeats 1 --prompts 2 --responses 2 --length 8 --text 8 --frames 2 --height 56 --width 56 --context 2"
    command = [sys.executable, "benchmarks/step/host_time.py", "--json", *sizes.split()]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    seconds = json.loads(result.stdout)["seconds"]
    assert all(value > 0 for value in [*seconds["data"].values(), *seconds["depth"].values()])
    assert seconds["depth"]["update"] < seconds["depth"]["step"]


def test_summary_is_ours_over_naive_at_the_summary_point() -> None:
    about = dict(rows=4096, hidden=512, vocabulary=152_064, tensor_parallel=1)
    entries = [
        {**about, "method": method, "share": share, "seconds": seconds, "extra_bytes": size}
        for method, share, seconds, size in (
            ("naive", 1.0, 10.0, 1000),
            ("naive", 0.4, 8.0, 900),
            ("chunked", 1.0, 5.0, 50),
            ("chunked", 0.4, 2.0, 40),
        )
    ]
    other = {**entries[0], "rows": 7, "seconds": 99.0}
    expected = {"time_ratio_all_rows": 0.5, "time_ratio_40pct_rows": 0.25, "memory_ratio": 0.05}
    assert summarise([other, *entries, other], ours="chunked") == expected


def test_methods_compute_the_same() -> None:
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start

    init_parallel(ParallelSizes(), platform=start("cpu"))
    try:
        generator = torch.Generator().manual_seed(0)
        hidden_RD, weight_VD = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (9, 31))
        target_R = torch.arange(9)
        found = {}
        for name in ("naive", "megatron", "chunked"):
            logprob_R, entropy_R = METHODS[name].run(hidden_RD, weight_VD, target_R)
            assert not entropy_R.requires_grad
            gradients = torch.autograd.grad(logprob_R[::2].sum(), (hidden_RD, weight_VD))
            found[name] = (logprob_R.detach(), entropy_R, *gradients)
        for name in ("megatron", "chunked"):
            for one, other in zip(found[name], found["naive"], strict=True):
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name  # fp32 sums of up to 31 terms
    finally:
        destroy_parallel()


def test_working_memory_is_independent_of_rows_times_vocabulary() -> None:
    """The largest tensor of a pass is the weight's gradient or a tile of the fixed budget, at any size."""
    for rows, vocabulary in ((64, 4096), (2048, 4096), (64, 65_536)):
        hidden_RD, weight_VD = (torch.randn(n, 8, requires_grad=True) for n in (rows, vocabulary))
        with Recorder() as recorder:
            logprob_R, _ = METHODS["chunked"].run(hidden_RD, weight_VD, torch.zeros(rows, dtype=torch.int64))
            logprob_R.sum().backward()
        assert recorder.largest <= max(weight_VD.nbytes, 32 * 2**20)
