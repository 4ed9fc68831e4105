"""Rows taken several times, with a gradient that adds their copies up in fp32 and in one order.

A prompt's keys and values stand before each of its G responses, so a row of them has G + 1 gradients. The backward of
``index_select`` adds them in the rows' own precision, in bf16 with G roundings one after the other, and on a GPU with
atomics, in whatever order they come: another result in every run. Here the copies are gathered and summed, and rounded
once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.transfer import send

Part = tuple[int, Tensor, Tensor]
"""Rows with c copies each: (c, the n rows, int64, places of their copies, int64 [c * n], all first copies before all
second ones)."""


@dataclass(frozen=True)
class RowCopies:
    """Runs of rows, one behind the other, in which a row may be several times."""

    runs: tuple[slice, ...]
    num_rows: int
    rows: Tensor
    """int64 [copies]: all runs."""
    _parts: dict[torch.device, list[Part]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, runs: Sequence[slice], *, num_rows: int) -> RowCopies:
        runs = tuple(run for run in runs if run.stop > run.start)
        rows = [torch.arange(run.start, run.stop) for run in runs]
        return cls(runs, num_rows, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64))

    def to(self, device: torch.device) -> RowCopies:
        return replace(self, rows=send(self.rows, device))

    def take(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [copies, ...]; backward is ``sum``."""
        return _Take.apply(x, self)

    def sum(self, gradients: Tensor | Sequence[Tensor]) -> Tensor:
        """[copies, ...], or pieces of it one after the other, -> [rows, ...]: the sum over each row's copies, in at
        least fp32, from the first to the last, rounded once; zeros for rows without one. No atomics."""
        copies = gradients if isinstance(gradients, Tensor) else torch.cat(list(gradients))
        total = copies.new_zeros(self.num_rows, *copies.shape[1:])
        for number, rows, places in self.parts(copies.device):
            part = copies.index_select(0, places)
            if number > 1:
                dtype = torch.promote_types(copies.dtype, torch.float32)
                part = part.unflatten(0, (number, -1)).sum(0, dtype=dtype).to(copies.dtype)
            total.index_copy_(0, rows, part)
        return total

    def parts(self, device: torch.device) -> list[Part]:
        """All rows with a copy, by their number of copies: of the runs 0:2, 0:2, 2:3 ``[(2, [0, 1], [0, 1, 2, 3]), (1,
        [2], [4])]``. Made for the first backward, and kept for those of the other layers."""
        if device not in self._parts:
            self._parts[device] = [
                (number, send(rows, device), send(places, device)) for number, rows, places in self._parts_on_host()
            ]
        return self._parts[device]

    def _parts_on_host(self) -> list[Part]:
        # Between two neighbouring bounds all rows have the same copies, each at a fixed distance.
        bounds = sorted({bound for run in self.runs for bound in (run.start, run.stop)})
        distances: list[list[int]] = [[] for _ in bounds]
        place = 0
        for run in self.runs:
            for index in range(bisect_left(bounds, run.start), bisect_left(bounds, run.stop)):
                distances[index].append(place - run.start)
            place += run.stop - run.start
        found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for start, stop, copies in zip(bounds, bounds[1:], distances, strict=False):
            rows = torch.arange(start, stop)
            found[len(copies)].append((rows, rows + torch.tensor(copies, dtype=torch.int64)[:, None]))
        return [
            (number, torch.cat([rows for rows, _ in pieces]), torch.cat([places for _, places in pieces], 1).flatten())
            for number, pieces in found.items()
            if number
        ]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: RowCopies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.sum(grad), None
