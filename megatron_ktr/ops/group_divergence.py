"""TW-GRPO's divergence between the responses of a group, position by position, on vocabulary shards.

At position t of a group of G responses, with l_i the log-softmax that predicts token t of response i, and the uniform
-log V for a response that has ended before t:

    m = mean_i l_i      d_i = clamp(m - l_i, -11, 11)      D_t = (1/G) sum_i sum_v (exp(d_i) - d_i - 1)

``l_i`` needs log Z of every row before the first term can be computed. ``token_statistics`` has already computed it, on
every rank that shares the vocabulary. So one more pass over the shard and one more collective are enough: the pass
recomputes the logits in tiles of positions x G x columns and sums over responses and columns; then ONE all-reduce sums
one float per position. A tile holds all G responses of its positions, because the mean over responses is inside the
exponent. Neither logits nor hidden states are communicated.

D_t becomes a token weight, which is a constant by default. ``with_gradient`` differentiates it, as TW-GRPO's release
does. With g the incoming gradient of D_t, h_i = exp(d_i) - 1 where the clamp is not active, else 0, and z the logits,

    d l_j = (g/G) (mean_i h_i - h_j)      d z_j = d l_j - p_j sum_v d l_j      sum_v d l_j = (g/G) (mean_i H_i - H_j)

With gradient, forward also sums H_i = sum_v h_i, which adds G floats per position to the same all-reduce. Backward is
then one more pass over the shard (it recomputes the logits and has two more products), and it communicates only the
gradient of the hidden rows. Positions without an incoming gradient are dropped before the first product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ktr.ops.group_divergence_tiles import CLAMP, PositionTable, divergence_tiles, slopes_of
from megatron_ktr.ops.main_grad import gradient_in_main_grad, has_precise_main_grad, main_gradient
from megatron_ktr.ops.token_statistics import DEFAULT_HEAD, shard_plan
from megatron_ktr.ops.token_statistics_interface import HeadOptions, ShardPlan, accumulation_dtype
from megatron_ktr.ops.vocab_tiles import multiply_into
from megatron_ktr.types import PackedLayout


def group_divergence(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    log_normalizer_R: Tensor,
    *,
    layout: PackedLayout,
    head: HeadOptions = DEFAULT_HEAD,
    with_gradient: bool = False,
    has_gradient_R: Tensor | None = None,
) -> Tensor:
    """Computes D_t (see the module) for every response token: fp32 [R] (fp64 for fp64 inputs), in nats.

    Tokens at the same position of one group have the same value. ``group_divergence_reference`` is the same formula
    with full logits and ordinary autograd.

    Args:
        hidden_RD: [R, D], the rows that predict the response tokens, ordered by group, then response, then position.
        weight_VD: this rank's shard of the output weight, as for ``linear_token_statistics``.
        log_normalizer_R: ``TokenStatistics.log_normalizer_R`` of the same rows, weight and temperature. The gradients
            of ``hidden_RD`` and ``weight_VD`` include the gradient through it.
        layout: the packed sequence whose response tokens the rows predict.
        head: as for ``linear_token_statistics``; its process group shares the vocabulary, not the responses.
        with_gradient: make the result differentiable with respect to ``hidden_RD`` and ``weight_VD``.
        has_gradient_R: bool [R], the rows that propagate gradients, to ``hidden_RD`` and ``weight_VD``; None: all.
            Under context parallelism each rank names its own rows, so that the ranks' gradients are parts of one sum.

    Collectives: in forward one all-reduce of one float per position (1 + G with gradient); in backward at most one
    all-reduce of (positions with a gradient) x G x D, which runs even if there are no such positions.

    Raises:
        ValueError: R differs from the layout's number of response tokens, or options are out of range.
    """
    table = PositionTable.of(layout, device=hidden_RD.device)
    if not hidden_RD.shape[0] == log_normalizer_R.shape[0] == table.num_rows:
        raise ValueError(
            f"group_divergence: expected {table.num_rows} hidden rows and normalizers, one for each response token of "
            f"the layout, got {hidden_RD.shape[0]} and {log_normalizer_R.shape[0]}"
        )
    call = _Call(
        table=table,
        plan=shard_plan(weight_VD, head=head),
        group=head.group,
        has_gradient_R=has_gradient_R,
        reduce_hidden_grad=head.reduce_hidden_grad,
        main_grad_of=weight_VD if head.accumulate_into_main_grad and has_precise_main_grad(weight_VD) else None,
    )
    if with_gradient:
        divergence_Q = _GroupDivergence.apply(hidden_RD, weight_VD, log_normalizer_R, call)
    else:
        with torch.no_grad():
            divergence_Q = _divergence(hidden_RD, weight_VD, log_normalizer_R, call, with_slopes=False)[:, 0]
    return divergence_Q[table.position_R]


@dataclass(frozen=True)
class _Call:
    table: PositionTable
    plan: ShardPlan
    group: dist.ProcessGroup | None
    has_gradient_R: Tensor | None
    reduce_hidden_grad: bool
    main_grad_of: Tensor | None
    """The parameter whose ``main_grad`` receives the weight gradient; None: autograd receives it."""


class _GroupDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD: Tensor, weight_VD: Tensor, log_normalizer_R: Tensor, call: _Call) -> Tensor:
        found = _divergence(hidden_RD, weight_VD, log_normalizer_R, call, with_slopes=True)
        ctx.call = call
        ctx.save_for_backward(hidden_RD, weight_VD, log_normalizer_R, found[:, 1:])
        return found[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_Q: Tensor):
        hidden_RD, weight_VD, log_normalizer_R, slope_QG = ctx.saved_tensors
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        call: _Call = ctx.call
        active = grad_Q.nonzero().squeeze(1)  # the only device synchronisation of a call
        table = call.table.at(active)
        rows = table.row_QG.flatten()
        dtype = accumulation_dtype(hidden_RD)
        hidden_grad = hidden_RD.new_zeros(len(rows), hidden_RD.shape[1], dtype=dtype) if needs_hidden_grad else None
        weight_grad = destination = None
        if needs_weight_grad and call.main_grad_of is not None:
            weight_grad, destination = gradient_in_main_grad(call.main_grad_of), main_gradient(call.main_grad_of)
        elif needs_weight_grad:
            weight_grad = destination = torch.zeros_like(weight_VD)
        gradient = _PositionGradient(grad_Q[active], slope_QG[active], call.has_gradient_R)
        _add_gradients(hidden_RD, weight_VD, log_normalizer_R, table, call.plan, gradient, hidden_grad, destination)
        if hidden_grad is not None:
            if call.group is not None and call.reduce_hidden_grad:
                dist.all_reduce(hidden_grad, group=call.group)  # even without positions, because the other ranks wait
            # Each row belongs to one position. All ended responses point at the extra last row, which only gets zeros
            # and is cut off.
            padded_RD = hidden_RD.new_zeros(hidden_RD.shape[0] + 1, hidden_RD.shape[1])
            hidden_grad = padded_RD.index_add_(0, rows, hidden_grad.to(hidden_RD.dtype))[:-1]
        return hidden_grad, weight_grad, None, None


def _divergence(
    hidden_RD: Tensor, weight_VD: Tensor, log_normalizer_R: Tensor, call: _Call, *, with_slopes: bool
) -> Tensor:
    """Computes D over all shards, [Q, 1]; with slopes [Q, 1 + G], D followed by H of every response."""
    num_positions, width = call.table.row_QG.shape
    found = log_normalizer_R.new_zeros(num_positions, 1 + width * with_slopes)
    for tile in divergence_tiles(hidden_RD, weight_VD, log_normalizer_R, call.table, call.plan):
        difference_QGV = tile.difference_QGV
        if with_slopes:
            slopes_QGV = slopes_of(difference_QGV, tile.is_member_QG1)
            found[tile.here, 1:] += slopes_QGV.sum(dim=2)
            del slopes_QGV
        difference_QGV.clamp_(-CLAMP, CLAMP)
        # Use expm1, because d is mostly small and exp(d) - 1 would lose its digits.
        terms_QGV = torch.expm1(difference_QGV).sub_(difference_QGV).mul_(tile.is_member_QG1)
        found[tile.here, 0] += terms_QGV.sum(dim=(1, 2)) / tile.num_members_Q1[:, 0]
    if call.group is not None:
        dist.all_reduce(found, group=call.group)
    return found


@dataclass(frozen=True)
class _PositionGradient:
    grad_Q: Tensor
    slope_QG: Tensor
    """H of every response over the whole vocabulary."""
    has_gradient_R: Tensor | None


def _add_gradients(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    log_normalizer_R: Tensor,
    table: PositionTable,
    plan: ShardPlan,
    gradient: _PositionGradient,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> None:
    """Adds this shard's part to ``hidden_grad`` [Q * G, D] and ``weight_grad`` (like the shard)."""
    passes_QG = table.row_QG < table.num_rows
    if gradient.has_gradient_R is not None:
        passes_QG = passes_QG & F.pad(gradient.has_gradient_R, (0, 1))[table.row_QG]
    num_members_Q1 = table.is_member_QG.sum(dim=1, keepdim=True)
    share_Q1 = gradient.grad_Q[:, None] / num_members_Q1
    mean_slope_Q1 = (gradient.slope_QG * table.is_member_QG).sum(dim=1, keepdim=True) / num_members_Q1
    sum_QG = share_Q1 * (mean_slope_Q1 - gradient.slope_QG)
    dtype = accumulation_dtype(hidden_RD)
    for tile in divergence_tiles(hidden_RD, weight_VD, log_normalizer_R, table, plan):
        slopes_QGV = slopes_of(tile.difference_QGV, tile.is_member_QG1)
        mean_QV = slopes_QGV.sum(dim=1) / tile.num_members_Q1
        z_grad = slopes_QGV.neg_().add_(mean_QV[:, None]).mul_(share_Q1[tile.here, :, None])
        z_grad.addcmul_(tile.logprobs_QGV.exp_(), sum_QG[tile.here, :, None], value=-1.0)
        z_grad = z_grad.mul_(passes_QG[tile.here, :, None]).flatten(0, 1).to(tile.weight.dtype)
        if hidden_grad is not None:
            width = table.row_QG.shape[1]
            part = hidden_grad[tile.here.start * width : tile.here.start * width + len(z_grad)]
            multiply_into(part, z_grad, tile.weight, scale=plan.scale, accumulate=True)
        if weight_grad is not None:
            destination = weight_grad[tile.columns]
            # If the destination is as precise as the sum, the sum is formed in it. Otherwise it is formed in a separate
            # tensor and rounded once, when the last positions have been added.
            if tile.here.start == 0:
                sum_VD = destination if destination.dtype == dtype else destination.to(dtype)
            multiply_into(sum_VD, z_grad.t(), tile.hidden, scale=plan.scale, accumulate=True)
            if tile.here.stop >= len(table.row_QG) and sum_VD.dtype != destination.dtype:
                destination.copy_(sum_VD)


def group_divergence_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    *,
    layout: PackedLayout,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The module's formula with full logits, one position of one group at a time, on one process."""
    logits_RV = F.linear(hidden_RD, weight_VD[:vocab_size])
    logprobs_RV = F.log_softmax(logits_RV.to(accumulation_dtype(logits_RV)) / temperature, dim=-1)
    divergence_R = logprobs_RV.new_zeros(len(logprobs_RV))
    uniform_V = logprobs_RV.new_full((logprobs_RV.shape[1],), -math.log(logprobs_RV.shape[1]))
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
