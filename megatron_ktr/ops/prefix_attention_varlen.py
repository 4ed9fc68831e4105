"""Shared-prefix attention as one variable-length flash call on CUDA, for models without Transformer Engine.

Queries stay in place. Keys and values are gathered so that the keys of every segment, its prefix and its own rows, lie
back to back. The kernel's bottom-right causal alignment is then exactly the lower part of ordinary causal attention.
The gradients of the copies of the prompt's keys and values are summed in fp32 (``row_copies.py``).
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
    return varlen_call(q[: plan.num_attending], key, value, call=call, scale=scale, is_causal=True)


def varlen_call(q: Tensor, k: Tensor, v: Tensor, *, call: VarlenCall, scale: float, is_causal: bool) -> Tensor:
    """The attention of ``call``, whose rows are those of q, k and v in order.

    The tensors must satisfy ``can_flash_varlen``. Causal means aligned at the bottom right.
    """
    return _Varlen.apply(q, k, v, call, scale, is_causal)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float, is_causal: bool) -> Tensor:
        out, lse, state = varlen_forward(q, k, v, call=call, scale=scale, is_causal=is_causal)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.options = dict(call=call, scale=scale, is_causal=is_causal)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *state = ctx.saved_tensors
        gradients = varlen_backward(grad_out.contiguous(), q, k, v, (out, lse, tuple(state)), **ctx.options)
        return *gradients, None, None, None
