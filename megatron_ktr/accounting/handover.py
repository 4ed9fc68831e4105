"""Counts what ranks send outside forward and backward: weights to the sampler, and groups to other replicas.

Weights are sent once per rollout. With P parameters on a stage (whole tensors) and b bytes per number:

    to one reading rank   every tensor rank sends its shard, P / tp b, to tensor rank 0. That rank of each later stage
                          sends P b to the first stage. Servers get all stages' P b from there, in one broadcast.
    to every rank         (a colocated engine on every rank) all-gather of P b over tensor ranks, then broadcast of P b
                          from its stage to all stages

A group that moves to another replica takes height x width x 3 bytes per frame and 8 bytes per token. It is sent once
from reading rank to reading rank, and then once along the ranks of its new replica.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.work import GroupWork
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class WeightTransfer:
    """The bytes that the busiest rank sends."""

    tensor: float
    pipeline: float
    servers: float
    """The whole model, sent by the first replica's reading rank to servers; 0 for a colocated engine."""


def weight_transfer(
    config: Qwen2_5_VLConfig, layout: Layout, *, to_every_rank: bool = False, bytes_per_number: int = 2
) -> WeightTransfer:
    """The bytes of one update of the sampler's weights."""
    b, tp = bytes_per_number, layout.tensor
    shards = [b * count_parameters(config, layout, rank=rank).total for rank in range(layout.pipeline)]
    has_pipeline = layout.pipeline > 1
    if to_every_rank:
        return WeightTransfer(max(shards) * (tp - 1), max(shards) * tp * has_pipeline, 0.0)
    return WeightTransfer(max(shards) * (tp > 1), max(shards[1:], default=0.0) * tp, float(sum(shards) * tp))


def moved_group_bytes(group: GroupWork, config: Qwen2_5_VLConfig) -> int:
    """The bytes of one copy of a group that moves to another replica."""
    vision = config.vision
    pixels = sum(t * h * w for t, h, w in group.video_grids) * vision.temporal_patch_size * vision.patch_size**2
    pixels += sum(h * w for _, h, w in group.image_grids) * vision.patch_size**2
    return 3 * pixels + 8 * (group.prompt_length(config) + group.num_response_tokens)
