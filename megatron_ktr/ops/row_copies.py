"""Rows taken several times, with a gradient that adds their copies up in fp32 and in one order.

A prompt's keys and values stand before each of its G responses, so a row of them has G + 1 gradients. The backward of
``index_select`` adds them in the rows' own precision, in bf16 with G roundings one after the other, and on a GPU with
atomics, in whatever order they come: another result in every run. Here the copies are gathered and summed, and rounded
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class RowCopies:
    """Which rows were taken, and where the copies of each one are. Example: rows 0, 1, 0, 1, 2 of four."""

    rows: Tensor
    """int64 [copies]: ``[0, 1, 0, 1, 2]``."""
    num_rows: int
    parts: tuple[tuple[int, Tensor, Tensor], ...]
    """By the number of copies c, ascending: (c, the n rows with as many, places of their copies, int64 [c * n]), all
    first copies before all second ones: ``(1, [2], [4]), (2, [0, 1], [0, 1, 2, 3])``. Rows without a copy (3) are in
    none."""

    @classmethod
    def of(cls, rows: Tensor, *, num_rows: int) -> RowCopies:
        """``rows`` on the host, with values below ``num_rows``."""
        taken = rows.numpy()
        count = numpy.bincount(taken, minlength=num_rows)
        # Stable: a row's copies stay in their order. They come in ascending runs, which this sort merges.
        by_row = numpy.argsort(taken, kind="stable")
        start = count.cumsum() - count
        parts = []
        for number in numpy.unique(count[count > 0]).tolist():
            (these,) = numpy.nonzero(count == number)
            places = by_row[start[these] + numpy.arange(number)[:, None]]
            parts.append((number, torch.from_numpy(these), torch.from_numpy(places.reshape(-1))))
        return cls(rows, num_rows, tuple(parts))

    def to(self, device: torch.device) -> RowCopies:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        parts = tuple((number, moved(these), moved(places)) for number, these, places in self.parts)
        return RowCopies(moved(self.rows), self.num_rows, parts)

    def take(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [copies, ...]; backward is ``sum``."""
        return _Take.apply(x, self)

    def sum(self, gradients: Tensor | Sequence[Tensor]) -> Tensor:
        """[copies, ...], or pieces of it one after the other, -> [rows, ...]: the sum over each row's copies, in at
        least fp32, from the first to the last, rounded once; zeros for rows without one. No atomics."""
        copies = gradients if isinstance(gradients, Tensor) else torch.cat(list(gradients))
        total = copies.new_zeros(self.num_rows, *copies.shape[1:])
        for number, these, places in self.parts:
            part = copies.index_select(0, places)
            if number > 1:
                dtype = torch.promote_types(copies.dtype, torch.float32)
                part = part.unflatten(0, (number, -1)).sum(0, dtype=dtype).to(copies.dtype)
            total.index_copy_(0, these, part)
        return total


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: RowCopies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.sum(grad), None
