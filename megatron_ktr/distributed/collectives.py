"""The few collectives that the rest of the program needs. ``group=None`` means a single process: they do nothing."""

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


def gather_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensors of all ranks of ``group``, concatenated along dimension 0 in rank order. Not differentiable.

    The tensors may differ in their size along dimension 0, and in nothing else. Where sizes differ, shorter ones travel
    padded.
    """
    if group is None or group.size() == 1:
        return tensor
    size = torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    torch.distributed.all_gather(sizes, size, group=group)
    lengths = [int(found) for found in torch.cat(sizes).tolist()]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def broadcast_object(value: Any, *, group: ProcessGroup | None, source: int) -> Any:
    """Returns ``value`` of world rank ``source`` on every rank of ``group``. Its tensors arrive as copies on the host.

    The ``value`` of other ranks is ignored. Tensors are sent as bytes (``object_bytes.py``), in chunks that take at
    most ``_CHUNK_BYTES`` on the device.
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
    """New metrics with the sums and counts added up over ``group``, and with the largest maxima. Ranks may hold
    different names; a missing name contributes nothing."""
    parts: list[Metrics] = [metrics]
    if group is not None and group.size() > 1:
        parts = parts * group.size()
        torch.distributed.all_gather_object(parts, metrics, group=group)
    total = Metrics()
    # Every rank adds in rank order, so that floating-point sums are the same everywhere.
    for part in parts:
        total.merge(part)
    return total


def barrier() -> None:
    """Waits for every rank of the world; does nothing in a single process."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
