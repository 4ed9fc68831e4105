"""The tiles over which ``group_divergence`` iterates: positions x G responses x columns of a vocabulary shard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import ShardPlan, accumulation_dtype
from megatron_ktr.ops.vocab_tiles import TILE_BUDGET_BYTES, multiply_into, operand
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedLayout

CLAMP = 11.0
"""The bound of d, in nats. Without it, a token of which one response is sure and another is not would have an exp(d)
that drowns the terms of all other tokens."""


@dataclass(frozen=True)
class PositionTable:
    """The rows at the same position of the same group: Q positions over all groups, G the size of the largest group."""

    row_QG: Tensor
    """int64: the row in R; ``num_rows`` if the response has ended, or if the group has fewer responses."""
    is_member_QG: Tensor
    """bool: whether the group has such a response (ended or not)."""
    position_R: Tensor
    """int64 [R]: each row's index in Q."""

    def at(self, positions: Tensor) -> PositionTable:
        """The table of only these positions; ``position_R`` stays that of the full table."""
        return PositionTable(self.row_QG[positions], self.is_member_QG[positions], self.position_R)

    @property
    def num_rows(self) -> int:
        return self.position_R.shape[0]

    @classmethod
    def of(cls, layout: PackedLayout, *, device: torch.device) -> PositionTable:
        """Builds the table on the host, from the layout, and sends each tensor to ``device`` in one copy."""
        lengths = [group.response_lengths for group in layout.groups]
        num_rows, width = sum(map(sum, lengths)), max(map(len, lengths), default=0)
        num_positions = sum(max(group, default=0) for group in lengths)
        row_QG = torch.full((num_positions, width), num_rows)
        is_member_QG = torch.zeros(num_positions, width, dtype=torch.bool)
        position_R = torch.empty(num_rows, dtype=torch.int64)
        start = row = 0
        for group in lengths:
            longest = max(group, default=0)
            is_member_QG[start : start + longest, : len(group)] = True
            for index, length in enumerate(group):
                row_QG[start : start + length, index] = torch.arange(row, row + length)
                position_R[row : row + length] = torch.arange(start, start + length)
                row += length
            start += longest
        return cls(*(send(tensor, device) for tensor in (row_QG, is_member_QG, position_R)))


@dataclass(frozen=True)
class DivergenceTile:
    """Some positions on some columns of the shard."""

    columns: slice
    here: slice
    """The positions of this tile."""
    weight: Tensor
    hidden: Tensor
    """[positions * G, D]"""
    logprobs_QGV: Tensor
    """The log-probabilities; 0 if the group has no such response."""
    difference_QGV: Tensor
    """The mean log-probability of the responses minus each log-probability: d before it is clamped."""
    is_member_QG1: Tensor
    num_members_Q1: Tensor


def divergence_tiles(
    hidden_RD: Tensor, weight_VD: Tensor, log_normalizer_R: Tensor, table: PositionTable, plan: ShardPlan
) -> Iterator[DivergenceTile]:
    """Yields the tiles, columns in the outer loop and positions in the inner one.

    Callers may overwrite the tensors of a tile.
    """
    num_positions, width = table.row_QG.shape
    if num_positions == 0:
        return
    # Add a row for all ended responses to point at; its logits are replaced before they are read.
    padded_RD = F.pad(hidden_RD, (0, 0, 0, 1))
    padded_log_normalizer_R = F.pad(log_normalizer_R, (0, 1))
    is_member_QG1 = table.is_member_QG[:, :, None]
    num_members_Q1 = is_member_QG1.sum(dim=1)
    has_ended_QG1 = (table.row_QG == table.num_rows)[:, :, None]
    itemsize = accumulation_dtype(hidden_RD).itemsize
    vocab_chunk, position_chunk = _tile_sizes(width, plan, hidden_size=hidden_RD.shape[1], itemsize=itemsize)
    for start in range(0, plan.num_columns, vocab_chunk):
        columns = slice(start, min(start + vocab_chunk, plan.num_columns))
        weight_tile = operand(weight_VD[columns])
        for first in range(0, num_positions, position_chunk):
            here = slice(first, first + position_chunk)
            rows = table.row_QG[here].flatten()
            hidden_tile = operand(padded_RD[rows])
            logprobs = log_normalizer_R.new_empty(len(rows), len(weight_tile))
            multiply_into(logprobs, hidden_tile, weight_tile.t(), scale=plan.scale)
            logprobs_QGV = logprobs.sub_(padded_log_normalizer_R[rows, None]).unflatten(0, (-1, width))
            logprobs_QGV.masked_fill_(has_ended_QG1[here], -math.log(plan.vocab_size))
            logprobs_QGV.mul_(is_member_QG1[here])
            mean_QV = logprobs_QGV.sum(dim=1) / num_members_Q1[here]
            yield DivergenceTile(
                columns=columns,
                here=here,
                weight=weight_tile,
                hidden=hidden_tile,
                logprobs_QGV=logprobs_QGV,
                difference_QGV=mean_QV[:, None] - logprobs_QGV,
                is_member_QG1=is_member_QG1[here],
                num_members_Q1=num_members_Q1[here],
            )


def slopes_of(difference_QGV: Tensor, is_member_QG1: Tensor) -> Tensor:
    """h of ``group_divergence``: the derivative of exp(d) - d - 1 through the clamp.

    Exactly on the bounds, the clamp lets the derivative through.
    """
    is_free = (difference_QGV.abs() <= CLAMP) & is_member_QG1
    return torch.expm1(difference_QGV.clamp(-CLAMP, CLAMP)).mul_(is_free)


def _tile_sizes(width: int, plan: ShardPlan, *, hidden_size: int, itemsize: int) -> tuple[int, int]:
    """(columns, positions) of a tile; at least one position.

    The budget must hold four tensors of positions x G x columns and the hidden rows.
    """
    columns = max(min(plan.num_columns, 1024), 1)
    return columns, max(1, TILE_BUDGET_BYTES // (width * (4 * columns + hidden_size) * itemsize))
