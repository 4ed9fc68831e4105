"""``linear_token_statistics`` in torch, tile by tile: used on CPU, and as the fallback elsewhere.

The shard is cut into tiles of ``vocab_chunk`` columns by ``row_chunk`` rows. A tile is small enough to stay in cache
and to fit ``vocab_tiles.TILE_BUDGET_BYTES``, however many rows and columns there are. Forward keeps running statistics
of each row and corrects them whenever the row's maximum grows. Backward recomputes each tile's logits.

The loop over the vocabulary is the outer one, so that each weight tile is read (and, on CPU, widened to fp32) once. Its
gradient is complete when the inner loop over rows ends, and is then rounded and stored once.

Forward has 1 + K products: the K other rows of a tile are compared one after another, in the same buffer, with the
tile's intact logits while those are still in memory. Backward has 3 products, and one more for the gradient of a KL.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import (
    NUM_STATISTICS,
    GradientSums,
    LogitGradient,
    OtherRows,
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
        self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, others: Sequence[OtherRows] = ()
    ) -> Tensor:
        statistics_NR = empty_statistics(hidden_RD, target_R, plan, num_others=len(others))
        intact, *of_others = statistics_NR.split(NUM_STATISTICS)
        tiles = Tiles.of(hidden_RD, plan, num_buffers=4 if others else 2)
        for columns in tiles.columns():
            weight_tile = operand(weight_VD[columns])
            other_tiles = [weight_tile if o.weight_VD is None else operand(o.weight_VD[columns]) for o in others]
            for rows in tiles.rows():
                target = locate(target_R[rows], columns, plan)
                old_sum = intact[1, rows].clone() if others else intact[1, rows]  # only other rows read it
                x, step = _shift(intact[:, rows], tiles.logits(0, hidden_RD[rows], weight_tile), target)
                exp_x = _absorb(intact[:, rows], x, step, tiles)
                for other, other_tile, statistics in zip(others, other_tiles, of_others, strict=True):
                    other_z = tiles.logits(2, other.hidden_RD[rows], other_tile)
                    other_x, other_step = _shift(statistics[:, rows], other_z, target)
                    difference = torch.sub(x, other_x, out=tiles.buffer(3, x.shape)).mul_(exp_x).sum(dim=1)
                    _, other_sum, difference_sum, _ = statistics[:, rows]
                    difference_sum.add_(old_sum * (step - other_step)).mul_(step.exp()).add_(difference)
                    other_sum.mul_(other_step.exp()).add_(other_x.exp_().sum(dim=1))
                intact[2, rows].add_(x.mul_(exp_x).sum(dim=1))  # last: it overwrites x
        return statistics_NR

    @torch.no_grad()
    def backward(
        self, hidden_RD: Tensor, weight_VD: Tensor, gradient: LogitGradient, plan: ShardPlan, sums: GradientSums
    ) -> None:
        if hidden_RD.shape[0] == 0:
            return
        dtype = accumulation_dtype(hidden_RD)
        other = gradient.other
        has_other_weight = other is not None and other.weight_VD is not None
        tiles = Tiles.of(hidden_RD, plan, num_buffers=2 + (other is not None), num_weight_tiles=2 + has_other_weight)
        for columns in tiles.columns():
            weight_tile = other_tile = operand(weight_VD[columns])
            if other is not None and other.weight_VD is not None:
                other_tile = operand(other.weight_VD[columns])
            if sums.weight_VD is not None:
                # If the destination is as precise as the sum, the sum is formed in it; otherwise the sum is formed in
                # a separate tensor and rounded once.
                destination = sums.weight_VD[columns]
                weight_grad_tile = destination if destination.dtype == dtype else destination.to(dtype)
            for rows in tiles.rows():
                z = tiles.logits(0, hidden_RD[rows], weight_tile)
                other_x = None
                if other is not None:
                    other_x = tiles.logits(2, other.hidden_RD[rows], other_tile).sub_(other.maximum[rows, None])
                z_grad = _to_gradient_(z, gradient, rows, columns, tiles, other_x=other_x).to(weight_tile.dtype)
                if sums.hidden_RD is not None:
                    multiply_into(sums.hidden_RD[rows], z_grad, weight_tile, scale=plan.scale, accumulate=True)
                if sums.weight_VD is not None:
                    hidden_tile = operand(hidden_RD[rows])
                    multiply_into(weight_grad_tile, z_grad.t(), hidden_tile, scale=plan.scale, accumulate=True)
            if sums.weight_VD is not None and weight_grad_tile is not destination:
                destination.copy_(weight_grad_tile)


IMPLEMENTATION = ChunkedTokenStatistics()


def _shift(statistics: Tensor, z: Tensor, target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns x = z - new maximum (in place of z) and old maximum - new maximum.

    It also updates the running maximum and stores the target's logit.
    """
    index, is_here = target
    maximum, target_logit = statistics[0], statistics[3]
    target_logit.copy_(torch.where(is_here, z.gather(1, index[:, None]).squeeze(1), target_logit))
    raised = torch.maximum(maximum, z.amax(dim=1))
    step = maximum - raised
    maximum.copy_(raised)
    return z.sub_(raised[:, None]), step


def _absorb(statistics: Tensor, x: Tensor, step: Tensor, tiles: Tiles) -> Tensor:
    """Corrects s and u for the new maximum and adds the tile to s; returns exp(x)."""
    _, sum_, shifted_sum, _ = statistics
    decay = step.exp()
    shifted_sum.add_(sum_ * step).mul_(decay)  # before s itself decays
    exp_x = torch.exp(x, out=tiles.buffer(1, x.shape))
    sum_.mul_(decay).add_(exp_x.sum(dim=1))
    return exp_x


def _to_gradient_(
    z: Tensor, gradient: LogitGradient, rows: slice, columns: slice, tiles: Tiles, *, other_x: Tensor | None
) -> Tensor:
    """Turns the logits of a tile into their gradient, in place; ``other_x`` (x') is overwritten."""
    x = z.sub_(gradient.maximum[rows, None])
    if gradient.other is not None and other_x is not None:
        exp_x = torch.exp(x, out=tiles.buffer(1, x.shape))
        difference = torch.sub(x, other_x, out=other_x).mul_(gradient.other.slope[rows, None])
        x = x.zero_() if gradient.slope is None else x.mul_(gradient.slope[rows, None])
        z_grad = x.add_(difference).add_(gradient.offset[rows, None]).mul_(exp_x)
    elif gradient.slope is None:
        z_grad = x.exp_().mul_(gradient.offset[rows, None])
    else:
        exp_x = torch.exp(x, out=tiles.buffer(1, x.shape))
        z_grad = x.mul_(gradient.slope[rows, None]).add_(gradient.offset[rows, None]).mul_(exp_x)
    index, is_here = locate(gradient.target[rows], columns, tiles.plan)
    return z_grad.scatter_add_(1, index[:, None], torch.where(is_here, gradient.grad[rows], 0.0)[:, None])
