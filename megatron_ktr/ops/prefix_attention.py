"""Attention over packed sequences: a prompt stored once with its G responses, and independent segments.

``prefix_attention`` serves the language model, ``segment_attention`` the vision encoder. Both are plain torch: the
reference for every faster implementation, and the path on CPU. Neither builds a ``[T, T]`` mask; the largest mask
is ``[response, prompt + response]`` for one response at a time.

Story of ``prefix_attention``, for one group ``[prompt | response 1 | ... | response G]``:

1. the prompt's rows attend causally to the prompt (once, not G times);
2. the rows of response i attend to ``[prompt | response i]`` with bottom-right causal alignment, which is exactly the
   lower part of ordinary causal attention over the separate sequence ``prompt + response i``;
3. padding rows, at the end of the packed sequence, attend causally among themselves: their values are finite and
   nobody reads them.

Gradients of the prompt's keys and values sum over the G responses through autograd, as they do for G separate
sequences. Nothing is shared between ranks: heads may be split over tensor-parallel ranks beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ktr.types import GroupSpan, PackedLayout

PrefixImpl = Literal["auto", "torch"]


def prefix_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    *,
    layout: PackedLayout,
    scale: float | None = None,
    impl: PrefixImpl = "auto",
) -> Tensor:
    """out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j] over the rows j that row i may attend.

    Row i may attend row j <= i iff both lie in the same group and j is in the group's prompt or in i's own response
    (``PackedLayout``). Equal, forward and backward, to G separate causal sequences ``prompt + response``.

    Args:
        q_TNH: queries [T, N, H].
        k_TKH: keys [T, K, H]; N must be a multiple of K (grouped queries: head n reads key head n // (N / K)).
        v_TKH: values [T, K, H].
        layout: where groups and padding lie; ``layout.num_tokens`` must be T.
        scale: factor on the scores; ``H ** -0.5`` when None.
        impl: "torch" (this file); "auto" picks the best one available, today "torch".

    Returns:
        [T, N, H] in the dtype of ``q_TNH``.

    Raises:
        ValueError: sizes that do not fit together, or an unknown ``impl``.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(f"prefix_attention: impl must be 'auto' or 'torch', got {impl!r}")
    _check_heads(q_TNH, k_TKH, v_TKH)
    if layout.num_tokens != q_TNH.shape[0]:
        raise ValueError(
            f"prefix_attention: layout describes {layout.num_tokens} rows, but the queries have {q_TNH.shape[0]}"
        )
    parts = []
    for group in layout.groups:
        parts.extend(_attend_group(q_TNH, k_TKH, v_TKH, group=group, scale=scale))
    if layout.num_padding:
        rows = slice(layout.num_tokens - layout.num_padding, layout.num_tokens)
        parts.append(_attend(q_TNH[rows], k_TKH[rows], v_TKH[rows], scale=scale, is_causal=True))
    # An empty layout has no rows; the slice keeps dtype, device and the autograd connection.
    return torch.cat(parts) if parts else q_TNH[:0]


def segment_attention(
    q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, *, cu_seqlens: Tensor | Sequence[int], scale: float | None = None
) -> Tensor:
    """Every row attends to all rows of its own segment and to no other: block-diagonal attention without a mask.

    The vision encoder's attention windows (and, in its full-attention blocks, its temporal patches) are segments.
    Segments of equal length run as one batch: windows are mostly of one size.

    Args:
        q_SNH, k_SNH, v_SNH: [S, N, H]; keys and values may have fewer heads, as in ``prefix_attention``.
        cu_seqlens: cumulative segment lengths ``[0, l1, l1 + l2, ..., S]``; empty segments are allowed.
        scale: factor on the scores; ``H ** -0.5`` when None.

    Returns:
        [S, N, H].

    Raises:
        ValueError: ``cu_seqlens`` that does not run from 0 to S without decreasing, or head counts that do not fit.
    """
    _check_heads(q_SNH, k_SNH, v_SNH)
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [int(bound) for bound in cu_seqlens]
    num_rows = q_SNH.shape[0]
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if not bounds or bounds[0] != 0 or bounds[-1] != num_rows or min(lengths, default=0) < 0:
        raise ValueError(f"segment_attention: cu_seqlens must rise from 0 to {num_rows}, got {bounds}")
    starts_by_length: dict[int, list[int]] = {}
    for start, length in zip(bounds, lengths, strict=False):
        if length:
            starts_by_length.setdefault(length, []).append(start)
    if not starts_by_length:
        return q_SNH[:0]
    if len(starts_by_length) == 1:  # all segments alike: already in order, no gather needed
        (length,) = starts_by_length
        return _attend_batch(q_SNH, k_SNH, v_SNH, length=length, scale=scale)
    outputs, rows = [], []
    for length, starts in starts_by_length.items():
        index = torch.tensor(starts, device=q_SNH.device)[:, None] + torch.arange(length, device=q_SNH.device)
        index = index.flatten()
        outputs.append(_attend_batch(q_SNH[index], k_SNH[index], v_SNH[index], length=length, scale=scale))
        rows.append(index)
    order = torch.argsort(torch.cat(rows))
    return torch.cat(outputs).index_select(0, order)


def _attend_group(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, group: GroupSpan, scale: float | None
) -> list[Tensor]:
    """Outputs of one group's prompt rows and of each of its responses, in row order."""
    prompt = slice(group.start, group.start + group.prompt_length)
    outputs = []
    if group.prompt_length:
        outputs.append(_attend(q_TNH[prompt], k_TKH[prompt], v_TKH[prompt], scale=scale, is_causal=True))
    start = prompt.stop
    for length in group.response_lengths:
        rows = slice(start, start + length)
        start = rows.stop
        if not length:
            continue
        mask = _bottom_right_causal(length, group.prompt_length, device=q_TNH.device)
        key = torch.cat([k_TKH[prompt], k_TKH[rows]])
        value = torch.cat([v_TKH[prompt], v_TKH[rows]])
        outputs.append(_attend(q_TNH[rows], key, value, scale=scale, mask=mask))
    return outputs


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


def _attend_batch(q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, *, length: int, scale: float | None) -> Tensor:
    """Consecutive segments of one ``length`` as a batch; S is a multiple of ``length``."""
    batched = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_SNH, k_SNH, v_SNH)]
    out_BNLH = scaled_dot_product_attention(*batched, scale=scale, enable_gqa=q_SNH.shape[1] != k_SNH.shape[1])
    return out_BNLH.transpose(1, 2).flatten(0, 1)


def _bottom_right_causal(num_rows: int, num_prefix: int, *, device: torch.device) -> Tensor:
    """bool [num_rows, num_prefix + num_rows]: row i sees the whole prefix and rows 0..i of its own part.

    SDPA's own ``is_causal`` aligns at the top left, which would hide the prompt's tail from a response.
    """
    return torch.ones(num_rows, num_prefix + num_rows, dtype=torch.bool, device=device).tril(num_prefix)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention expects q [T, N, H], k and v [T, K, H] with N a multiple of K, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
