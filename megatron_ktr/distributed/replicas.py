"""Numbers that the ranks of a replica, or all replicas, must agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_ktr.distributed.collectives import all_reduce_sum, broadcast_object, reduce_metrics
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send


class ReplicaNumbers:
    """Base class with collective counts and means, for a class that has ``ranks`` and ``platform``."""

    ranks: ParallelGroups
    platform: Platform

    def global_count(self, value: float) -> float:
        """Sum of a per-replica count over data-parallel replicas, equal on every rank."""
        (total,) = self.global_counts([value])
        return total

    def global_counts(self, values: Sequence[float]) -> list[float]:
        """Sums of several per-replica counts over data-parallel replicas, equal on every rank. The host waits once."""
        totals = send(torch.tensor([float(value) for value in values], dtype=torch.float64), self.platform.device)
        return all_reduce_sum(totals, self.ranks.data).tolist()

    def mean_over_replicas(self, metrics: Metrics) -> dict[str, float]:
        """The means over all replicas, equal on every rank. All ranks of a replica must hold the same ``metrics``."""
        return reduce_metrics(metrics, self.ranks.data).means()

    def sum_over_replicas(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The sums over all replicas, by name. All ranks of a replica must hold the same ``counts``; replicas may have
        different names."""
        return reduce_metrics(Metrics(dict(counts), dict.fromkeys(counts, 1.0)), self.ranks.data).sums

    def from_last_stage(self, value: Any) -> Any:
        """The last pipeline stage's ``value`` on every rank of the replica; small host objects only."""
        source = torch.distributed.get_global_rank(self.ranks.pipeline, self.ranks.sizes.pipeline - 1)
        return broadcast_object(value, group=self.ranks.pipeline, source=source)
