"""Shared-prefix attention that reads every prefix once: it merges the results of flash calls by log-sum-exp.

For rows that attend a prefix A (the prompt) and their own rows B, one autograd function does the following:

1. *own*: every segment attends itself causally                              -> out_B, lse_B
2. *prefix*: all responses of a group attend the prompt as one dense block    -> out_A, lse_A
3. merge:   lse = log(exp(lse_A) + exp(lse_B)),   out = exp(lse_A - lse) out_A + exp(lse_B - lse) out_B

The attention over the union of two key sets is exactly that weighted sum. Prompts attend only themselves, so they are
done after step 1. A prompt chunk of a context-parallel rank is a segment whose prefix is the prompt before it.

Backward runs each call's backward kernel with the *merged* out and lse in place of the call's own. The kernels compute
p = exp(score - lse) and grad_score = p (grad_out . v - grad_out . out). With out and lse of the whole attention, each
call yields exactly its part of the gradient, and the parts add up.

Forward saves q, k, v, out, and lse in fp32. There is no copy of the prompt's keys per response and no mask. The merge
is in fp32; in bf16, out_A and out_B have already been rounded before it.

With context parallelism k and v are this rank's rows, and only these are saved. Forward and backward both gather the
other ranks' rows (one more all-gather per layer), so that the memory of a rank shrinks with the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ktr.ops.key_exchange import KeyExchange
from megatron_ktr.ops.prefix_attention_kernels import (
    can_flash_varlen,
    host_backward,
    host_forward,
    varlen_backward,
    varlen_forward,
)
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan


def can_merge(q: Tensor) -> bool:
    """Whether this implementation can run: always on CPU; on CUDA if the flash kernel accepts ``q``."""
    return can_flash_varlen(q) if q.is_cuda else True


def merged_attention(
    q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, scale: float, exchange: KeyExchange | None = None
) -> Tensor:
    """``prefix_attention`` (see there); returns the attending rows only, without padding."""
    function = _DeviceMerged if q.is_cuda else _HostMerged
    return function.apply(q[: plan.num_attending], k, v, plan, scale, exchange)


def _all_keys(ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k, v) if ctx.exchange is None else ctx.exchange.gather(k, v)


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *, num_rows: int) -> tuple[Tensor | None, ...]:
    """The return values of backward; under context parallelism the keys' gradients go back to the keys' ranks."""
    if ctx.exchange is not None:
        grad_k, grad_v = ctx.exchange.reduce(grad_k, grad_v, num_rows=num_rows)
    return grad_q, grad_k, grad_v, None, None, None


class _HostMerged(torch.autograd.Function):
    """For CPU: one kernel call per run of equal segments and per prefix block, on slices, without a gather."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, exchange: KeyExchange | None
    ) -> Tensor:
        ctx.exchange, mine = exchange, (k, v)
        k, v = _all_keys(ctx, k, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys, count in _own_calls(plan):
            out[rows], lse[:, rows] = host_forward(q[rows], k[keys], v[keys], scale=scale, is_causal=True, count=count)
        for rows, keys in plan.prefix_blocks:
            part, part_lse = host_forward(q[rows], k[keys], v[keys], scale=scale, is_causal=False)
            out[rows], lse[:, rows] = _merge(out[rows], lse[:, rows], part, part_lse)
        ctx.save_for_backward(q, *mine, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, *mine, out, lse = ctx.saved_tensors
        k, v = _all_keys(ctx, *mine)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, count in _own_calls(ctx.plan):
            # Own keys belong to exactly one segment, so their gradients are assigned rather than added.
            grad_q[rows], grad_k[keys], grad_v[keys] = host_backward(
                grad_out[rows], q[rows], k[keys], v[keys], (out[rows], lse[:, rows]),
                scale=ctx.scale, is_causal=True, count=count,
            )  # fmt: skip
        for rows, keys in ctx.plan.prefix_blocks:
            parts = host_backward(
                grad_out[rows], q[rows], k[keys], v[keys], (out[rows], lse[:, rows]), scale=ctx.scale, is_causal=False
            )
            for total, place, part in zip((grad_q, grad_k, grad_v), (rows, keys, keys), parts, strict=True):
                total[place] += part
        return _gradients(ctx, grad_q, grad_k, grad_v, num_rows=len(mine[0]))


def _own_calls(plan: AttentionPlan) -> list[tuple[slice, slice, int]]:
    """(query rows, key rows, segments) of every run of segments that one batched call can serve."""
    calls = []
    for first, count in plan.own_runs:
        length = first.length * count
        keys = slice(first.own_start, first.own_start + length)
        calls.append((slice(first.start, first.start + length), keys, count))
    return calls


class _DeviceMerged(torch.autograd.Function):
    """For CUDA: two kernel launches for any number of segments, one for all own parts and one for all prefix blocks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, exchange: KeyExchange | None
    ) -> Tensor:
        ctx.exchange, mine = exchange, (k, v)
        k, v = _all_keys(ctx, k, v)
        own, prefix = plan.own_call(q.device), plan.prefix_call(q.device)
        k_own, v_own = _taken(k, own.kv_rows), _taken(v, own.kv_rows)
        out, lse, own_state = varlen_forward(q, k_own, v_own, call=own, scale=scale, is_causal=True)
        prefix_state: tuple[Tensor, ...] = ()
        if prefix is not None:
            rows = prefix.q_rows
            k_prefix, v_prefix = k[prefix.kv_rows], v[prefix.kv_rows]
            part, part_lse, prefix_state = varlen_forward(
                q[rows], k_prefix, v_prefix, call=prefix, scale=scale, is_causal=False
            )
            out[rows], lse[:, rows] = _merge(out[rows], lse[:, rows], part, part_lse)
        ctx.save_for_backward(q, *mine, out, lse, *own_state, *prefix_state)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, *mine = ctx.saved_tensors[:3]
        out, lse, *states = ctx.saved_tensors[3:]
        k, v = _all_keys(ctx, *mine)
        own, prefix = ctx.plan.own_call(q.device), ctx.plan.prefix_call(q.device)
        grad_out = grad_out.contiguous()
        grad_q, *grad_own = varlen_backward(
            grad_out, q, _taken(k, own.kv_rows), _taken(v, own.kv_rows), (out, lse, tuple(states[:2])),
            call=own, scale=ctx.scale, is_causal=True,
        )  # fmt: skip
        grads_k, grads_v = ([part] for part in grad_own)
        if prefix is not None:
            rows, keys = prefix.q_rows, prefix.kv_rows
            part_q, part_k, part_v = varlen_backward(
                grad_out[rows], q[rows], k[keys], v[keys], (out[rows], lse[:, rows].contiguous(), tuple(states[2:])),
                call=prefix, scale=ctx.scale, is_causal=False,
            )  # fmt: skip
            grad_q.index_add_(0, rows, part_q)
            grads_k.append(part_k)
            grads_v.append(part_v)
        copies = ctx.plan.own_and_prefix_copies(q.device)
        grad_k, grad_v = copies.sum(grads_k), copies.sum(grads_v)
        return _gradients(ctx, grad_q, grad_k, grad_v, num_rows=len(mine[0]))


def _taken(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the attentions over two key sets into the attention over their union: out [L, N, H], lse [N, L]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().T[..., None] for part in (lse_a, lse_b))
    out = out_a.to(lse.dtype).mul_(weight_a) if out_a.dtype != lse.dtype else out_a * weight_a
    return out.addcmul_(weight_b, out_b.to(lse.dtype)).to(out_a.dtype), lse
