"""Our model against Hugging Face, in fp32, in every layout: the numerical proof everything else stands on.

Each case is a random tiny model and three groups: a prompt with two images (odd grids) and a video, a prompt with a
video that lasts longer than it is wide, and a text-only prompt. Two micro-batches run through megatron-core's own
schedule and gradient finalisation; Hugging Face runs every response as its own sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.types import PackedBatch
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from tests.support.parity import (
    Group,
    Medium,
    hf_reference,
    make_group,
    max_relative_difference,
    pack,
    weights_R,
)
from tests.support.ranks import RankContext, RankPool
from tests.support.tiny import PARITY_CONFIGS, save_tiny_hf

LOGPROB_TOLERANCE = 1e-5
"""fp32 on both sides; sums of at most 128 terms in different orders, four layers deep. Seen: 2e-6."""
GRADIENT_TOLERANCE = 1e-4
"""Relative, per tensor. Seen: 1e-5, in tensors whose gradient nearly cancels."""

MIXED = (
    Medium("image", (1, 6, 10)),
    Medium("video", (2, 4, 6), seconds_per_grid=1.0),
    Medium("image", (1, 10, 2)),
)
LONG_VIDEO = (Medium("video", (4, 4, 2), seconds_per_grid=2.5),)
"""Temporal positions reach 3 * 2.5 * 2 = 15, the grid is two tokens wide: the two position rules differ most."""


@dataclass(frozen=True)
class Case:
    """One model with its micro-batches and Hugging Face's answer; travels to the ranks."""

    name: str
    hf_dir: Path
    micro_batches: tuple[tuple[Group, ...], ...]
    logprob_R: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one run is split. With two replicas each takes one micro-batch, and reduction overlaps with backward."""

    sizes: ParallelSizes
    world_size: int

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.sizes.model


@dataclass(frozen=True)
class Difference:
    case: str
    layout: Layout
    logprob: float
    gradient: float


LAYOUTS = {
    1: [Layout(ParallelSizes(), 1)],
    2: [
        Layout(ParallelSizes(tensor=2), 2),
        Layout(ParallelSizes(tensor=2, sequence_parallel=True), 2),
        Layout(ParallelSizes(pipeline=2), 2),
        Layout(ParallelSizes(context=2), 2),
    ],
    4: [
        Layout(ParallelSizes(tensor=2, pipeline=2), 4),
        Layout(ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), 4),
        Layout(ParallelSizes(context=4), 4),
        Layout(ParallelSizes(tensor=2, context=2, sequence_parallel=True), 4),
    ],
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All models of ``PARITY_CONFIGS`` with Hugging Face's log-probs and gradients."""
    return [_make_case(name, tmp_path_factory.mktemp("hf")) for name in PARITY_CONFIGS]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logprobs_and_gradients_equal_hugging_face(ranks: RankPool, cases: list[Case], world_size: int) -> None:
    _assert_equal(ranks(run_cases, world_size=world_size, cases=cases, layouts=LAYOUTS[world_size])[0])


def test_interleaved_pipeline_equals_hugging_face(ranks: RankPool, cases: list[Case]) -> None:
    layout = Layout(ParallelSizes(pipeline=2, virtual_pipeline=2), 2)
    _assert_equal(ranks(run_cases, world_size=2, cases=cases[:2], layouts=[layout])[0])


def test_replica_with_text_only_does_not_stall_overlapped_reduction(ranks: RankPool, cases: list[Case]) -> None:
    """Each replica sees one micro-batch without media. Were vision gradients missing there, or did they come in
    another order than with media, the replicas would reduce different buckets against each other."""
    layout = Layout(ParallelSizes(), 2)
    _assert_equal(ranks(run_cases, world_size=2, cases=cases[:1], layouts=[layout])[0])


def run_cases(context: RankContext, *, cases: list[Case], layouts: list[Layout]) -> list[Difference]:
    """Every case in every layout; complete on rank 0, where the gradients of all stages are gathered."""
    differences = []
    for layout in layouts:
        groups = context.init(layout.sizes)
        for case in cases:
            differences.append(_run_case(case, layout, ranks=groups))
    return differences


