"""The few collectives the rest of the program needs. ``group=None`` means one process: nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.object_bytes import pack_object, unpack_object
from megatron_ktr.distributed.platform import current
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send

_CHUNK_BYTES = 64 * 2**20


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums ``tensor`` over ``group`` in place and returns it. Not differentiable."""
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def broadcast_object(value: Any, *, group: ProcessGroup | None, source: int) -> Any:
    """Returns ``value`` of world rank ``source`` on every rank of ``group``; tensors come as copies, on the host.

    Other ranks' ``value`` is ignored. Tensors travel as bytes (``object_bytes.py``), through ``_CHUNK_BYTES`` of the
    device at a time.
    """
    if group is None or group.size() == 1:
        return value
    device, is_source = current().device, torch.distributed.get_rank() == source
    payload = pack_object(value) if is_source else None
    length = torch.full((), 0 if payload is None else len(payload), dtype=torch.int64, device=device)
    torch.distributed.broadcast(length, src=source, group=group)
    if payload is None:
        payload = torch.empty(int(length), dtype=torch.uint8)
    for part in payload.split(_CHUNK_BYTES):
        chunk = send(part, device) if is_source else torch.empty(len(part), dtype=torch.uint8, device=device)
        torch.distributed.broadcast(chunk, src=source, group=group)
        if not is_source:
            part.copy_(chunk)
    return value if is_source else unpack_object(payload)


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
