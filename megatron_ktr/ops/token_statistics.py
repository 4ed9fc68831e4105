"""Computes statistics of next-token distributions directly from hidden states; the full logits never exist.

One call replaces ``log_softmax(hidden @ weight^T)``. It computes the target's log-probability and the entropy of each
row and, for each of K other hidden rows of the same token, the target's log-probability under that row and
KL(intact || other). Other rows are those of counterfactual views, which go through the same output weight, and those of
a reference model, which go through that model's own. The vocabulary is split into shards, one per tensor-parallel rank.
All of it comes from one pass over the shard. There are four steps:

1. Forward makes one pass over the shard: an ``Implementation`` reduces it to N = 4 + 4 K numbers per row
   (``token_statistics_interface.py`` defines them).

2. ONE all-gather of these N R floats joins the shards. With capital letters for the joined values,

       logprob = (t - M) - log S     entropy = log S - U / S     KL = W / S - log S + log S'     log Z = M + log S

   All of these are differences of shifted numbers, so logits of 1e4 lose no digits and equal logits give exactly log V.
   Every rank joins the same gathered numbers in the same order, so the results are bitwise equal over the group.

3. Backward recomputes the logits (forward saves the inputs and three floats per row). With x = z - M, the incoming
   gradients g of logprob and e of entropy, and p = exp(x) / S,

       d z = g (1[target] - p) - e p (log p + entropy) = g 1[target] - exp(x) ((g - e U/S) + e x) / S

   With a reference, the incoming gradient h of KL(p || q) adds

       h p (log p - log q - KL) = h exp(x) ((x - x') - W/S) / S

   whose x' is recomputed from the reference's rows: one more product. q is frozen and gets no gradient.

   Rows where g, e and h are all zero (no key token) are dropped before the first product. If the entropy's or the KL's
   gradient is not needed, the terms with ``e`` or ``h`` are not computed. The gradient of the hidden rows is a sum over
   shards: one all-reduce over the group, of the remaining rows only, in fp32. ``reduce_hidden_grad=False`` leaves it
   out. The statistics of counterfactual views get no gradient: they are scores and never part of a loss.

4. If the caller asks for it, the weight gradient is added to Megatron's fp32 ``main_grad``, without a second buffer.

Accumulation is in fp32 (fp64 for fp64 inputs). A bf16 sum over 152,064 exponentials would stop growing after 256 equal
terms, and bf16 logits near 20 are off by up to 0.06.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ktr.config.words import TOKEN_STATISTICS_IMPLS, TokenStatisticsImpl
from megatron_ktr.ops.main_grad import gradient_in_main_grad, has_precise_main_grad, main_gradient
from megatron_ktr.ops.token_statistics_interface import (
    NUM_STATISTICS,
    GradientSums,
    HeadOptions,
    Implementation,
    LogitGradient,
    OtherGradient,
    OtherRows,
    ShardPlan,
    accumulation_dtype,
)

DEFAULT_HEAD = HeadOptions()


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the next-token distribution of each row, equal on every rank of the group.

    The tensors are [R] or [K, R] in fp32 (fp64 for fp64 inputs), with the K counterfactuals in the order in which they
    were given. The unit is nats.
    """

    logprob_R: Tensor
    """log p(target), never positive."""
    entropy_R: Tensor
    """-sum_v p log p over the whole vocabulary."""
    counterfactual_logprob_KR: Tensor
    """log q(target), where q comes from a counterfactual hidden row; no gradient."""
    kl_KR: Tensor
    """KL(p || q) = sum_v p (log p - log q), never negative; no gradient."""
    log_normalizer_R: Tensor
    """log sum_v exp(logit), where the logits are already divided by the temperature; no gradient."""
    reference_logprob_R: Tensor | None = None
    """log q(target), where q is the reference model's distribution; no gradient. None: there is no reference."""
    reference_kl_R: Tensor | None = None
    """KL(p || q) with q of the reference model; has a gradient if ``OtherRows.has_kl_gradient`` says so."""


