"""The vocabulary head inside whole training steps: the same step with each implementation and gradient path."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from tests.support.layouts import OVERLAPPED, SMALL, sizes_of
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import StepRecord, example_groups, run_steps, score_difference
from tests.support.tiny import save_tiny_hf

GROUPS = ("mixed", "text", "long video", "even")
TOLERANCE = 1e-5
"""Relative per tensor: the same fp32 sums in another order. Seen: 1e-6."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether input and output embeddings are tied."""
    found = {is_tied: tmp_path_factory.mktemp("model") for is_tied in (False, True)}
    for is_tied, path in found.items():
        save_tiny_hf(path, tie_word_embeddings=is_tied)
    return found


def _steps(
    context: RankContext, *, sizes: ParallelSizes, watch: bool = False, **options: Any
) -> tuple[StepRecord, list[bool]]:
    """One training step, and for each backward pass of the head whether it added to ``main_grad`` itself."""
    from megatron_ktr.ops import token_statistics_chunked

    parallel, fused = context.init(sizes), []
    implementation = token_statistics_chunked.ChunkedTokenStatistics
    original = implementation.backward

    def backward(self, *args: Any) -> None:
        *_, sums = args
        # The gradient buffer is one flat tensor of which every main_grad is a view.
        fused.append(sums.weight_VD is not None and sums.weight_VD._base is not None)
        original(self, *args)

    implementation.backward = backward
    try:
        (record,) = run_steps(parallel, rollout_groups=example_groups(*GROUPS), **options)
    finally:
        implementation.backward = original
    return record, fused


def _assert_same_step(ours: StepRecord, expected: StepRecord, name: str) -> None:
    (one,), (other,) = ours.updates, expected.updates
    assert one.has_stepped and other.has_stepped
    assert one.loss == pytest.approx(other.loss, abs=2e-6), name  # a mean of log-probs with rounding errors of 1e-6
    for problem, columns in expected.scores.items():
        for key, values_R in columns.items():
            difference = score_difference(ours.scores[problem][key], values_R) if problem in ours.scores else 0.0
            assert difference < 1e-5, (name, problem, key)
    if one.gradients is not None and other.gradients is not None:
        assert max_relative_difference(one.gradients, other.gradients) <= TOLERANCE, name
    # SGD of rate 0.1 on gradients below 10, through weights near 1 that are rounded to 6e-8.
    for key, weight in ours.weights.items():
        assert float((weight - expected.weights[key]).abs().max()) < 2e-6, (name, key)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_adding_to_main_grad_gives_the_gradients_of_the_plain_path(
    ranks: RankPool, directories: dict[bool, Path], is_tied: bool
) -> None:
    """Several micro-batches per step; with data parallelism and overlapped reduction the buckets wait for the head."""
    layouts: list[tuple[int, ParallelSizes, dict[str, Any]]] = [
        (1, ParallelSizes(), {}),
        (2, sizes_of(2), {}),
        (2, sizes_of(1, 2), {}),
        (2, ParallelSizes(), dict(overlap_grad_reduce=True)),
        (4, sizes_of(1, 2), dict(overlap_grad_reduce=True)),
        (4, sizes_of(2, sp=True), OVERLAPPED),
    ]
    for world_size, sizes, layout_values in layouts:
        options = dict(sizes=sizes, hf_dir=directories[is_tied], bucket_size=SMALL if world_size > 1 else None)
        found = {}
        for fuses in (False, True):
            values = {"gradient_accumulation_fusion": None if fuses else False, **layout_values}
            found[fuses] = ranks(_steps, world_size, **options, values=values)
        name = f"{sizes} {layout_values}"
        for (plain, plain_calls), (ours, calls) in zip(found[False], found[True], strict=True):
            assert len(calls) == len(plain_calls)
            assert all(calls) and not any(plain_calls), name
            _assert_same_step(ours, plain, name)
        assert any(calls for _, calls in found[True]), "the last stage runs the head"


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fuses", [True, False], ids=["main_grad", "plain"])
def test_step_is_the_same_with_each_implementation(
    ranks: RankPool, directories: dict[bool, Path], is_tied: bool, fuses: bool
) -> None:
    """What is left to choose is the chunked one where there is no GPU; below are the interpreted kernels."""
    from megatron_ktr.ops.token_statistics import find_implementation

    assert find_implementation("auto", like=torch.zeros(1)) is find_implementation("chunked", like=torch.zeros(1))
    for shift in ("signed", "kl"):
        values = dict(shift=shift, gradient_accumulation_fusion=None if fuses else False)
        options = dict(sizes=sizes_of(2), hf_dir=directories[is_tied])
        expected = ranks(_steps, 2, **options, values={**values, "token_statistics_impl": "naive"})
        found = ranks(_steps, 2, **options, values=values)
        for (ours, _), (naive, _) in zip(found, expected, strict=True):
            assert ours.chosen.keys() == naive.chosen.keys()
            _assert_same_step(ours, naive, shift)


