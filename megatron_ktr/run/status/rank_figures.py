"""Which rank holds up a step, and how much memory the ranks have needed: metrics of every step, over all ranks.

    ranks/slowest                 the rank whose own part of the step took longest (with several ranks)
    ranks/slowest_behind_seconds  its seconds less the median of all ranks
    ranks/device_memory_peak_gb   the most device memory that any rank has had allocated since it started, in 10^9 bytes
                                  (on CPU: resident memory)
    ranks/host_memory_gb          the resident memory of the rank that has most, in 10^9 bytes

A rank's own part is what it does before the update: rollout, balance, pack, vision and score. Every rank waits for the
others after the rollout and in the update, so that whole steps take equally long on all of them. Ranks of one replica
also wait for each other inside these phases. So the figures find the slow replica, but not the slow rank inside it.

All ranks exchange their two or three numbers in one small sum of 24 bytes a rank; the host waits for it once a step,
after the step's own numbers have been read.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import psutil
import torch

from megatron_ktr.distributed.collectives import all_reduce_sum
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.transfer import send

OWN_PHASES = ("rollout", "balance", "pack", "vision", "score")


class RankFigures(StepHook):
    """Adds the metrics above to each step; collective."""

    def __init__(self, *, ranks: ParallelGroups, platform: Platform) -> None:
        self._ranks, self._platform = ranks, platform
        self._process = psutil.Process()

    def after_step(self, report: StepReport) -> None:
        own = sum(report.values.get(f"seconds/{phase}", 0.0) for phase in OWN_PHASES)
        mine = [own, float(self._platform.peak_memory_bytes()), float(self._process.memory_info().rss)]
        rows = torch.zeros(self._ranks.world_size, len(mine), dtype=torch.float64)
        rows[self._ranks.rank] = torch.tensor(mine, dtype=torch.float64)
        rows = all_reduce_sum(send(rows, self._platform.device), self._ranks.world).tolist()
        report.values.update(figures_of(rows))


def figures_of(rows: list[list[float]]) -> Mapping[str, float]:
    """The metrics of [own seconds, peak of device memory, resident memory] by rank."""
    seconds, device, host = zip(*rows, strict=True)
    found = {"ranks/device_memory_peak_gb": max(device) / 1e9, "ranks/host_memory_gb": max(host) / 1e9}
    if len(rows) > 1:
        found["ranks/slowest"] = float(seconds.index(max(seconds)))
        found["ranks/slowest_behind_seconds"] = max(seconds) - statistics.median(seconds)
    return found