def linear_token_statistics(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    counterfactual_hidden_RD: Sequence[Tensor] = (),
    reference: OtherRows | None = None,
    head: HeadOptions = DEFAULT_HEAD,
) -> TokenStatistics:
    """Computes the statistics of each hidden row (see the module).

    Let log p = log_softmax(hidden @ weight^T / temperature), and log q the same for each set of counterfactual hidden
    rows, and for the reference's rows with the reference's own weight. The result has log p[target] and -sum p log p
    for each row, and for each q also log q[target] and sum p (log p - log q).

    ``logprob_R``, ``entropy_R`` and (on request) ``reference_kl_R`` are differentiable with respect to ``hidden_RD``
    and ``weight_VD``.
    ``token_statistics_reference`` is the same formula with full logits and ordinary autograd.

    Args:
        hidden_RD: [R, D], fp64, fp32, bf16 or fp16; R may be 0. Equal on every rank of the head's group.
        weight_VD: this rank's shard [Vs, D] of the output weight, same dtype; rank k holds rows k Vs .. (k+1) Vs - 1.
        target_R: int64 [R], ids in the whole vocabulary, 0 <= id < vocab_size. Equal on every rank of the group.
        counterfactual_hidden_RD: K tensors [R, D], the same tokens' hidden rows in other views; they get no gradient.
        reference: the same tokens' hidden rows in the reference model, and its shard of the output weight.
        head: group, vocabulary, temperature and implementation. The temperature is that of all distributions.

    Matrix products of R x D x V/tp, with K counting the reference too: forward 1 + K (``triton``: 2 K if K > 0),
    backward 3, or 4 with the gradient of a KL, of the remaining rows only.

    Collectives: one all-gather of (4 + 4 K) R floats in forward; at most one all-reduce of (remaining rows) x D in
    backward. They run for R = 0 too. The incoming gradients must be equal on every rank of ``group``, as they are when
    each rank computes the same loss: the sum over shards and the choice of remaining rows both rely on it.

    Raises:
        ValueError: shapes, dtypes, temperature, chunk sizes or ``impl`` are invalid; on CPU also if a target is outside
            the vocabulary. On a GPU that check would stall the device, so such a row's log-probability is NaN instead.
    """
    _check_inputs(hidden_RD, weight_VD, target_R)
    others = [OtherRows(other_RD) for other_RD in counterfactual_hidden_RD]
    for other in others:
        _check_other(other, hidden_RD, weight_VD, name="each of counterfactual_hidden_RD")
    if reference is not None:
        _check_other(reference, hidden_RD, weight_VD, name="the reference's hidden_RD")
    plan = shard_plan(weight_VD, head=head)
    _check_targets(target_R, plan.vocab_size)
    call = _Call(
        implementation=find_implementation(head.impl, like=hidden_RD),
        plan=plan,
        group=head.group,
        reduce_hidden_grad=head.reduce_hidden_grad,
        main_grad_of=weight_VD if head.accumulate_into_main_grad and has_precise_main_grad(weight_VD) else None,
        others=tuple(_detached(other) for other in (others if reference is None else [*others, reference])),
    )
    *found, last_kl_R = _TokenStatistics.apply(hidden_RD, weight_VD, target_R, call)
    statistics = TokenStatistics(*found)
    return statistics if reference is None else _with_reference_apart(statistics, last_kl_R)


def find_implementation(impl: TokenStatisticsImpl, *, like: Tensor) -> Implementation:
    """The implementation of that name; ``auto`` chooses by the tensor's device."""
    if impl not in TOKEN_STATISTICS_IMPLS:
        raise ValueError(
            f"linear_token_statistics: expected impl to be one of {', '.join(TOKEN_STATISTICS_IMPLS)}, got {impl!r}"
        )
    if impl == "auto":
        can_fuse = like.is_cuda and like.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
        impl = "triton" if can_fuse else "chunked"
    module = importlib.import_module(f"megatron_ktr.ops.token_statistics_{impl}")
    return cast(Implementation, module.IMPLEMENTATION)


