"""Shared-prefix attention as one variable-length flash call on CUDA, for models without Transformer Engine.

Queries stay in place; keys and values are gathered so that every segment finds its prefix and its own rows back to
back, and the kernel's bottom-right causal alignment is exactly the lower part of ordinary causal attention. What the
copies of the prompt's keys received is summed in fp32 (``row_copies.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ktr.ops.prefix_attention_kernels import varlen_backward, varlen_forward
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan, VarlenCall


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, scale: float) -> Tensor:
    """``prefix_attention`` (see there) for at least one attending row; returns those rows only, without padding."""
    call = plan.whole_call(q.device)
    copies = plan.whole_copies(q.device)
    key, value = copies.take(k), copies.take(v)
    return _Varlen.apply(q[: plan.num_attending], key, value, call, scale)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> Tensor:
        out, lse, state = varlen_forward(q, k, v, call=call, scale=scale, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.call, ctx.scale = call, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *state = ctx.saved_tensors
        gradients = varlen_backward(
            grad_out.contiguous(), q, k, v, out, lse, tuple(state), call=ctx.call, scale=ctx.scale, is_causal=True
        )
        return *gradients, None, None
