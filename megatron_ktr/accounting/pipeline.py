"""megatron-core's pipeline schedule, 1F1B with or without interleaved chunks: what is in flight, and how long it takes.

A *chunk* is a part of the stack of layers. With p pipeline ranks and v chunks per rank, chunk c of rank r is number
c p + r of all p v chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from megatron_ktr.accounting.layout import Layout


def schedule(layout: Layout, *, rank: int, num_micro_batches: int) -> Iterator[tuple[str, int]]:
    """Yields (direction, chunk) of one pipeline rank in order, where the direction is "F" (forward) or "B" (backward).

    The schedule is 1F1B; with several chunks per rank it is interleaved. First come the warm-up forwards, p - rank - 1
    without virtual stages, else 2 (p - rank - 1) + (v - 1) p. Then forwards and backwards alternate. The remaining
    backwards come last.
    """
    order = list(_chunk_order(layout, num_micro_batches))
    if layout.pipeline == 1:
        warm_up = 0
    elif layout.virtual == 1:
        warm_up = layout.pipeline - rank - 1
    else:
        warm_up = 2 * (layout.pipeline - rank - 1) + (layout.virtual - 1) * layout.pipeline
    warm_up = min(warm_up, len(order))
    for step in range(len(order) + warm_up):
        if step < len(order):
            yield "F", order[step]
        if step >= warm_up:
            yield "B", layout.virtual - 1 - order[step - warm_up]


@lru_cache(maxsize=4096)
def _schedule(pipeline: int, virtual: int, rank: int, num_micro_batches: int) -> tuple[tuple[str, int], ...]:
    """``schedule``, cached, because planning asks for the same few schedules again and again."""
    layout = Layout(pipeline=pipeline, virtual=virtual)
    return tuple(schedule(layout, rank=rank, num_micro_batches=num_micro_batches))


def _chunk_order(layout: Layout, num_micro_batches: int) -> Iterator[int]:
    """Yields the chunk of every forward: p micro-batches go through all of a rank's chunks before the next p."""
    group = layout.pipeline if layout.virtual > 1 else num_micro_batches
    for start in range(0, num_micro_batches, group):
        for chunk in range(layout.virtual):
            yield from [chunk] * min(group, num_micro_batches - start)


def peak_in_flight(
    layout: Layout,
    *,
    rank: int,
    num_micro_batches: int,
    saved_bytes: Sequence[float],
    extra_bytes: Sequence[float],
    forward_bytes: Sequence[float] = (),
) -> float:
    """The largest sum of what all micro-batches in flight keep on a rank and what the running operation needs besides.

    All arguments are bytes of one micro-batch, by chunk of the rank. ``saved_bytes`` are kept until backward,
    ``extra_bytes`` is what backward needs besides, and ``forward_bytes`` is the most that forward needs before its end.
    """
    p = layout.pipeline
    # Less than two rounds of p micro-batches warm up. From then on each round is like the one before, so that two more
    # rounds hold the peak of any number of them.
    shown = min(num_micro_batches, 4 * p + num_micro_batches % p)
    kept = peak = 0.0
    for direction, chunk in _schedule(p, layout.virtual, rank, shown):
        if direction == "F":
            peak = max(peak, kept + forward_bytes[chunk] if forward_bytes else 0.0)
            kept += saved_bytes[chunk]
        else:
            peak = max(peak, kept + extra_bytes[chunk])
            kept -= saved_bytes[chunk]
        peak = max(peak, kept)
    return peak


def pipeline_seconds(
    layout: Layout, *, num_micro_batches: int, forward: Sequence[float], backward: Sequence[float] | None
) -> float:
    """The seconds from the start of the first operation to the end of the last one, by simulation.

    Every rank works through its schedule in order. An operation starts as soon as its rank is free and the neighbour's
    result has arrived.

    Args:
        forward: seconds of one micro-batch, by chunk number.
        backward: the same for backward; None for a pass without gradient.
    """
    p = layout.pipeline
    # Simulate about three rounds; every further micro-batch costs as much as the slowest rank needs for it.
    simulated = min(num_micro_batches, 3 * p + num_micro_batches % p)
    busy = [sum((forward[i] + (backward[i] if backward else 0.0)) for i in range(r, len(forward), p)) for r in range(p)]
    has_backward = backward is not None
    queues = [_operations(p, layout.virtual, r, simulated, has_backward) for r in range(p)]
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * p
    position = [0] * p
    last = layout.num_chunks - 1
    is_running = True
    while is_running:
        is_running = False
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                direction, number, micro_batch = operation = queue[position[rank]]
                is_forward = direction == "F"
                start = clock[rank]
                if number != (0 if is_forward else last):
                    ready = done.get((direction, number - 1 if is_forward else number + 1, micro_batch))
                    if ready is None:
                        break
                    start = max(start, ready)
                clock[rank] = done[operation] = start + (forward if is_forward else backward or forward)[number]
                position[rank] += 1
                is_running = True
    return max(clock) + (num_micro_batches - simulated) * max(busy)


@lru_cache(maxsize=4096)
def _operations(
    pipeline: int, virtual: int, rank: int, num_micro_batches: int, has_backward: bool
) -> list[tuple[str, int, int]]:
    """The operations of one rank in order: (direction, chunk number, micro-batch)."""
    layout = Layout(pipeline=pipeline, virtual=virtual)
    steps = schedule(layout, rank=rank, num_micro_batches=num_micro_batches)
    if not has_backward:
        steps = (("F", chunk) for chunk in _chunk_order(layout, num_micro_batches))
    counts: dict[tuple[str, int], int] = {}
    operations = []
    for step in steps:
        counts[step] = counts.get(step, -1) + 1
        direction, chunk = step
        operations.append((direction, chunk * pipeline + rank, counts[step]))
    return operations