def shard_plan(weight_VD: Tensor, *, head: HeadOptions) -> ShardPlan:
    """Says which part of the vocabulary ``weight_VD`` is, and how to cut it into chunks."""
    num_shards = 1 if head.group is None else dist.get_world_size(head.group)
    shard = 0 if head.group is None else dist.get_rank(head.group)
    shard_size = weight_VD.shape[0]
    vocab_size = shard_size * num_shards if head.vocab_size is None else head.vocab_size
    _check_options(head, vocab_size=vocab_size, padded_size=shard_size * num_shards)
    return ShardPlan(
        first_id=shard * shard_size,
        num_columns=min(max(vocab_size - shard * shard_size, 0), shard_size),
        vocab_size=vocab_size,
        scale=1.0 / head.temperature,
        row_chunk=head.row_chunk,
        vocab_chunk=head.vocab_chunk,
    )


@dataclass(frozen=True)
class _Call:
    implementation: Implementation
    plan: ShardPlan
    group: dist.ProcessGroup | None
    reduce_hidden_grad: bool
    main_grad_of: Tensor | None
    """The parameter whose ``main_grad`` receives the weight gradient; None: autograd receives it."""
    others: tuple[OtherRows, ...]
    """The rows to compare with. Backward reads the last one only, and only if its KL has a gradient."""

    @property
    def differentiated(self) -> OtherRows | None:
        """The rows whose KL has a gradient; None: there are none."""
        return self.others[-1] if self.others and self.others[-1].has_kl_gradient else None


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, call: _Call) -> tuple[Tensor | None, ...]:
        found_NR = call.implementation.forward(hidden_RD, weight_VD, target_R, call.plan, call.others)
        joined_NR = join_shards(found_NR, call.group)
        max_R, sum_R, shifted_sum_R, target_logit_R = joined_NR[:NUM_STATISTICS]
        other_max_KR, other_sum_KR, difference_KR, other_target_logit_KR = (
            joined_NR[index::NUM_STATISTICS] for index in range(NUM_STATISTICS, 2 * NUM_STATISTICS)
        )
        mean_R, mean_difference_KR = shifted_sum_R / sum_R, difference_KR / sum_R
        last, of_last = call.differentiated, ()
        if last is not None:
            of_last = (last.hidden_RD, last.weight_VD, other_max_KR[-1], mean_difference_KR[-1])
        # Drop the rows of the other views, which would otherwise stay in memory until backward.
        ctx.call = dataclasses.replace(call, others=())
        ctx.save_for_backward(hidden_RD, weight_VD, target_R, max_R, sum_R, mean_R, *of_last)
        # An unused output arrives in backward as None, not as zeros: that is how the entropy's work is skipped.
        ctx.set_materialize_grads(False)
        log_sum_R, other_log_sum_KR = sum_R.log(), other_sum_KR.log()
        logprob_R, entropy_R = (target_logit_R - max_R) - log_sum_R, log_sum_R - mean_R
        other_logprob_KR = (other_target_logit_KR - other_max_KR) - other_log_sum_KR
        # A KL is negative only by rounding. Negative scores would order tokens by noise, so clamp them to 0.
        kl_KR = (mean_difference_KR - log_sum_R + other_log_sum_KR).clamp_min(0)
        scores = (other_logprob_KR, kl_KR, max_R + log_sum_R)
        ctx.mark_non_differentiable(*scores)
        return logprob_R, entropy_R, *scores, None if last is None else kl_KR[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_grad_R: Tensor | None, entropy_grad_R: Tensor | None, *more: Tensor | None):
        hidden_RD, weight_VD, target_R, max_R, sum_R, mean_R, *of_last = ctx.saved_tensors
        kl_grad_R = more[-1]
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        call: _Call = ctx.call
        if logprob_grad_R is None:
            logprob_grad_R = torch.zeros_like(max_R)
        # d z = g 1[target] + exp(x) (offset + slope x)
        offset_R, slope_R, is_active_R = -logprob_grad_R / sum_R, None, logprob_grad_R != 0
        if entropy_grad_R is not None:
            slope_R = -entropy_grad_R / sum_R
            offset_R = offset_R - slope_R * mean_R
            is_active_R = is_active_R | (entropy_grad_R != 0)
        kl_slope_R = None
        if kl_grad_R is not None:
            kl_slope_R = kl_grad_R / sum_R
            offset_R = offset_R - kl_slope_R * of_last[-1]
            is_active_R = is_active_R | (kl_grad_R != 0)
        rows = is_active_R.nonzero().squeeze(1)  # the only device synchronisation of a call
        gradient = LogitGradient(
            target=target_R[rows],
            grad=logprob_grad_R[rows],
            maximum=max_R[rows],
            offset=offset_R[rows],
            slope=None if slope_R is None else slope_R[rows],
            other=None if kl_slope_R is None else _other_gradient(kl_slope_R, rows, *of_last),
        )
        is_compact = rows.numel() < hidden_RD.shape[0]
        active_RD = (hidden_RD[rows] if is_compact else hidden_RD).contiguous()
        weight_grad = weight_sum = None
        if needs_weight_grad and call.main_grad_of is not None:
            weight_grad, weight_sum = gradient_in_main_grad(call.main_grad_of), main_gradient(call.main_grad_of)
        elif needs_weight_grad:
            weight_grad = weight_sum = torch.zeros_like(weight_VD)
        sums = GradientSums(
            hidden_RD=torch.zeros_like(active_RD, dtype=accumulation_dtype(hidden_RD)) if needs_hidden_grad else None,
            weight_VD=weight_sum,
        )
        call.implementation.backward(active_RD, weight_VD, gradient, call.plan, sums)
        hidden_grad = None
        if sums.hidden_RD is not None:
            if call.group is not None and call.reduce_hidden_grad:
                dist.all_reduce(sums.hidden_RD, group=call.group)  # even without rows, because the other ranks wait
            hidden_grad = sums.hidden_RD.to(hidden_RD.dtype)
            if is_compact:
                hidden_grad = torch.zeros_like(hidden_RD).index_copy_(0, rows, hidden_grad)
        return hidden_grad, weight_grad, None, None


