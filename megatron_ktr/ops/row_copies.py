"""Copies rows several times; the gradients of a row's copies are summed in fp32 and in a fixed order.

A prompt's keys and values are copied before each of its G responses, so each of these rows gets G + 1 gradients. The
backward of ``index_select`` would sum them in the rows' own precision: in bf16 that is G roundings in a row. On a GPU
it also uses atomics, so that the order and hence the result differ from run to run. Here the gradients of the copies
are gathered, summed and rounded once.
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
"""All rows that have c copies each: (c, rows, places).

``rows`` is int64 [n]. ``places`` is int64 [c * n], the places of their copies: all first copies, then all second ones,
and so on."""


@dataclass(frozen=True)
class RowCopies:
    """A concatenation of runs of rows, in which a row may occur several times."""

    runs: tuple[slice, ...]
    num_rows: int
    rows: Tensor
    """int64 [copies]: the rows of all runs."""
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
        """[copies, ...] -> [rows, ...]: the sum over each row's copies; zeros for rows without a copy.

        It sums in at least fp32, from the first copy to the last, rounds once, and uses no atomics. ``gradients`` may
        also be a sequence of pieces, which are concatenated.
        """
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
        """All rows that have a copy, grouped by their number of copies.

        Example: the runs 0:2, 0:2, 2:3 give ``[(2, [0, 1], [0, 1, 2, 3]), (1, [2], [4])]``. The first backward makes
        the parts; the backwards of the other layers reuse them.
        """
        if device not in self._parts:
            self._parts[device] = [
                (number, send(rows, device), send(places, device)) for number, rows, places in self._parts_on_host()
            ]
        return self._parts[device]

    def _parts_on_host(self) -> list[Part]:
        # All rows between two neighbouring bounds occur in the same runs, so the distance from a row to each of its
        # copies is the same for all of them.
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
