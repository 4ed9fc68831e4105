"""Log-probability and entropy of response tokens straight from hidden states: the full logits never exist.

One call replaces ``log_softmax(hidden @ weight^T)``. The vocabulary is cut into shards (tensor parallel, one a
rank) and each shard into tiles of ``vocab_chunk`` columns by ``row_chunk`` rows, small enough to stay in cache.

Forward, one pass over the shard. Each row carries four running numbers, corrected whenever its maximum grows:

    m = max z        s = sum exp(z - m)        u = sum exp(z - m) (z - m)        t = z[target], 0 if elsewhere

then ONE all-gather of these 4 R floats a rank joins the shards. With capitals for the joined values,

    logprob = (t - M) - log S        entropy = log S - U / S

Both are differences of shifted numbers, so logits of 1e4 cost no digits and equal logits give exactly log V. Every
rank joins the same gathered numbers in the same order: the results are equal bit for bit over the group.

Backward recomputes the tiles (saved: the inputs and three floats a row). With x = z - M, incoming gradients g of
logprob and e of entropy, and p = exp(x) / S,

    d z = g (1[target] - p) - e p (log p + entropy) = g 1[target] - exp(x) ((g - e U/S) + e x) / S

Rows where g and e are both zero (no key token) are dropped before the first tile. If nobody uses the entropy's
gradient the pass without ``e`` runs. The hidden gradient is a sum over shards: one all-reduce over the group, of
the remaining rows only, in fp32; left out with ``reduce_hidden_grad=False``.

Accumulation is fp32 (fp64 for fp64 inputs): a bf16 sum over 152,064 exponentials would stall after 256 equal terms,
and bf16 logits are off by up to 0.06 at 20.

The vocabulary loop is the outer one, so that a weight tile is read (and, on CPU, widened to fp32) once, and its
gradient is complete, rounded and stored once, when the inner loop over rows ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ktr.ops.vocab_tiles import (
    TilePlan,
    accumulation_dtype,
    buffer_view,
    locate,
    multiply_into,
    operand,
    tile_buffers,
    tile_sizes,
)


@dataclass(frozen=True)
class LinearLogprob:
    """Statistics of the next-token distribution of each row, equal on every rank of the group."""

    logprob_R: Tensor
    """fp32 [R] (fp64 for fp64 inputs), nats, never positive: log p(target)."""
    entropy_R: Tensor
    """fp32 [R] (fp64 for fp64 inputs), nats: -sum_v p log p over the whole vocabulary."""


def linear_logprob(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    reduce_hidden_grad: bool = True,
    row_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> LinearLogprob:
    """log p = log_softmax(hidden @ weight^T / temperature); returns log p[target] and -sum p log p per row.

    Differentiable in both results with respect to ``hidden_RD`` and ``weight_VD``. ``linear_logprob_reference`` is
    the same formula with full logits.

    Args:
        hidden_RD: [R, D], fp64, fp32, bf16 or fp16; R may be 0. Equal on every rank of ``group``.
        weight_VD: this rank's shard [Vs, D] of the output weight, same dtype; rank k holds rows k Vs .. (k+1) Vs - 1.
        target_R: int64 [R], ids in the whole vocabulary, 0 <= id < vocab_size. Equal on every rank of ``group``.
        group: tensor-parallel group; None means that ``weight_VD`` is the whole vocabulary.
        vocab_size: true size; weight rows from there on are padding, count nowhere and get zero gradient. Default:
            every row of every shard is real.
        temperature: divides the logits.
        reduce_hidden_grad: True sums the hidden gradient over ``group``. False leaves this shard's part, for a
            caller that reduces it itself (the reduce-scatter of sequence parallelism).
        row_chunk, vocab_chunk: tile size; default from ``vocab_tiles.TILE_BUDGET_BYTES``.

    Collectives: one all-gather of 4 R floats forward; at most one all-reduce of (remaining rows) x D backward. They
    run for R = 0 too. The incoming gradients must be equal on every rank of ``group``, as they are when each rank
    computes the same loss: the sum over shards and the choice of remaining rows both rest on it.

    Raises:
        ValueError: shapes, dtypes, temperature or chunk sizes that do not fit; on CPU also a target outside the
            vocabulary. Elsewhere that check would stall the device: such a row's log-probability is NaN instead.
    """
    num_shards = 1 if group is None else dist.get_world_size(group)
    shard = 0 if group is None else dist.get_rank(group)
    _check_inputs(hidden_RD, weight_VD, target_R)
    shard_size, hidden_size = weight_VD.shape
    if vocab_size is None:
        vocab_size = shard_size * num_shards
    _check_options(vocab_size, shard_size * num_shards, temperature, row_chunk, vocab_chunk)
    _check_targets(target_R, vocab_size)

    num_columns = min(max(vocab_size - shard * shard_size, 0), shard_size)
    itemsize = accumulation_dtype(hidden_RD).itemsize
    default_rows, default_columns = tile_sizes(hidden_RD.shape[0], num_columns, hidden_size, itemsize=itemsize)
    plan = TilePlan(
        group=group,
        first_id=shard * shard_size,
        num_columns=num_columns,
        vocab_size=vocab_size,
        scale=1.0 / temperature,
        reduce_hidden_grad=reduce_hidden_grad,
        row_chunk=row_chunk or default_rows,
        vocab_chunk=vocab_chunk or default_columns,
    )
    logprob_R, entropy_R = _LinearLogprob.apply(hidden_RD, weight_VD, target_R, plan)
    return LinearLogprob(logprob_R=logprob_R, entropy_R=entropy_R)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: TilePlan) -> tuple[Tensor, Tensor]:
        statistics_4R = _join_shards(_shard_statistics(hidden_RD, weight_VD, target_R, plan), plan.group)
        max_R, sum_R, shifted_sum_R, target_logit_R = statistics_4R
        mean_R = shifted_sum_R / sum_R
        ctx.plan = plan
        ctx.save_for_backward(hidden_RD, weight_VD, target_R, max_R, sum_R, mean_R)
        # An unused output arrives in backward as None, not as zeros: that is how the entropy's work is skipped.
        ctx.set_materialize_grads(False)
        log_sum_R = sum_R.log()
        return (target_logit_R - max_R) - log_sum_R, log_sum_R - mean_R

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_grad_R: Tensor | None, entropy_grad_R: Tensor | None):
        hidden_RD, weight_VD, target_R, max_R, sum_R, mean_R = ctx.saved_tensors
        if logprob_grad_R is None:
            logprob_grad_R = torch.zeros_like(max_R)
        # d z = g 1[target] + exp(x) (offset + slope x)
        offset_R, slope_R, is_active_R = -logprob_grad_R / sum_R, None, logprob_grad_R != 0
        if entropy_grad_R is not None:
            slope_R = -entropy_grad_R / sum_R
            offset_R = offset_R - slope_R * mean_R
            is_active_R = is_active_R | (entropy_grad_R != 0)
        rows = is_active_R.nonzero().squeeze(1)  # the one host count of a call
        coefficients = _LogitGradient(
            target=target_R[rows],
            grad=logprob_grad_R[rows],
            maximum=max_R[rows],
            offset=offset_R[rows],
            slope=None if slope_R is None else slope_R[rows],
        )
        is_compact = rows.numel() < hidden_RD.shape[0]
        active_hidden = hidden_RD[rows] if is_compact else hidden_RD
        active_hidden_grad, weight_grad = _input_gradients(
            active_hidden, weight_VD, coefficients, ctx.plan, needs=ctx.needs_input_grad[:2]
        )
        hidden_grad = None
        if active_hidden_grad is not None:
            if ctx.plan.group is not None and ctx.plan.reduce_hidden_grad:
                dist.all_reduce(active_hidden_grad, group=ctx.plan.group)  # also with no rows: the others wait
            hidden_grad = active_hidden_grad.to(hidden_RD.dtype)
            if is_compact:
                hidden_grad = torch.zeros_like(hidden_RD).index_copy_(0, rows, hidden_grad)
        return hidden_grad, weight_grad, None, None


def _shard_statistics(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: TilePlan) -> Tensor:
    """[4, R]: m, s, u, t of the module's header over this rank's real vocabulary rows."""
    num_rows = hidden_RD.shape[0]
    dtype = accumulation_dtype(hidden_RD)
    statistics_4R = torch.zeros(4, num_rows, dtype=dtype, device=hidden_RD.device)
    max_R, sum_R, shifted_sum_R, target_logit_R = statistics_4R
    # Below any real logit, yet finite: with -inf the corrections of a first tile and of an all-padding shard would
    # be 0 * inf. A quarter, so that differences cannot overflow.
    max_R.fill_(torch.finfo(dtype).min / 4)
    target_logit_R.masked_fill_((target_R < 0) | (target_R >= plan.vocab_size), float("nan"))
    logits_buffer, exp_buffer = tile_buffers(2, num_rows, plan, like=statistics_4R)
    for columns in plan.column_tiles():
        weight_tile = operand(weight_VD[columns])
        for rows in plan.row_tiles(num_rows):
            hidden_tile = operand(hidden_RD[rows])
            shape = (hidden_tile.shape[0], weight_tile.shape[0])
            z = multiply_into(buffer_view(logits_buffer, shape), hidden_tile, weight_tile.t(), scale=plan.scale)
            index, is_here = locate(target_R[rows], columns, plan)
            target_logit = target_logit_R[rows]
            target_logit.copy_(torch.where(is_here, z.gather(1, index[:, None]).squeeze(1), target_logit))

            maximum = torch.maximum(max_R[rows], z.amax(dim=1))
            step = max_R[rows] - maximum
            decay = step.exp()
            shifted_sum_R[rows].add_(sum_R[rows] * step).mul_(decay)  # before s itself decays
            sum_R[rows].mul_(decay)
            max_R[rows].copy_(maximum)
            exp_z = torch.exp(z.sub_(maximum[:, None]), out=buffer_view(exp_buffer, shape))
            sum_R[rows].add_(exp_z.sum(dim=1))
            shifted_sum_R[rows].add_(z.mul_(exp_z).sum(dim=1))
    return statistics_4R


def _join_shards(statistics_4R: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of the whole vocabulary from those of the shards: the forward's only collective."""
    if group is None:
        return statistics_4R
    num_shards = dist.get_world_size(group)
    # Concatenated along the first dimension, the only layout every backend accepts.
    gathered = statistics_4R.new_empty(num_shards * 4, statistics_4R.shape[1])
    dist.all_gather_into_tensor(gathered, statistics_4R, group=group)
    max_KR, sum_KR, shifted_sum_KR, target_logit_KR = gathered.view(num_shards, 4, -1).unbind(dim=1)
    max_R = max_KR.amax(dim=0)
    step_KR = max_KR - max_R
    decay_KR = step_KR.exp()
    return torch.stack(
        [
            max_R,
            (decay_KR * sum_KR).sum(dim=0),
            (decay_KR * (shifted_sum_KR + sum_KR * step_KR)).sum(dim=0),
            target_logit_KR.sum(dim=0),  # one shard holds the target, the others hold 0
        ]
    )


