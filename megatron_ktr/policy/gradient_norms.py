"""The gradient of every tensor in numbers: its norm, and how many of its elements are not finite. For dumps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.ops.main_grad import main_gradient
from megatron_ktr.policy.policy import Policy
from models.qwen2_5_vl.conversion import named_model_parameters

_CHUNK = 2**24


@dataclass(frozen=True)
class TensorGradient:
    norm: float
    """Over its finite elements."""
    num_not_finite: int


@torch.no_grad()
def tensor_gradients(policy: Policy) -> dict[str, TensorGradient]:
    """By name of the weight table: the gradient that the last backward left, over the ranks that share it. A step of
    the optimizer since then has clipped it. The same on every rank; collective over the world."""
    scale = float(policy.optimizer.get_loss_scale())
    own: dict[str, tuple[float, int]] = {}
    for name, gradient in _own_gradients(policy):
        squares, num_not_finite = 0.0, 0
        for part in gradient.reshape(-1).split(_CHUNK):
            is_finite = part.isfinite()
            squares += float(torch.where(is_finite, part, 0.0).double().square().sum())
            num_not_finite += part.numel() - int(is_finite.sum())
        before = own.get(name, (0.0, 0))
        own[name] = (before[0] + squares / scale**2, before[1] + num_not_finite)
    total: dict[str, tuple[float, int]] = {}
    for of_rank in gather_objects(own, group=policy.ranks.world):
        for name, (squares, number) in of_rank.items():
            before = total.get(name, (0.0, 0))
            total[name] = (before[0] + squares, before[1] + number)
    return {name: TensorGradient(math.sqrt(squares), number) for name, (squares, number) in total.items()}


def _own_gradients(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What this rank adds: its shard with the distributed optimizer, else the whole gradient on one of the ranks that
    hold it."""
    ranks, is_sharded = policy.ranks, policy.options.optimizer.use_distributed_optimizer
    if not is_sharded and (ranks.data_rank or ranks.context_rank):
        return
    for adapters in (False, True):
        for name, parameter in named_model_parameters(policy.bare_chunks, adapters=adapters):
            is_copy = ranks.tensor_rank > 0 and not getattr(parameter, "tensor_model_parallel", False)
            if not parameter.requires_grad or is_copy or getattr(parameter, "shared", False):
                continue
            gradient = main_gradient(parameter)
            yield name, _own_shard(gradient, parameter, policy.optimizer) if is_sharded else gradient


def _own_shard(gradient: Tensor, parameter: torch.nn.Parameter, optimizer: Any) -> Tensor:
    flat = gradient.reshape(-1)
    for part in optimizer.chained_optimizers:
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    if parameter in bucket["param_map"]:
                        own = bucket["param_map"][parameter]["param"]
                        return flat[own.start : own.end]
    return flat[:0]
