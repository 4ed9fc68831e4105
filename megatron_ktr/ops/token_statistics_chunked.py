"""``linear_token_statistics`` in torch, tile by tile: the path on CPU, and the fallback elsewhere.

The shard is cut into tiles of ``vocab_chunk`` columns by ``row_chunk`` rows, small enough to stay in cache and to fit
``vocab_tiles.TILE_BUDGET_BYTES`` whatever rows and vocabulary are. A row's running numbers are corrected whenever its
maximum grows; backward makes each tile's logits again.

The vocabulary loop is the outer one, so that a weight tile is read (and, on CPU, widened to fp32) once, and its
gradient is complete, rounded and stored once, when the inner loop over rows ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import (
    LogitGradient,
    ShardPlan,
    accumulation_dtype,
    empty_statistics,
    locate,
)
from megatron_ktr.ops.vocab_tiles import Tiles, multiply_into, operand


class ChunkedTokenStatistics:
    """See ``token_statistics_interface.Implementation``."""

    @torch.no_grad()
    def forward(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        target_R: Tensor,
        plan: ShardPlan,
        counterfactual_hidden_RD: Tensor | None = None,
    ) -> Tensor:
        has_counterfactual = counterfactual_hidden_RD is not None
        statistics_KR = empty_statistics(hidden_RD, target_R, plan, has_counterfactual=has_counterfactual)
        tiles = Tiles.of(hidden_RD, plan, num_buffers=4 if has_counterfactual else 2)
        for columns in tiles.columns():
            weight_tile = operand(weight_VD[columns])
            for rows in tiles.rows():
                z = tiles.logits(0, hidden_RD[rows], weight_tile)
                index, is_here = locate(target_R[rows], columns, plan)
                _keep_target(statistics_KR[3, rows], z, index, is_here)
                if counterfactual_hidden_RD is None:
                    _absorb(statistics_KR[:, rows], z, None, tiles)
                else:
                    other_z = tiles.logits(2, counterfactual_hidden_RD[rows], weight_tile)
                    _keep_target(statistics_KR[7, rows], other_z, index, is_here)
                    _absorb(statistics_KR[:, rows], z, other_z, tiles)
        return statistics_KR

    @torch.no_grad()
    def backward(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        gradient: LogitGradient,
        plan: ShardPlan,
        *,
        needs_hidden_grad: bool,
        weight_grad_VD: Tensor | None,
    ) -> Tensor | None:
        dtype = accumulation_dtype(hidden_RD)
        hidden_grad = torch.zeros_like(hidden_RD, dtype=dtype) if needs_hidden_grad else None
        if hidden_RD.shape[0] == 0:
            return hidden_grad
        tiles = Tiles.of(hidden_RD, plan, num_buffers=2)
        for columns in tiles.columns():
            weight_tile = operand(weight_VD[columns])
            if weight_grad_VD is not None:
                # Where the destination is as precise as the sum, the sum is formed there; otherwise beside it,
                # rounded once.
                destination = weight_grad_VD[columns]
                weight_grad_tile = destination if destination.dtype == dtype else destination.to(dtype)
            for rows in tiles.rows():
                z = tiles.logits(0, hidden_RD[rows], weight_tile)
                z_grad = _to_gradient_(z, gradient, rows, columns, tiles).to(weight_tile.dtype)
                if hidden_grad is not None:
                    multiply_into(hidden_grad[rows], z_grad, weight_tile, scale=plan.scale, accumulate=True)
                if weight_grad_VD is not None:
                    hidden_tile = operand(hidden_RD[rows])
                    multiply_into(weight_grad_tile, z_grad.t(), hidden_tile, scale=plan.scale, accumulate=True)
            if weight_grad_VD is not None and weight_grad_tile is not destination:
                destination.copy_(weight_grad_tile)
        return hidden_grad


IMPLEMENTATION = ChunkedTokenStatistics()


def _keep_target(target_logit: Tensor, z: Tensor, index: Tensor, is_here: Tensor) -> None:
    target_logit.copy_(torch.where(is_here, z.gather(1, index[:, None]).squeeze(1), target_logit))


def _absorb(statistics: Tensor, z: Tensor, other_z: Tensor | None, tiles: Tiles) -> None:
    """Takes a tile's logits into its rows' running numbers; overwrites both tiles of logits."""
    step, decay = _raise_maximum(statistics[0], z)
    sum_, shifted_sum = statistics[1], statistics[2]
    shifted_sum.add_(sum_ * step).mul_(decay)  # before s itself decays
    if other_z is not None:
        other_step, other_decay = _raise_maximum(statistics[4], other_z)
        statistics[6].add_(sum_ * (step - other_step)).mul_(decay)
        statistics[5].mul_(other_decay)
    sum_.mul_(decay)
    x = z.sub_(statistics[0][:, None])
    exp_x = torch.exp(x, out=tiles.buffer(1, x.shape))
    sum_.add_(exp_x.sum(dim=1))
    if other_z is None:
        shifted_sum.add_(x.mul_(exp_x).sum(dim=1))
        return
    other_x = other_z.sub_(statistics[4][:, None])
    difference = torch.sub(x, other_x, out=tiles.buffer(3, x.shape))
    statistics[6].add_(difference.mul_(exp_x).sum(dim=1))
    shifted_sum.add_(x.mul_(exp_x).sum(dim=1))
    statistics[5].add_(other_x.exp_().sum(dim=1))


def _raise_maximum(maximum: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(old maximum - new maximum, its exponential); writes the new one."""
    raised = torch.maximum(maximum, z.amax(dim=1))
    step = maximum - raised
    maximum.copy_(raised)
    return step, step.exp()


def _to_gradient_(z: Tensor, gradient: LogitGradient, rows: slice, columns: slice, tiles: Tiles) -> Tensor:
    """Turns the logits of a tile into their gradient, in place."""
    x = z.sub_(gradient.maximum[rows, None])
    if gradient.slope is None:
        z_grad = x.exp_().mul_(gradient.offset[rows, None])
    else:
        exp_x = torch.exp(x, out=tiles.buffer(1, x.shape))
        z_grad = x.mul_(gradient.slope[rows, None]).add_(gradient.offset[rows, None]).mul_(exp_x)
    index, is_here = locate(gradient.target[rows], columns, tiles.plan)
    return z_grad.scatter_add_(1, index[:, None], torch.where(is_here, gradient.grad[rows], 0.0)[:, None])
