"""Context parallelism of one model chunk: distributes rows before its first layer, gathers results after the head.

Plans come from ``megatron_ktr/ops/context_shard.py``, collectives from ``megatron_ktr/ops/key_exchange.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.ops.context_shard import ContextShard, LocalRows, shard_layout
from megatron_ktr.ops.key_exchange import gather_rows, gather_statistics
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.types import PackedBatch
from models.qwen2_5_vl.attention import PrefixSeqParams


class ContextRanks:
    """The context-parallel ranks, which share each packed sequence, seen from this rank.

    The number of rows of every rank is padded to a multiple of ``multiple``.
    """

    def __init__(self, group: ProcessGroup, *, multiple: int) -> None:
        self.group = group
        self.multiple = multiple

    def share(self, batch: PackedBatch, *, bounds_on: torch.device | None = None) -> tuple[LocalRows, PrefixSeqParams]:
        """This rank's rows of the batch, and the keys they attend. ``bounds_on``: see ``PrefixSeqParams``."""
        shard = self._shard(batch)
        return shard.take(batch), PrefixSeqParams.from_shard(shard, group=self.group, bounds_on=bounds_on)

    def mine(self, batch: PackedBatch) -> Tensor:
        """Indices in R of the response tokens whose predicting rows lie on this rank: int64, in host memory."""
        return (self._owners(batch) == self.group.rank()).nonzero()[:, 0]

    def gather_statistics(self, mine: TokenStatistics, batch: PackedBatch) -> TokenStatistics:
        """Gathers the statistics of all response tokens on every rank, in one collective; differentiable.

        ``mine`` holds the statistics of this rank's response tokens.
        """
        owner_R = self._owners(batch)
        found = {name: value for name, value in vars(mine).items() if value is not None}
        flat = [row for value in found.values() for row in (value if value.dim() == 2 else (value,))]
        gathered = iter(gather_statistics(*flat, owner_R=owner_R, group=self.group))
        whole = {}
        for name, value in found.items():
            if value.dim() == 1:
                whole[name] = next(gathered)
            else:  # [K, R], one row a counterfactual; K may be 0
                rows = [next(gathered) for _ in value]
                whole[name] = torch.stack(rows) if rows else value.new_zeros(0, len(owner_R))
        return TokenStatistics(**whole)

    def gather_hidden(self, hidden_RD: Tensor, batch: PackedBatch) -> Tensor:
        """Gathers the hidden rows of all response tokens on every rank, without gradient.

        ``hidden_RD`` holds the rows of this rank's response tokens.
        """
        return gather_rows(hidden_RD.detach(), owner_R=self._owners(batch), group=self.group)

    def _owners(self, batch: PackedBatch) -> Tensor:
        return self._shard(batch).owners(batch)

    def _shard(self, batch: PackedBatch) -> ContextShard:
        size, rank = self.group.size(), self.group.rank()
        return shard_layout(batch.layout, size=size, rank=rank, multiple=self.multiple)
