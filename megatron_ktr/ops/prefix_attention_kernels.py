"""The two flash attention kernels from which merged attention is built, one for CPU and one for CUDA.

Both are operators of torch. Both return the log-sum-exp of every row's scores, and both take it in backward, together
with the output. That is what merged attention needs: backward computes exp(score - lse) and grad_out . out, so a part
of an attention that is given the *whole* attention's output and log-sum-exp yields exactly its part of the gradient.

    q [L, N, H], k and v [J, K, H], N a multiple of K   ->   out [L, N, H], lse [N, L] in at least fp32

The operators have no public Python wrapper with these inputs; their schemas are the same in torch 2.11 and 2.13.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.ops.prefix_attention_plan import VarlenCall

HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_SIZE = 256


def can_flash_varlen(q: Tensor) -> bool:
    """Whether the variable-length kernel takes this tensor: CUDA, half precision, a head size it was built for."""
    return q.is_cuda and q.dtype in HALF_TYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_FLASH_HEAD_SIZE


def host_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, count: int = 1
) -> tuple[Tensor, Tensor]:
    """CPU: ``count`` consecutive attentions of equal size over the given rows, as one batch.

    It supports any head size, fp64, fp32 and half precision. Causal means aligned at the top left; there must then be
    as many keys as rows.

    Query heads that share a key head are put along the batch axis, along which the keys have stride 0 and need no copy.
    (The operator supports grouped heads too, but then it sums key gradients of half precision in half precision, which
    triples the error.)
    """
    repeats = q.shape[1] // k.shape[1]
    if count > 1 and repeats > 1:
        parts = [host_forward(*part, scale=scale, is_causal=is_causal) for part in _each(count, q, k, v)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _queries(q, repeats, count), *(_keys(x, repeats, count) for x in (k, v)), 0.0, is_causal, scale=scale
    )
    return _rows(out, repeats), _rows(lse[..., None], repeats)[..., 0].T


def host_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: tuple[Tensor, Tensor],
    *,
    scale: float,
    is_causal: bool,
    count: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """CPU: gradients of q, k and v; ``found`` is the output and log-sum-exp of ``host_forward``."""
    out, lse = found
    repeats = q.shape[1] // k.shape[1]
    if count > 1 and repeats > 1:
        rows = _each(count, grad_out, q, k, v, out, lse.T)
        parts = [
            host_backward(grad_out, q, k, v, (out, lse.T), scale=scale, is_causal=is_causal)
            for grad_out, q, k, v, out, lse in rows
        ]
        grad_q, grad_k, grad_v = (torch.cat(column) for column in zip(*parts, strict=True))
        return grad_q, grad_k, grad_v
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_queries(x, repeats, count) for x in (grad_out, q)),
        *(_keys(x, repeats, count) for x in (k, v)),
        _queries(out, repeats, count),
        _queries(lse.T[..., None], repeats, count)[..., 0],
        0.0,
        is_causal,
        scale=scale,
    )
    if repeats > 1:  # count is 1, so the batch axis holds the query heads of one key head; sum them in fp32
        grad_k, grad_v = (x.sum(0, keepdim=True, dtype=lse.dtype).to(k.dtype) for x in (grad_k, grad_v))
    return _rows(grad_q, repeats), _rows(grad_k, 1), _rows(grad_v, 1)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, *, call: VarlenCall, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """CUDA: all segments of ``call`` in one launch. Causal means aligned at the bottom right.

    The last value returned must be passed on to ``varlen_backward``.
    """
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_bounds(call), 0.0, is_causal, False, scale=scale
    )
    return out, lse, tuple(state)


def varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: tuple[Tensor, Tensor, tuple[Tensor, ...]],
    *,
    call: VarlenCall,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA: gradients of q, k and v; ``found`` is what ``varlen_forward`` returned."""
    out, lse, state = found
    return torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, *_bounds(call), 0.0, is_causal, *state, scale=scale
    )


def _bounds(call: VarlenCall) -> tuple:
    return call.cu_seqlens_q, call.cu_seqlens_kv, call.max_seqlen_q, call.max_seqlen_kv


def _each(count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.unflatten(0, (count, -1)).unbind() for x in tensors), strict=True))


def _queries(x: Tensor, repeats: int, count: int) -> Tensor:
    """[count * L, N, H] -> [count * repeats, N / repeats, L, H] without a copy; ``count`` or ``repeats`` is 1."""
    if repeats > 1:
        return x.unflatten(1, (-1, repeats)).permute(2, 1, 0, 3)
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _keys(x: Tensor, repeats: int, count: int) -> Tensor:
    """[count * J, K, H] -> [count * repeats, K, J, H] without a copy."""
    return x.unflatten(0, (count, -1)).transpose(1, 2).expand(count * repeats, -1, -1, -1)


def _rows(x: Tensor, repeats: int) -> Tensor:
    """The inverse of ``_queries``."""
    if repeats > 1:
        return x.permute(2, 1, 0, 3).flatten(1, 2)
    return x.transpose(1, 2).flatten(0, 1)