@pytest.mark.parametrize("values", [{}, dict(updates_per_rollout=2, loss_aggregation="token")], ids=["once", "twice"])
def test_kl_shift_selects_the_same_tokens_in_every_layout(
    ranks: RankPool, directories: dict[bool, Path], values: dict[str, Any]
) -> None:
    """Hidden rows of the other views wait on the last stage for the intact pass, alike on all tensor ranks."""
    options = dict(hf_dir=directories[False], values={"shift": "kl", **values})
    ((expected, _),) = ranks(_steps, 1, sizes=ParallelSizes(), **options)
    assert all(float(scores["kl/hidden"].max()) > 1e-3 for name, scores in expected.scores.items() if "video" in name)
    for world_size, sizes in ((2, sizes_of(2)), (2, sizes_of(1, 2)), (4, sizes_of(2, 2, sp=True))):
        for record, _ in ranks(_steps, world_size, sizes=sizes, **options):
            assert record.key_tokens == expected.key_tokens, sizes
            for problem, columns in record.scores.items():
                for key, values_R in columns.items():
                    assert score_difference(values_R, expected.scores[problem][key]) < 1e-5, (problem, key)
            for one, other in zip(record.updates, expected.updates, strict=True):
                assert one.loss == pytest.approx(other.loss, abs=2e-6)


def test_kl_shift_compares_both_views_in_the_updates_own_pass(
    directories: dict[bool, Path], one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the vocabulary each micro-batch passes once for the reference and once for the update; the views' hidden
    rows wait for the latter."""
    from megatron_ktr.ops import token_statistics_chunked

    implementation, num_views = token_statistics_chunked.ChunkedTokenStatistics, []
    original = implementation.forward

    def forward(self, *args: Any) -> torch.Tensor:
        num_views.append(len(args[-1]))
        return original(self, *args)

    monkeypatch.setattr(implementation, "forward", forward)
    run_steps(one_rank, hf_dir=directories[False], rollout_groups=example_groups(*GROUPS), values=dict(shift="kl"))
    assert num_views == [0] * len(GROUPS) + [2] * len(GROUPS)


def _lone_step(hf_dir: Path, values: dict[str, Any]) -> StepRecord:
    from megatron_ktr.distributed.groups import init_parallel
    from megatron_ktr.distributed.platform import start

    torch.set_num_threads(1)
    parallel = init_parallel(ParallelSizes(), platform=start("cpu"))
    return run_steps(parallel, hf_dir=hf_dir, rollout_groups=example_groups("mixed", "text"), values=values)[0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("shift", ["signed", "kl"])
def test_step_is_the_same_with_interpreted_triton_kernels(directories: dict[bool, Path], shift: str) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    values = dict(shift=shift, prompts_per_step=2)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            expected, ours = (
                pool.submit(_lone_step, directories[True], {**values, "token_statistics_impl": impl}).result()
                for impl in ("chunked", "triton")
            )
    _assert_same_step(ours, expected, shift)


def test_auto_is_chunked_on_cpu() -> None:
    from megatron_ktr.ops.token_statistics import find_implementation
    from megatron_ktr.ops.token_statistics_chunked import IMPLEMENTATION

    assert find_implementation("auto", like=torch.zeros(1)) is IMPLEMENTATION
