"""The few collectives the rest of the program needs. ``group=None`` means one process: nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.platform import current
from megatron_ktr.types import Metrics


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums ``tensor`` over ``group`` in place and returns it. Not differentiable."""
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def broadcast_object(value: Any, *, group: ProcessGroup | None, source: int) -> Any:
    """Returns ``value`` of world rank ``source`` on every rank of ``group``; pickled, tensors come as copies.

    Other ranks' ``value`` is ignored. Tensors in it should be on the host; the receiver moves them.
    """
    if group is None or group.size() == 1:
        return value
    box = [value if torch.distributed.get_rank() == source else None]
    torch.distributed.broadcast_object_list(box, src=source, group=group, device=current().device)
    return box[0]


def reduce_metrics(metrics: Metrics, group: ProcessGroup | None) -> Metrics:
    """Adds sums and counts over ``group`` and takes the largest maxima, into new metrics. Ranks may hold different
    names: a missing name counts as nothing."""
    parts: list[Metrics] = [metrics]
    if group is not None and group.size() > 1:
        parts = parts * group.size()
        torch.distributed.all_gather_object(parts, metrics, group=group)
    total = Metrics()
    # In rank order on every rank: floating-point sums come out the same everywhere.
    for part in parts:
        total.merge(part)
    return total


def barrier() -> None:
    """Waits for every rank of the world; nothing in a lone process."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
