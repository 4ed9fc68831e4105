"""Packed attention behind megatron-core's ``core_attention`` interface, and the parameters that steer it.

megatron-core hands a ``PackedSeqParams`` through every layer untouched, so a subclass of it can carry what our
attention needs. Its own fields describe one sequence ``[0, T]``: with as many rotary frequencies as rows, core then
rotates row i by frequency i, whatever its M-RoPE position, instead of counting rows from 0 in every segment.
That one-sequence description stays in host memory on purpose: core reads it as Python numbers in every layer, which
would otherwise be a device synchronisation per layer. Only Transformer Engine's rotation, one kernel that core calls
with ``apply_rope_fusion``, reads it on the device, and nobody else then does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.config.words import PrefixImpl
from megatron_ktr.ops.context_shard import ContextShard
from megatron_ktr.ops.key_exchange import KeyExchange
from megatron_ktr.ops.prefix_attention import prefix_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedLayout
from models.qwen2_5_vl.products import product_dtype


@dataclass
class PrefixSeqParams(PackedSeqParams):
    """Attention of the language model: ``plan`` says who may attend whom.

    With context parallelism the queries are this rank's rows and the plan's keys are everybody's: ``exchange`` gets
    them.
    """

    plan: AttentionPlan | None = None
    exchange: KeyExchange | None = None

    @classmethod
    def from_layout(cls, layout: PackedLayout, *, bounds_on: torch.device | None = None) -> PrefixSeqParams:
        """``bounds_on``: the device whose kernel rotates; None: core's own code does."""
        return cls(plan=AttentionPlan.of_layout(layout), **_one_sequence(layout.num_tokens, bounds_on))

    @classmethod
    def from_shard(
        cls, shard: ContextShard, *, group: ProcessGroup, bounds_on: torch.device | None = None
    ) -> PrefixSeqParams:
        exchange = KeyExchange(shard, group=group)
        return cls(plan=shard.plan, exchange=exchange, **_one_sequence(shard.num_rows, bounds_on))


class OneRank:
    """Stands in for the context group wherever megatron-core would cut sequences or frequencies itself: rows are
    shared out before the first layer, and core's layers work on what one rank has as if it were everything."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class PrefixCoreAttention(torch.nn.Module):
    """``prefix_attention`` as megatron-core's core attention; heads are already split over tensor ranks.

    ``impl`` comes with the layer specification and chooses among the implementations.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        impl: PrefixImpl = "auto",
        **_: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.scale = softmax_scale
        self.impl: PrefixImpl = impl

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
        """[T, N, H], [T, K, H], [T, K, H] -> [T, N * H]; mask arguments are unused, the plan says it all."""
        assert packed_seq_params.plan is not None, "``from_layout`` and ``from_shard`` make one"
        lower = product_dtype(self.config) or query.dtype
        out_TNH = prefix_attention(
            query.to(lower),
            key.to(lower),
            value.to(lower),
            plan=packed_seq_params.plan,
            scale=self.scale,
            impl=self.impl,
            exchange=packed_seq_params.exchange,
        )
        return out_TNH.flatten(1).to(query.dtype)


def _one_sequence(num_rows: int, bounds_on: torch.device | None) -> dict[str, Any]:
    bounds = torch.tensor([0, num_rows], dtype=torch.int32)
    if bounds_on is not None:
        bounds = send(bounds, bounds_on)
    return dict(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=num_rows,
        max_seqlen_kv=num_rows,
        cp_group=OneRank(),
    )
