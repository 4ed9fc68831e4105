"""The language model's attention over packed sequences, in which a prompt is stored once, before its G responses.

No implementation builds a ``[T, T]`` mask. (``segment_attention.py`` has the vision encoder's attention.)

    impl      runs on           how a response attends the prompt
    torch     everything        the reference: a loop over segments, each with its own copy of ``[prompt | response]``
    merged    CPU, CUDA flash   all responses read the prompt's keys once; the parts of the attention are merged by
                                log-sum-exp (``prefix_attention_merged.py``)
    varlen    CUDA flash        one variable-length call, bottom-right causal, keys and values gathered per response
    te        CUDA with TE      as varlen, in Transformer Engine's kernels; a separate module (``layer_specs.py``)

Gradients of the prompt's keys and values sum over the G responses, as they do for G separate sequences. These functions
work on one rank and do not communicate, except through ``exchange``. The caller may have split heads over
tensor-parallel ranks, and query rows over context-parallel ranks (``prefix_attention_plan.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_ktr.config.words import PREFIX_IMPLS, PrefixImpl
from megatron_ktr.ops.key_exchange import KeyExchange
from megatron_ktr.ops.prefix_attention_kernels import can_flash_varlen
from megatron_ktr.ops.prefix_attention_merged import can_merge, merged_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.ops.prefix_attention_varlen import varlen_attention


def prefix_attention(
    q_TNH: Tensor,
    k_JKH: Tensor,
    v_JKH: Tensor,
    *,
    plan: AttentionPlan,
    scale: float | None = None,
    impl: PrefixImpl = "auto",
    exchange: KeyExchange | None = None,
) -> Tensor:
    """out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j] over the keys j that ``plan`` lets row i attend.

    With ``AttentionPlan.of_layout``, row i may attend row j <= i iff both lie in the same group and j is in the
    group's prompt or in i's own response. Forward and backward are then equal to those of G separate causal sequences
    ``prompt + response``. The output of padding rows is zero.

    Args:
        q_TNH: queries [T, N, H]; T must be ``plan.num_queries``.
        k_JKH: keys [J, K, H]; J must be ``plan.num_keys``, and N a multiple of K (grouped queries: head n reads key
            head n // (N / K)).
        v_JKH: values [J, K, H].
        scale: factor on the scores; ``H ** -0.5`` when None.
        impl: see the module; "auto" means that ``choose_impl`` chooses.
        exchange: gathers keys and values under context parallelism, else None. With it, k and v are this rank's rows
            [T, K, H], the plan's keys are those of all ranks, and every rank must call this function and its backward.

    Returns:
        [T, N, H] in the dtype of ``q_TNH``.

    Raises:
        ValueError: sizes do not fit together, ``impl`` is unknown, or ``impl`` cannot process these tensors.
    """
    check_heads(q_TNH, k_JKH, v_JKH)
    expected = (plan.num_queries, plan.num_keys if exchange is None else plan.num_queries)
    if expected != (q_TNH.shape[0], k_JKH.shape[0]):
        raise ValueError(
            f"prefix_attention: the plan describes {expected[0]} query and {expected[1]} key rows, but there are "
            f"{q_TNH.shape[0]} queries and {k_JKH.shape[0]} keys"
        )
    impl = choose_impl(q_TNH, impl, shares_keys=exchange is not None)
    options: dict[str, Any] = dict(plan=plan, scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale)
    if exchange is not None and (impl != "merged" or not plan.segments):
        k_JKH, v_JKH = exchange(k_JKH, v_JKH)
    elif impl == "merged":
        options["exchange"] = exchange
    if not plan.segments:
        return attend_nothing(q_TNH, k_JKH, v_JKH)
    attend = {"torch": loop_attention, "merged": merged_attention, "varlen": varlen_attention}[impl]
    out_TNH = attend(q_TNH, k_JKH, v_JKH, **options)
    return pad(out_TNH, (0, 0, 0, 0, 0, plan.num_padding)) if plan.num_padding else out_TNH


def attend_nothing(q_TNH: Tensor, k_JKH: Tensor, v_JKH: Tensor) -> Tensor:
    """Attention of T rows that are all padding: zeros like q, still connected to keys and values in the graph.

    Under context parallelism the gradient of keys and values goes through a collective, which a rank without rows must
    join like the others.
    """
    return _Nothing.apply(q_TNH, k_JKH, v_JKH)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.zeros_like(q)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


def choose_impl(q_TNH: Tensor, impl: PrefixImpl = "auto", *, shares_keys: bool = False) -> PrefixImpl:
    """Resolves "auto": merged on CPU, varlen if CUDA's flash kernel can process ``q_TNH``, otherwise torch.

    Any other ``impl`` is returned if it can process ``q_TNH``. With ``shares_keys`` (context parallelism), "auto"
    becomes merged instead of varlen, because merged keeps no copy of other ranks' keys for backward.
    """
    if impl not in PREFIX_IMPLS:
        raise ValueError(f"prefix_attention: impl must be one of {PREFIX_IMPLS}, got {impl!r}")
    if impl == "auto":
        if not q_TNH.is_cuda:
            return "merged"
        fused = "merged" if shares_keys else "varlen"
        return fused if can_flash_varlen(q_TNH) else "torch"
    can_run = {"torch": True, "merged": can_merge(q_TNH), "varlen": can_flash_varlen(q_TNH)}[impl]
    if not can_run:
        raise ValueError(
            f"prefix_attention: impl {impl!r} needs a CUDA device, half precision and a head size that is a multiple "
            f"of 8 up to 256; got {q_TNH.device.type}, {q_TNH.dtype}, {q_TNH.shape[-1]}; use 'auto' or 'torch'"
        )
    return impl


def loop_attention(q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, scale: float) -> Tensor:
    """The reference: one softmax attention per segment, over its own copy of its prefix; returns no padding rows."""
    outputs = []
    for segment in plan.segments:
        if not segment.prefix_length:
            own = segment.own
            outputs.append(_attend(q[segment.rows], k[own], v[own], scale=scale, is_causal=True))
            continue
        mask = _bottom_right_causal(segment.length, segment.prefix_length, device=q.device)
        key, value = (torch.cat([x[segment.prefix], x[segment.own]]) for x in (k, v))
        outputs.append(_attend(q[segment.rows], key, value, scale=scale, mask=mask))
    return torch.cat(outputs)


def _attend(
    q_LNH: Tensor,
    k_JKH: Tensor,
    v_JKH: Tensor,
    *,
    scale: float | None,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """One softmax attention of L query rows over J key rows; ``mask`` [L, J] is True where a row may attend."""
    out_1NLH = scaled_dot_product_attention(
        q_LNH.transpose(0, 1)[None],
        k_JKH.transpose(0, 1)[None],
        v_JKH.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_LNH.shape[1] != k_JKH.shape[1],
    )
    return out_1NLH[0].transpose(0, 1)


def _bottom_right_causal(num_rows: int, num_prefix: int, *, device: torch.device) -> Tensor:
    """bool [num_rows, num_prefix + num_rows]: row i sees the whole prefix and rows 0..i of its own part.

    SDPA's own ``is_causal`` aligns at the top left, which would hide the prompt's tail from a response.
    """
    return torch.ones(num_rows, num_prefix + num_rows, dtype=torch.bool, device=device).tril(num_prefix)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention expects q [T, N, H], k and v [J, K, H] with N a multiple of K, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
