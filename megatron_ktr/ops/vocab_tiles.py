"""Tiles of a vocabulary shard: their sizes, buffers and products, for the ops that stream over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import ShardPlan, accumulation_dtype

TILE_BUDGET_BYTES = 64 * 2**20
"""The working memory of one call, besides its inputs, outputs and gradients."""


def tile_sizes(
    num_rows: int,
    num_columns: int,
    hidden_size: int,
    *,
    itemsize: int,
    num_buffers: int = 2,
    num_weight_tiles: int = 2,
    budget_bytes: int = TILE_BUDGET_BYTES,
) -> tuple[int, int]:
    """(rows, columns) of a tile whose working memory fits ``budget_bytes``, but at least 16 x 128.

    Half of the budget is for the columns: usually a widened weight tile and its gradient, which are
    ``num_weight_tiles`` x D = 2 D numbers per column. The other half is for the rows: ``num_buffers`` buffers as wide
    as the tile, and a widened hidden row, which together are ``num_buffers`` x columns + D numbers per row.
    """
    half = budget_bytes // 2 // itemsize
    columns = max(128, min(num_columns, half // (num_weight_tiles * hidden_size) // 128 * 128, 2048))
    rows = max(16, min(num_rows, half // (num_buffers * columns + hidden_size) // 16 * 16))
    return rows, columns


@dataclass(frozen=True)
class Tiles:
    """The tiles into which one call cuts its shard, and their buffers.

    All tiles share the buffers, because new ones for each tile would cause page faults.
    """

    plan: ShardPlan
    num_rows: int
    row_chunk: int
    vocab_chunk: int
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(cls, hidden_RD: Tensor, plan: ShardPlan, *, num_buffers: int, num_weight_tiles: int = 2) -> Tiles:
        num_rows, hidden_size = hidden_RD.shape
        dtype = accumulation_dtype(hidden_RD)
        row_chunk, vocab_chunk = tile_sizes(
            num_rows,
            plan.num_columns,
            hidden_size,
            itemsize=dtype.itemsize,
            num_buffers=num_buffers,
            num_weight_tiles=num_weight_tiles,
        )
        row_chunk, vocab_chunk = plan.row_chunk or row_chunk, plan.vocab_chunk or vocab_chunk
        size = min(num_rows, row_chunk) * min(plan.num_columns, vocab_chunk)
        buffers = tuple(hidden_RD.new_empty(size, dtype=dtype) for _ in range(num_buffers))
        return cls(plan=plan, num_rows=num_rows, row_chunk=row_chunk, vocab_chunk=vocab_chunk, buffers=buffers)

    def columns(self) -> Iterator[slice]:
        return _slices(self.plan.num_columns, self.vocab_chunk)

    def rows(self) -> Iterator[slice]:
        return _slices(self.num_rows, self.row_chunk)

    def buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        return self.buffers[index][: shape[0] * shape[1]].view(shape)

    def logits(self, index: int, hidden: Tensor, weight_tile: Tensor) -> Tensor:
        """Computes the logits of ``hidden`` on ``weight_tile`` in buffer ``index``.

        ``weight_tile`` must already be an ``operand``; ``hidden`` is converted here.
        """
        out = self.buffer(index, (hidden.shape[0], weight_tile.shape[0]))
        return multiply_into(out, operand(hidden), weight_tile.t(), scale=self.plan.scale)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, scale: float, accumulate: bool = False) -> Tensor:
    """Computes out = scale a @ b (+ out), in the precision of ``out`` whatever the operands' precision is."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=1 if accumulate else 0, alpha=scale, out=out)
    product = torch.mm(a, b, out_dtype=out.dtype)
    return out.add_(product, alpha=scale) if accumulate else torch.mul(product, scale, out=out)


def operand(tensor: Tensor) -> Tensor:
    """``tensor`` as an operand of a tile product: on CPU it is widened to fp32 (fp64 stays).

    CPU products of 16-bit operands would also round their result to 16 bits.
    """
    return tensor.to(accumulation_dtype(tensor)) if tensor.device.type == "cpu" else tensor


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
