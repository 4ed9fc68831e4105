"""Packed attention behind megatron-core's ``core_attention`` interface, and the parameters that steer it.

megatron-core hands a ``PackedSeqParams`` through every layer untouched, so a subclass of it can carry what our
attention needs.

The inherited fields describe the packed batch as one sequence ``[0, T]``. The model computes one rotary angle for each
row, from the row's M-RoPE position. With one sequence, core rotates row i by angle i, as it should; with several
segments core would count rows from 0 in each of them.

These fields stay in host memory on purpose: core reads them as Python numbers in every layer, and on the device every
such read would be a synchronisation. The exception is Transformer Engine's rotation kernel, which core calls with
``apply_rope_fusion``: it reads the fields on the device, and then nothing else reads them.
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
    """Parameters of the language model's attention: ``plan`` says which rows may attend which.

    With context parallelism the queries are this rank's rows, and the keys of the plan are all ranks' rows;
    ``exchange`` gathers those keys.
    """

    plan: AttentionPlan | None = None
    exchange: KeyExchange | None = None

    @classmethod
    def from_layout(cls, layout: PackedLayout, *, bounds_on: torch.device | None = None) -> PrefixSeqParams:
        """Makes the parameters of a batch that lies whole on this rank.

        ``bounds_on`` is the device of the sequence bounds if Transformer Engine's kernel rotates; it is None if core's
        own code rotates.
        """
        return cls(plan=AttentionPlan.of_layout(layout), **_one_sequence(layout.num_tokens, bounds_on))

    @classmethod
    def from_shard(
        cls, shard: ContextShard, *, group: ProcessGroup, bounds_on: torch.device | None = None
    ) -> PrefixSeqParams:
        exchange = KeyExchange(shard, group=group)
        return cls(plan=shard.plan, exchange=exchange, **_one_sequence(shard.num_rows, bounds_on))


class OneRank:
    """A stand-in for the context-parallel group that keeps megatron-core from cutting sequences and rotary angles.

    We distribute the rows over the context ranks before the first layer; core's layers then work on one rank's rows as
    if they were the whole sequence.
    """

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class PrefixCoreAttention(torch.nn.Module):
    """``prefix_attention`` as megatron-core's core attention; heads are already split over tensor ranks.

    The layer specification sets ``impl``, which chooses among the implementations of ``prefix_attention``.
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
        """[T, N, H], [T, K, H], [T, K, H] -> [T, N * H]; the plan replaces the mask arguments, which are unused."""
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
