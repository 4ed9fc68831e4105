"""Packed attention behind megatron-core's ``core_attention`` interface, and the parameters that steer it.

megatron-core hands a ``PackedSeqParams`` through every layer untouched, so a subclass of it can carry what our
attention needs. Its own fields describe one sequence ``[0, T]``: with as many rotary frequencies as rows, core then
rotates row i by frequency i, whatever its M-RoPE position, instead of counting rows from 0 in every segment.
That one-sequence description stays in host memory on purpose: core reads it as Python numbers in every layer, which
would otherwise be a device synchronisation per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ktr.ops.prefix_attention import prefix_attention
from megatron_ktr.types import PackedLayout

SEQLEN_BUCKET = 128
"""Maximum lengths are rounded up to this: fused kernels cache a plan per maximum length."""


@dataclass(frozen=True)
class VarlenPlan:
    """Shared-prefix attention as variable-length attention with bottom-right causal alignment.

    Queries stay in place; keys and values are gathered by ``kv_rows`` so that every response has its own copy of the
    prompt's. Example: prompt 2, responses 1 and 2, no padding: ``kv_rows == [0, 1, 0, 1, 2, 0, 1, 3, 4]``,
    ``cu_seqlens_q == [0, 2, 3, 5]``, ``cu_seqlens_kv == [0, 2, 5, 9]``.
    """

    kv_rows: Tensor
    """int64 [sum of key lengths]"""
    cu_seqlens_q: Tensor
    """int32 [segments + 1]"""
    cu_seqlens_kv: Tensor
    """int32 [segments + 1]"""
    max_seqlen_q: int
    """Rounded up, like the next; as host numbers, so that nobody has to ask the device."""
    max_seqlen_kv: int

    def to(self, device: torch.device) -> VarlenPlan:
        names = ("kv_rows", "cu_seqlens_q", "cu_seqlens_kv")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass
class PrefixSeqParams(PackedSeqParams):
    """Attention of the language model: ``layout`` says who may attend whom."""

    layout: PackedLayout | None = None
    _varlen_plan: VarlenPlan | None = None

    @classmethod
    def from_layout(cls, layout: PackedLayout) -> PrefixSeqParams:
        return cls(layout=layout, **_one_sequence(layout.num_tokens))

    def varlen_plan(self, device: torch.device) -> VarlenPlan:
        """Built and moved on first use: all layers of a forward share it."""
        if self._varlen_plan is None:
            self._varlen_plan = plan_varlen(self.layout).to(device)
        return self._varlen_plan


class PrefixCoreAttention(torch.nn.Module):
    """``prefix_attention`` as megatron-core's core attention; heads are already split over tensor ranks."""

    def __init__(self, config: Any, layer_number: int, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PrefixSeqParams,
        **_: Any,
    ) -> Tensor:
        """[T, N, H], [T, K, H], [T, K, H] -> [T, N * H]; mask arguments are unused, the layout says it all."""
        out_TNH = prefix_attention(query, key, value, layout=packed_seq_params.layout, scale=self.scale)
        return out_TNH.flatten(1)


def plan_varlen(layout: PackedLayout) -> VarlenPlan:
    """The variable-length plan of a layout; padding becomes a last, ordinary causal segment."""
    kv_rows: list[Tensor] = []
    lengths_q: list[int] = []
    for group in layout.groups:
        prompt = torch.arange(group.start, group.start + group.prompt_length)
        kv_rows.append(prompt)
        lengths_q.append(group.prompt_length)
        start = group.start + group.prompt_length
        for length in group.response_lengths:
            kv_rows.append(torch.cat([prompt, torch.arange(start, start + length)]))
            lengths_q.append(length)
            start += length
    if layout.num_padding:
        kv_rows.append(torch.arange(layout.num_tokens - layout.num_padding, layout.num_tokens))
        lengths_q.append(layout.num_padding)
    lengths_kv = [len(rows) for rows in kv_rows]
    return VarlenPlan(
        kv_rows=torch.cat(kv_rows),
        cu_seqlens_q=_cumulative(lengths_q),
        cu_seqlens_kv=_cumulative(lengths_kv),
        max_seqlen_q=_bucket(max(lengths_q)),
        max_seqlen_kv=_bucket(max(lengths_kv)),
    )


def _one_sequence(num_rows: int) -> dict[str, Any]:
    bounds = torch.tensor([0, num_rows], dtype=torch.int32)
    return dict(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=num_rows, max_seqlen_kv=num_rows
    )


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _bucket(length: int) -> int:
    return -(-length // SEQLEN_BUCKET) * SEQLEN_BUCKET
