"""The gradient of every tensor in numbers: its norm, and how many of its elements are not finite. For dumps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    """Of the whole tensor; if only copies of it are damaged, of the copy that is damaged most."""
    ranks_not_finite: tuple[int, ...] = ()
    """The ranks that hold such elements: with one copy among several, look at that rank's memory and device."""


@dataclass
class _Part:
    """What one rank knows of a tensor."""

    is_copy: bool
    squares: float = 0.0
    num_not_finite: int = 0


@torch.no_grad()
def tensor_gradients(policy: Policy) -> dict[str, TensorGradient]:
    """By name of the weight table: the gradient that the last backward left, over the ranks that share it. A step of
    the optimizer since then has clipped it. The same on every rank; collective over the world."""
    scale = float(policy.optimizer.get_loss_scale())
    own: dict[str, _Part] = {}
    for name, gradient, is_copy in _own_gradients(policy):
        part = own.setdefault(name, _Part(is_copy))
        for piece in gradient.reshape(-1).split(_CHUNK):
            is_finite = piece.isfinite()
            part.squares += float(torch.where(is_finite, piece, 0.0).double().square().sum()) / scale**2
            part.num_not_finite += piece.numel() - int(is_finite.sum())
    by_rank = gather_objects(own, group=policy.ranks.world)
    names = dict.fromkeys(name for of_rank in by_rank for name in of_rank)
    return {name: _joined({rank: one[name] for rank, one in enumerate(by_rank) if name in one}) for name in names}


def _joined(parts: Mapping[int, _Part]) -> TensorGradient:
    """One tensor, from the parts and copies of it by rank."""
    counted = [part for part in parts.values() if not part.is_copy]
    in_copies = max((part.num_not_finite for part in parts.values() if part.is_copy), default=0)
    return TensorGradient(
        norm=math.sqrt(sum(part.squares for part in counted)),
        num_not_finite=sum(part.num_not_finite for part in counted) or in_copies,
        ranks_not_finite=tuple(rank for rank, part in parts.items() if part.num_not_finite),
    )


def _own_gradients(policy: Policy) -> Iterator[tuple[str, Tensor, bool]]:
    """What this rank has, and whether it is a copy of what another one adds: its shard with the distributed optimizer,
    else the whole gradient."""
    ranks, is_sharded = policy.ranks, policy.options.optimizer.use_distributed_optimizer
    for adapters in (False, True):
        for name, parameter in named_model_parameters(policy.bare_chunks, adapters=adapters):
            if not parameter.requires_grad:
                continue
            is_copy = ranks.tensor_rank > 0 and not getattr(parameter, "tensor_model_parallel", False)
            is_copy = is_copy or bool(getattr(parameter, "shared", False))
            is_copy = is_copy or (not is_sharded and bool(ranks.data_rank or ranks.context_rank))
            gradient = main_gradient(parameter)
            yield name, _own_shard(gradient, parameter, policy.optimizer) if is_sharded else gradient, is_copy


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
