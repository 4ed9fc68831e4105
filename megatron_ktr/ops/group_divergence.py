"""TW-GRPO's divergence between the responses of a group, position by position, on vocabulary shards.

At position t of a group of G responses, with l_i the log-softmax that predicts token t of response i, and the uniform
-log V for a response that has ended before t:

    m = mean_i l_i      d_i = clamp(m - l_i, -11, 11)      D_t = (1/G) sum_i sum_v (exp(d_i) - d_i - 1)

``l_i`` needs log Z of every row before the first term. The intact pass (``token_statistics``) has it and every rank of
the vocabulary's group knows it, so one more pass over the shard is enough, and one more collective: tiles of positions
x G x columns, the logits again, the sum over responses and columns, ONE all-reduce of a float a position. A tile holds
all G responses of its positions, because the mean over responses sits inside the exponent.

Neither logits nor hidden states move. No gradient: D_t becomes a token weight, never a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics import shard_plan
from megatron_ktr.ops.token_statistics_interface import ShardPlan, accumulation_dtype
from megatron_ktr.ops.vocab_tiles import TILE_BUDGET_BYTES, multiply_into, operand
from megatron_ktr.types import PackedLayout

CLAMP = 11.0
"""Bound of d, in nats: where one response is sure and another is not, exp would drown every other token."""


@torch.no_grad()
def group_divergence(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    log_normalizer_R: Tensor,
    *,
    layout: PackedLayout,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """D_t of the module's header for every response token: fp32 [R] (fp64 for fp64 inputs), nats, no gradient.

    Tokens at the same position of one group share the same number. ``group_divergence_reference`` is the same formula
    with full logits.

    Args:
        hidden_RD: [R, D], the rows that predict the response tokens, group-major, then response, then position.
        weight_VD: this rank's shard of the output weight, as for ``linear_token_statistics``.
        log_normalizer_R: ``TokenStatistics.log_normalizer_R`` of the same rows, weight and temperature.
        layout: whose response tokens the rows predict.
        group: tensor-parallel group (the vocabulary's), not the group of responses.

    Raises:
        ValueError: R that differs from the layout's number of response tokens, or options out of range.
    """
    table = PositionTable.of(layout, device=hidden_RD.device)
    if not hidden_RD.shape[0] == log_normalizer_R.shape[0] == table.num_rows:
        raise ValueError(
            f"group_divergence: expected {table.num_rows} hidden rows and normalizers, one for each response token of "
            f"the layout, got {hidden_RD.shape[0]} and {log_normalizer_R.shape[0]}"
        )
    plan = shard_plan(weight_VD, group=group, vocab_size=vocab_size, temperature=temperature)
    divergence_Q = _shard_divergence(hidden_RD, weight_VD, log_normalizer_R, table, plan)
    if group is not None:
        dist.all_reduce(divergence_Q, group=group)
    return divergence_Q[table.position_R]


@dataclass(frozen=True)
class PositionTable:
    """Which rows stand at the same position of the same group. Q positions over all groups, G the largest group."""

    row_QG: Tensor
    """int64: row of R; ``num_rows`` where the response has ended, or where the group has no such response."""
    is_member_QG: Tensor
    """bool: the group has such a response (ended or not)."""
    position_R: Tensor
    """int64 [R]: index in Q of each row."""

    @property
    def num_rows(self) -> int:
        return self.position_R.shape[0]

    @classmethod
    def of(cls, layout: PackedLayout, *, device: torch.device) -> PositionTable:
        """Built on the host, from what the host knows, and moved in one copy each."""
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
        return cls(*(tensor.to(device) for tensor in (row_QG, is_member_QG, position_R)))


def _shard_divergence(
    hidden_RD: Tensor, weight_VD: Tensor, log_normalizer_R: Tensor, table: PositionTable, plan: ShardPlan
) -> Tensor:
    """This shard's part of D, [Q]."""
    num_positions, width = table.row_QG.shape
    divergence_Q = torch.zeros(num_positions, dtype=log_normalizer_R.dtype, device=hidden_RD.device)
    if num_positions == 0:
        return divergence_Q
    # One row more, which every ended response points at; its logits are replaced before they are read.
    padded_RD = F.pad(hidden_RD, (0, 0, 0, 1))
    padded_log_normalizer_R = F.pad(log_normalizer_R, (0, 1))
    is_member_QG1 = table.is_member_QG[:, :, None]
    num_members_Q1 = is_member_QG1.sum(dim=1)
    has_ended_QG1 = (table.row_QG == table.num_rows)[:, :, None]
    vocab_chunk, position_chunk = _tile_sizes(width, plan, itemsize=accumulation_dtype(hidden_RD).itemsize)
    for start in range(0, plan.num_columns, vocab_chunk):
        weight_tile = operand(weight_VD[start : min(start + vocab_chunk, plan.num_columns)])
        for first in range(0, num_positions, position_chunk):
            here = slice(first, first + position_chunk)
            rows = table.row_QG[here].flatten()
            logprobs = log_normalizer_R.new_empty(len(rows), len(weight_tile))
            multiply_into(logprobs, operand(padded_RD[rows]), weight_tile.t(), scale=plan.scale)
            logprobs_QGV = logprobs.sub_(padded_log_normalizer_R[rows, None]).unflatten(0, (-1, width))
            logprobs_QGV.masked_fill_(has_ended_QG1[here], -math.log(plan.vocab_size))
            logprobs_QGV.mul_(is_member_QG1[here])
            mean_QV = logprobs_QGV.sum(dim=1) / num_members_Q1[here]
            difference_QGV = (mean_QV[:, None] - logprobs_QGV).clamp_(-CLAMP, CLAMP)
            # expm1, because d is mostly small and exp(d) - 1 would leave it no digits.
            terms_QGV = torch.expm1(difference_QGV).sub_(difference_QGV).mul_(is_member_QG1[here])
            divergence_Q[here] += terms_QGV.sum(dim=(1, 2)) / num_members_Q1[here, 0]
    return divergence_Q


def _tile_sizes(width: int, plan: ShardPlan, *, itemsize: int) -> tuple[int, int]:
    """(columns, positions) of a tile: three tensors positions x G x columns fit the budget; at least one position."""
    columns = max(min(plan.num_columns, 1024), 1)
    return columns, max(1, TILE_BUDGET_BYTES // (3 * width * columns * itemsize))


def group_divergence_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    *,
    layout: PackedLayout,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The formula of the module's header with full logits, one position of one group at a time, on one process."""
    logits_RV = F.linear(hidden_RD, weight_VD[:vocab_size])
    logprobs_RV = F.log_softmax(logits_RV.to(accumulation_dtype(logits_RV)) / temperature, dim=-1)
    divergence_R = logprobs_RV.new_zeros(len(logprobs_RV))
    uniform_V = torch.full_like(logprobs_RV[0], -math.log(logprobs_RV.shape[1])) if len(logprobs_RV) else None
    start = 0
    for lengths in (span.response_lengths for span in layout.groups):
        starts = [start + sum(lengths[:index]) for index in range(len(lengths))]
        start += sum(lengths)
        for t in range(max(lengths, default=0)):
            rows = [first + t if t < length else None for first, length in zip(starts, lengths, strict=True)]
            logprobs_GV = torch.stack([uniform_V if row is None else logprobs_RV[row] for row in rows])
            d_GV = (logprobs_GV.mean(dim=0) - logprobs_GV).clamp(-CLAMP, CLAMP)
            divergence = (d_GV.exp() - d_GV - 1).sum() / len(lengths)
            divergence_R[[row for row in rows if row is not None]] = divergence
    return divergence_R