def _other_gradient(
    slope_R: Tensor, rows: Tensor, hidden_RD: Tensor, weight_VD: Tensor | None, max_R: Tensor, _: Tensor
) -> OtherGradient:
    return OtherGradient(hidden_RD[rows], weight_VD, maximum=max_R[rows], slope=slope_R[rows])


def join_shards(statistics_NR: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Joins the statistics of the shards into those of the whole vocabulary, [N, R], by one all-gather.

    ``statistics_NR`` holds this shard's 4 + 4 K statistics, as ``token_statistics_interface`` defines them.
    """
    if group is None:
        return statistics_NR
    num_shards, size = dist.get_world_size(group), statistics_NR.shape[0]
    # Gather along the first dimension, the only layout that every backend accepts.
    gathered = statistics_NR.new_empty(num_shards * size, statistics_NR.shape[1])
    dist.all_gather_into_tensor(gathered, statistics_NR, group=group)
    # The axes are: shard; intact (0) or counterfactual; statistic; row.
    shards_XKNR = gathered.view(num_shards, size // NUM_STATISTICS, NUM_STATISTICS, -1)
    max_XKR, sum_XKR, third_XKR, target_logit_XKR = shards_XKNR.unbind(2)
    max_KR = max_XKR.amax(dim=0)
    step_XKR = max_XKR - max_KR
    decay_XKR = step_XKR.exp()
    intact_step_XKR = step_XKR[:, :1]
    # Each shard computed x with its own maximum. Change to the common one: u grows by s step, w by s (step - step').
    shift_XKR = torch.cat([intact_step_XKR, intact_step_XKR - step_XKR[:, 1:]], dim=1)
    third_KR = (decay_XKR[:, :1] * (third_XKR + sum_XKR[:, :1] * shift_XKR)).sum(dim=0)
    # Only one shard holds the target's logit; the others hold 0.
    joined = (max_KR, (decay_XKR * sum_XKR).sum(dim=0), third_KR, target_logit_XKR.sum(dim=0))
    return torch.stack(joined, dim=1).flatten(0, 1)


def _with_reference_apart(statistics: TokenStatistics, kl_R: Tensor | None) -> TokenStatistics:
    """``statistics`` whose last counterfactual was the reference; ``kl_R`` is its KL with gradient, if it has one."""
    logprob_KR, kl_KR = statistics.counterfactual_logprob_KR, statistics.kl_KR
    return dataclasses.replace(
        statistics,
        counterfactual_logprob_KR=logprob_KR[:-1],
        kl_KR=kl_KR[:-1],
        reference_logprob_R=logprob_KR[-1],
        reference_kl_R=kl_KR[-1] if kl_R is None else kl_R,
    )


def _detached(other: OtherRows) -> OtherRows:
    weight_VD = None if other.weight_VD is None else other.weight_VD.detach()
    return dataclasses.replace(other, hidden_RD=other.hidden_RD.detach(), weight_VD=weight_VD)


def _check_inputs(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor) -> None:
    if hidden_RD.dim() != 2 or weight_VD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "linear_token_statistics: expected hidden_RD [R, D] and weight_VD [V/tp, D], "
            f"got {list(hidden_RD.shape)} and {list(weight_VD.shape)}"
        )
    if target_R.shape != hidden_RD.shape[:1] or target_R.dtype != torch.int64:
        raise ValueError(
            f"linear_token_statistics: expected target_R int64 [{hidden_RD.shape[0]}], one id for each hidden row, "
            f"got {target_R.dtype} {list(target_R.shape)}"
        )
    if hidden_RD.dtype != weight_VD.dtype or not hidden_RD.is_floating_point():
        raise ValueError(
            "linear_token_statistics: expected one floating-point dtype for hidden_RD and weight_VD, "
            f"got {hidden_RD.dtype} and {weight_VD.dtype}"
        )


def _check_other(other: OtherRows, hidden_RD: Tensor, weight_VD: Tensor, *, name: str) -> None:
    pairs = [(name, other.hidden_RD, "hidden_RD", hidden_RD)]
    if other.weight_VD is not None:
        pairs.append(("the reference's weight_VD", other.weight_VD, "weight_VD", weight_VD))
    for name, tensor, like_name, like in pairs:
        if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"linear_token_statistics: expected {name} like {like_name}, {like.dtype} {list(like.shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)} (on {like.device} and {tensor.device})"
            )


def _check_options(head: HeadOptions, *, vocab_size: int, padded_size: int) -> None:
    if not 1 <= vocab_size <= padded_size:
        raise ValueError(
            f"linear_token_statistics: expected vocab_size between 1 and {padded_size}, the rows of all shards "
            f"together, got {vocab_size}"
        )
    temperature = head.temperature
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"linear_token_statistics: expected a positive, finite temperature, got {temperature}")
    for name, value in (("row_chunk", head.row_chunk), ("vocab_chunk", head.vocab_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"linear_token_statistics: expected {name} of at least 1, got {value}")


def _check_targets(target_R: Tensor, vocab_size: int) -> None:
    if target_R.device.type != "cpu" or target_R.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(target_R))
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"linear_token_statistics: expected target_R in 0 .. {vocab_size - 1} (vocab_size {vocab_size}), "
            f"got {smallest} .. {largest}"
        )
