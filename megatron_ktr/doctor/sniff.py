"""Finds GPUs that are slower than the others: runs megatron-core's sniff test on every rank and compares results."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from megatron_ktr.doctor.check import Check
from megatron_ktr.doctor.ranks import WorldFacts, gather
from megatron_ktr.errors import UserError

NAME = "sniff test"
LEAST_SHORTFALL = 0.1
"""A rank that falls short of the median by less than this share counts as normal. The bound is megatron-core's own."""
LEAST_RANKS = 3
"""The lowest number of ranks to compare. If only two differ, it is unknown which one is slow."""


@dataclass(frozen=True)
class Measure:
    """One measured quantity on every rank."""

    name: str
    """megatron-core's name with the unit: ``GEMM throughput (8192x8192x8192, bf16) [TFLOP/s/GPU]``."""
    values: tuple[float, ...]
    """The values by rank. More is better, and NaN means that the rank took no part."""


def read_measures_or_why(*, has_gpu: bool) -> tuple[Measure, ...] | str:
    """The measures, or the reason why there are none: no GPU, or a megatron-core without the test.

    The call is collective over the world, and the result is the same on every rank.
    """
    if not has_gpu:
        return "it times GPUs, and there is none here"
    from megatron_ktr.distributed import sniff

    try:
        test = sniff.load_sniff_test()
    except UserError as error:
        return str(error)
    by_rank = gather(sniff.measure(test))
    return tuple(
        Measure(name, tuple(found[index][1] for found in by_rank)) for index, (name, _) in enumerate(by_rank[0])
    )


def slow_ranks(measure: Measure) -> tuple[int, ...]:
    """The ranks that fall short of the median by more than the median deviation and by more than a tenth of it. This is
    megatron-core's rule, applied only to ranks that are too slow."""
    taking_part = [value for value in measure.values if not math.isnan(value)]
    if len(taking_part) < LEAST_RANKS:
        return ()
    median = statistics.median(taking_part)
    deviation = statistics.median(abs(value - median) for value in taking_part)
    limit = median - max(deviation, LEAST_SHORTFALL * median)
    return tuple(rank for rank, value in enumerate(measure.values) if value < limit)


def check_sniff(measures: tuple[Measure, ...] | str, *, world: WorldFacts | None) -> Check:
    """Checks that no rank is slow. ``measures`` may also be the reason why there are none."""
    if world is None:
        return Check(NAME, False, "not run: it compares ranks", "start the doctor with torchrun, on all GPUs")
    if isinstance(measures, str):
        return Check(NAME, False, f"not run: {measures}", "start the doctor without --sniff")
    slow = [(measure, rank) for measure in measures for rank in slow_ranks(measure)]
    if slow:
        details = [_shortfall(measure, rank, world) for measure, rank in slow]
        hosts = list(dict.fromkeys(world.hosts[rank] for _, rank in slow))
        remedy = (
            f"look at clocks, temperature and errors on {', '.join(hosts[:8])} (nvidia-smi -q), and run without "
            "what stays slow: every rank waits for the slowest one"
        )
        rest = f"; and {len(details) - 4} more" if len(details) > 4 else ""
        return Check(NAME, False, "; ".join(details[:4]) + rest, remedy)
    detail = f"{len(measures)} measures on {world.size} ranks"
    if world.size < LEAST_RANKS:
        return Check(NAME, True, f"{detail}: too few to tell which one is slow")
    return Check(NAME, True, f"{detail} agree; {_median(measures[0])}" if measures else detail)


def _shortfall(measure: Measure, rank: int, world: WorldFacts) -> str:
    return f"rank {rank} ({world.hosts[rank]}) has {measure.values[rank]:.4g}, median {_median(measure)}"


def _median(measure: Measure) -> str:
    known = [value for value in measure.values if not math.isnan(value)]
    return f"{statistics.median(known):.4g} of {measure.name}" if known else f"none of {measure.name}"