def _run_case(case: Case, layout: Layout, *, ranks: ParallelGroups) -> Difference:
    from models.qwen2_5_vl.conversion import export_hf_tensors, load_hf_weights
    from models.qwen2_5_vl.model import build_model

    chunks = build_model(Qwen2_5_VLConfig.from_hf(case.hf_dir), ranks=ranks)
    load_hf_weights(chunks, case.hf_dir, ranks=ranks)
    wrapped = _wrap(chunks, overlap=layout.num_replicas > 1)
    padding = layout.sizes.tensor if layout.sizes.sequence_parallel else 1
    batches = [(pack(mb, pad_to_multiple=padding), weights_R(mb)) for mb in case.micro_batches]
    if layout.num_replicas > 1:
        # core reduces without overlap in the first step and learns from it what to wait for: run one with the
        # micro-batches the other way round before the one that is compared.
        _forward_backward(wrapped, batches[1 - ranks.data_rank :: layout.num_replicas])
        batches = batches[ranks.data_rank :: layout.num_replicas]
    logprobs = _forward_backward(wrapped, batches)
    gradients = dict(export_hf_tensors(chunks, ranks=ranks, tensor_of=lambda p: p.main_grad))

    expected = case.logprob_R
    if layout.num_replicas > 1:  # rank 0 holds the first micro-batch only
        expected = expected[: len(batches[0][1])]
    # Only the last stage has log-probs; the largest difference over all ranks is everybody's.
    difference = torch.tensor([float((logprobs - expected).abs().max()) if ranks.is_last_stage else 0.0])
    if ranks.data_rank == 0:
        torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX, group=ranks.model)
    return Difference(
        case.name, layout, logprob=float(difference), gradient=max_relative_difference(gradients, case.gradients)
    )


def _wrap(chunks: list[Any], *, overlap: bool) -> list[Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    # Small buckets, so that an overlapped reduction really starts before backward has ended.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=10_000 if overlap else None
    )
    config = chunks[0].config
    wrapped = [DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk) for chunk in chunks]
    config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_model_grads(
        model, None, **options
    )
    if overlap:
        config.no_sync_func = wrapped[0].no_sync
    return wrapped


def _forward_backward(wrapped: list[Any], batches: list[tuple[PackedBatch, Tensor]]) -> Tensor | None:
    """Runs megatron-core's schedule; returns the log-probs of all micro-batches on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def finish(batch: PackedBatch, weight_R: Tensor, chunk: Any, hidden_RD: Tensor) -> tuple[Tensor, Tensor, Any]:
        logprob_R = chunk.module.response_statistics(hidden_RD, batch).logprob_R
        return -(weight_R * logprob_R).sum(), torch.zeros((), dtype=torch.int), logprob_R.detach()

    def forward_step(iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
        batch, weight_R = next(iterator)
        return chunk(batch), partial(finish, batch, weight_R, chunk)

    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in wrapped]
    logprobs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return torch.cat(logprobs) if logprobs else None


def _make_case(name: str, directory: Path) -> Case:
    model = save_tiny_hf(directory, **PARITY_CONFIGS[name])
    config = Qwen2_5_VLConfig.from_hf(directory)
    mixed = make_group(config, media=MIXED, response_lengths=(5, 1, 3), seed=1)
    long_video = make_group(config, media=LONG_VIDEO, response_lengths=(4, 2), seed=2)
    text = make_group(config, media=(), response_lengths=(3, 3), seed=3)
    micro_batches = ((mixed, long_video), (text,))
    logprob_R, gradients = hf_reference(model, [group for micro_batch in micro_batches for group in micro_batch])
    return Case(name, directory, micro_batches, logprob_R, gradients)


def _assert_equal(differences: list[Difference]) -> None:
    assert differences
    for difference in differences:
        assert difference.logprob <= LOGPROB_TOLERANCE, difference
        assert difference.gradient <= GRADIENT_TOLERANCE, difference


def test_the_comparison_notices_a_wrong_position(cases: list[Case], one_rank: ParallelGroups) -> None:
    """A suite of small differences proves little if nothing could make them large."""
    case = cases[0]
    shifted = replace(case.micro_batches[0][1], next_position=case.micro_batches[0][1].next_position - 8)
    broken = replace(case, micro_batches=((case.micro_batches[0][0], shifted), case.micro_batches[1]))
    difference = _run_case(broken, LAYOUTS[1][0], ranks=one_rank)
    assert difference.logprob > 100 * LOGPROB_TOLERANCE
    assert difference.gradient > 100 * GRADIENT_TOLERANCE
