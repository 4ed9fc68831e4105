"""Tiles of a vocabulary shard: their sizes, buffers and products, for the ops that stream over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TILE_BUDGET_BYTES = 64 * 2**20
"""Working memory of one call beside its inputs, outputs and gradients."""


def tile_sizes(
    num_rows: int, num_columns: int, hidden_size: int, *, itemsize: int, budget_bytes: int = TILE_BUDGET_BYTES
) -> tuple[int, int]:
    """(rows, columns) of a tile whose working memory fits ``budget_bytes``, though never under 16 x 128.

    Half goes to the columns (a widened weight tile and its gradient, 2 D numbers a column), half to the rows (two
    tile-wide buffers and a widened hidden row, 2 columns + D numbers a row).
    """
    half = budget_bytes // 2 // itemsize
    columns = max(128, min(num_columns, half // (2 * hidden_size) // 128 * 128, 2048))
    rows = max(16, min(num_rows, half // (2 * columns + hidden_size) // 16 * 16))
    return rows, columns


@dataclass(frozen=True)
class TilePlan:
    """Everything about one call that is not a tensor."""

    group: dist.ProcessGroup | None
    first_id: int
    """Vocabulary id of this shard's first row."""
    num_columns: int
    """Rows of this shard that are real; its padding, always at the end, is never read. Can be 0."""
    vocab_size: int
    scale: float
    """1 / temperature."""
    reduce_hidden_grad: bool
    row_chunk: int
    vocab_chunk: int

    def column_tiles(self) -> Iterator[slice]:
        return _slices(self.num_columns, self.vocab_chunk)

    def row_tiles(self, num_rows: int) -> Iterator[slice]:
        return _slices(num_rows, self.row_chunk)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, scale: float, accumulate: bool = False) -> Tensor:
    """out = scale a @ b (+ out), with the precision of ``out`` whatever the operands' precision."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=1 if accumulate else 0, alpha=scale, out=out)
    product = torch.mm(a, b, out_dtype=out.dtype)
    return out.add_(product, alpha=scale) if accumulate else torch.mul(product, scale, out=out)


def operand(tensor: Tensor) -> Tensor:
    """What a tile product reads: CPU products of 16-bit numbers also round their result to 16 bits, so widen."""
    return tensor.to(accumulation_dtype(tensor)) if tensor.device.type == "cpu" else tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tile_buffers(count: int, num_rows: int, plan: TilePlan, *, like: Tensor) -> list[Tensor]:
    """Flat buffers for one tile, reused by all: fresh ones would cost page faults at every tile."""
    size = min(num_rows, plan.row_chunk) * min(plan.num_columns, plan.vocab_chunk)
    return [like.new_empty(size) for _ in range(count)]


def buffer_view(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    return buffer[: shape[0] * shape[1]].view(shape)


def locate(target: Tensor, columns: slice, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """(column of each target in the tile, or any valid one; whether the target is in the tile at all)."""
    index = target - (plan.first_id + columns.start)
    last = columns.stop - columns.start - 1
    return index.clamp(0, last), (index >= 0) & (index <= last)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