@dataclass(frozen=True)
class _LogitGradient:
    """d z = grad 1[target] + exp(x) (offset + slope x), x = z - maximum; one entry for each remaining row."""

    target: Tensor
    grad: Tensor
    maximum: Tensor
    offset: Tensor
    slope: Tensor | None
    """None: nobody asked for the entropy's gradient."""

    def apply_(self, z: Tensor, buffer: Tensor, rows: slice, columns: slice, plan: TilePlan) -> Tensor:
        """Turns the logits of a tile into their gradient, in place."""
        x = z.sub_(self.maximum[rows, None])
        if self.slope is None:
            z_grad = x.exp_().mul_(self.offset[rows, None])
        else:
            exp_x = torch.exp(x, out=buffer)
            z_grad = x.mul_(self.slope[rows, None]).add_(self.offset[rows, None]).mul_(exp_x)
        index, is_here = locate(self.target[rows], columns, plan)
        return z_grad.scatter_add_(1, index[:, None], torch.where(is_here, self.grad[rows], 0.0)[:, None])


def _input_gradients(
    hidden_RD: Tensor, weight_VD: Tensor, logit_gradient: _LogitGradient, plan: TilePlan, *, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(hidden gradient in accumulation dtype, this shard's part; weight gradient in weight dtype) over given rows."""
    num_rows, hidden_size = hidden_RD.shape
    dtype = accumulation_dtype(hidden_RD)
    hidden_grad = torch.zeros(num_rows, hidden_size, dtype=dtype, device=hidden_RD.device) if needs[0] else None
    weight_grad = torch.zeros_like(weight_VD) if needs[1] else None
    if num_rows == 0:
        return hidden_grad, weight_grad
    logits_buffer, exp_buffer = tile_buffers(2, num_rows, plan, like=logit_gradient.maximum)
    for columns in plan.column_tiles():
        weight_tile = operand(weight_VD[columns])
        if weight_grad is not None:
            # Where the destination is as precise as the sum, the sum is formed there; otherwise beside it, rounded
            # once. An fp32 `main_grad` can take the destination's place here.
            destination = weight_grad[columns]
            weight_grad_tile = destination if destination.dtype == dtype else destination.to(dtype)
        for rows in plan.row_tiles(num_rows):
            hidden_tile = operand(hidden_RD[rows])
            shape = (hidden_tile.shape[0], weight_tile.shape[0])
            z = multiply_into(buffer_view(logits_buffer, shape), hidden_tile, weight_tile.t(), scale=plan.scale)
            z_grad = logit_gradient.apply_(z, buffer_view(exp_buffer, shape), rows, columns, plan).to(weight_tile.dtype)
            if hidden_grad is not None:
                multiply_into(hidden_grad[rows], z_grad, weight_tile, scale=plan.scale, accumulate=True)
            if weight_grad is not None:
                multiply_into(weight_grad_tile, z_grad.t(), hidden_tile, scale=plan.scale, accumulate=True)
        if weight_grad is not None and weight_grad_tile is not destination:
            destination.copy_(weight_grad_tile)
    return hidden_grad, weight_grad


def _check_inputs(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> None:
    if hidden_RD.dim() != 2 or weight_VD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "linear_logprob: expected hidden_RD [R, D] and weight_VD [V/tp, D], "
            f"got {list(hidden_RD.shape)} and {list(weight_VD.shape)}"
        )
    if target_R.shape != hidden_RD.shape[:1] or target_R.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob: expected target_R int64 [{hidden_RD.shape[0]}], one id for each hidden row, "
            f"got {target_R.dtype} {list(target_R.shape)}"
        )
    if hidden_RD.dtype != weight_VD.dtype or not hidden_RD.is_floating_point():
        raise ValueError(
            "linear_logprob: expected one floating-point dtype for hidden_RD and weight_VD, "
            f"got {hidden_RD.dtype} and {weight_VD.dtype}"
        )


def _check_options(
    vocab_size: int, padded_size: int, temperature: float, row_chunk: int | None, vocab_chunk: int | None
) -> None:
    if not 1 <= vocab_size <= padded_size:
        raise ValueError(
            f"linear_logprob: expected vocab_size between 1 and {padded_size}, the rows of all shards together, "
            f"got {vocab_size}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"linear_logprob: expected a positive, finite temperature, got {temperature}")
    for name, value in (("row_chunk", row_chunk), ("vocab_chunk", vocab_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"linear_logprob: expected {name} of at least 1, got {value}")


def _check_targets(target_R: Tensor, vocab_size: int) -> None:
    if target_R.device.type != "cpu" or target_R.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(target_R))
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"linear_logprob: expected target_R in 0 .. {vocab_size - 1} (vocab_size {vocab_size}), "
            f"got {smallest} .. {largest}"
        )
