"""Layouts a training step must not depend on: how ranks, micro-batches, buckets and recomputation are arranged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_ktr.distributed.groups import ParallelSizes
from tests.support.steps import DISTRIBUTED_SGD


@dataclass(frozen=True)
class Layout:
    """``case`` names the model and options the layout is tried on."""

    name: str
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    values: dict[str, Any] = field(default_factory=dict)
    case: str = "untied"
    bucket_size: int | None = None


def sizes_of(
    tensor: int = 1, pipeline: int = 1, *, cp: int = 1, sp: bool = False, vpp: int | None = None
) -> ParallelSizes:
    return ParallelSizes(tensor=tensor, pipeline=pipeline, context=cp, sequence_parallel=sp, virtual_pipeline=vpp)


DISTRIBUTED = DISTRIBUTED_SGD
OVERLAPPED = {**DISTRIBUTED_SGD, "overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
FRAMES = dict(vision_parallel="frame")
AGAIN = dict(recompute_vision=True)
PACKED = dict(max_tokens_per_microbatch=60)
"""Four groups of 13 to 34 tokens in two micro-batches."""
BALANCED = dict(balance_replicas=True)
SMALL = 10_000
"""Elements of a bucket: about ten buckets, so that their order matters."""

LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("two groups per micro-batch", values=dict(micro_batch_groups=2)),
        Layout("all groups in one micro-batch, tied", values=dict(micro_batch_groups=4), case="tied, clipped"),
        Layout("packed by tokens, tied", values=PACKED, case="tied, clipped"),
        Layout("full recomputation", values=FULL),
        Layout("selective recomputation", values=dict(recompute_granularity="selective")),
        Layout("distributed optimizer", values=DISTRIBUTED, case="tied, clipped"),
        Layout("vision recomputed, two groups per micro-batch", values={**AGAIN, "micro_batch_groups": 2}),
    ],
    2: [
        Layout("tp2", sizes_of(2)),
        Layout("tp2, tied", sizes_of(2), case="tied, clipped"),
        Layout("tp2 sp", sizes_of(2, sp=True)),
        Layout("tp2 sp full recomputation, tied", sizes_of(2, sp=True), FULL, case="tied, clipped"),
        Layout("tp2 frames, tied", sizes_of(2), FRAMES, case="tied, clipped"),
        Layout("tp2 sp frames, vision recomputed", sizes_of(2, sp=True), {**FRAMES, **AGAIN}),
        Layout("pp2", sizes_of(1, 2)),
        Layout("pp2, tied", sizes_of(1, 2), case="tied, clipped"),
        Layout("pp2 two groups per micro-batch", sizes_of(1, 2), dict(micro_batch_groups=2)),
        Layout("pp2 vpp2, tied", sizes_of(1, 2, vpp=2), case="tied, clipped"),
        Layout("pp2 vpp2 full recomputation", sizes_of(1, 2, vpp=2), FULL),
        Layout("dp2", values=dict(micro_batch_groups=2)),
        Layout("dp2 overlapped reduction, tied", values=dict(overlap_grad_reduce=True), case="tied, clipped"),
        Layout("dp2 distributed", values=DISTRIBUTED, case="tied, clipped"),
        Layout("dp2 distributed overlapped", values=OVERLAPPED, bucket_size=SMALL),
        Layout("dp2 balanced, packed, overlapped", values={**OVERLAPPED, **BALANCED, **PACKED}, bucket_size=SMALL),
        Layout("dp2 distributed overlapped, tied", values=OVERLAPPED, case="tied, clipped", bucket_size=SMALL),
    ],
    4: [
        Layout("tp4", sizes_of(4)),
        Layout("tp4 sp, tied", sizes_of(4, sp=True), case="tied, clipped"),
        Layout("pp4, tied", sizes_of(1, 4), case="tied, clipped"),
        Layout("tp2 pp2", sizes_of(2, 2)),
        Layout("tp2 pp2 vpp2 sp, tied", sizes_of(2, 2, sp=True, vpp=2), case="tied, clipped"),
        Layout("tp2 dp2 sp", sizes_of(2, sp=True)),
        Layout("tp2 dp2 sp distributed overlapped, tied", sizes_of(2, sp=True), OVERLAPPED, "tied, clipped", SMALL),
        Layout("pp2 dp2, tied", sizes_of(1, 2), dict(overlap_grad_reduce=True), "tied, clipped", SMALL),
        Layout("pp2 dp2 distributed overlapped", sizes_of(1, 2), OVERLAPPED, bucket_size=SMALL),
        Layout("pp2 vpp2 dp2 distributed overlapped", sizes_of(1, 2, vpp=2), OVERLAPPED, bucket_size=SMALL),
        Layout("tp4 frames", sizes_of(4), FRAMES),
        Layout("tp2 pp2 sp frames", sizes_of(2, 2, sp=True), FRAMES),
        Layout(
            "tp2 dp2 frames distributed overlapped, tied", sizes_of(2), {**OVERLAPPED, **FRAMES}, "tied, clipped", SMALL
        ),
        Layout("pp2 dp2 vision recomputed, overlapped", sizes_of(1, 2), {**OVERLAPPED, **AGAIN}, bucket_size=SMALL),
        Layout("tp2 dp2 sp balanced, packed", sizes_of(2, sp=True), {**BALANCED, **PACKED}),
        Layout("dp4, tied", case="tied, clipped"),
        Layout("dp4 distributed overlapped", values=OVERLAPPED, bucket_size=SMALL),
    ],
}
