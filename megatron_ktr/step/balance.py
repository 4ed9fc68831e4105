"""Which groups train together: replicas with equal work, and micro-batches under a bound on their tokens.

This file only plans with numbers. Nothing here changes what a step computes: losses are divided by counts of the
global batch, so that a group may be on any replica and in any micro-batch. Both plans start from an arrangement and
even it out. As long as it helps, the fullest part gives a group to another part, or swaps it for a cheaper one. So a
plan moves few groups; between replicas that means that few videos are sent.

``pack_by_tokens`` guarantees (the tests assert it):

1. every group is in exactly one micro-batch, and no micro-batch is empty;
2. two or more groups together never have more than ``max_tokens`` tokens; a larger group is alone in its micro-batch;
3. there are as many micro-batches as first-fit decreasing needs, which is at most 11/9 of the fewest possible + 1,
   raised to a multiple of ``multiple_of``;
4. the most costly micro-batch costs at most as much as the most costly one of first-fit decreasing;
5. the same numbers give the same plan, on every rank; the micro-batch of most tokens comes first, so that memory
   reaches its peak, or its limit, at once.

``balance_replicas`` guarantees: every group is on exactly one replica; no replica is left without a group; with
``keep_counts`` every replica keeps its number of groups; nothing moves if no replica's work is more than ``TOLERANCE``
above the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOLERANCE = 0.02
"""Groups are moved only while the busiest replica's work exceeds the mean by more than this share of the mean. Below
that, sending a video costs more than it saves."""


def pack_by_tokens(
    num_tokens: Sequence[int], *, costs: Sequence[float], max_tokens: int, multiple_of: int = 1
) -> list[list[int]]:
    """Indices of groups by micro-batch.

    Args:
        num_tokens: the tokens of each group.
        costs: the cost of each group, above 0, in any unit. Micro-batches of equal cost keep a pipeline full.
        multiple_of: the number of micro-batches is a multiple of it (interleaved pipeline stages).

    Raises:
        ValueError: no group, or fewer groups than a multiple of ``multiple_of`` needs. A number of groups that is
            itself a multiple is always enough.
    """
    if not num_tokens or len(num_tokens) != len(costs):
        raise ValueError(f"expected as many costs as groups and at least one, got {len(costs)} and {len(num_tokens)}")
    parts = _first_fit(num_tokens, max_tokens=max_tokens)
    number = -(-len(parts) // multiple_of) * multiple_of
    if number > len(num_tokens):
        raise ValueError(
            f"{len(num_tokens)} groups do not fill {number} micro-batches: {len(parts)} of at most {max_tokens} "
            f"tokens, raised to a multiple of {multiple_of}"
        )
    while len(parts) < number:
        # Some part has several groups, because there are more groups than parts.
        fullest = max((part for part in parts if len(part) > 1), key=lambda part: sum(costs[i] for i in part))
        parts.append([fullest.pop()])

    def fits(part: Sequence[int]) -> bool:
        return len(part) == 1 or sum(num_tokens[index] for index in part) <= max_tokens

    even = _even_out(parts, costs, fits=fits, tolerance=0.0)
    return sorted(even, key=lambda part: (-sum(num_tokens[index] for index in part), part))


def count_oversized(num_tokens: Sequence[int], *, max_tokens: int) -> int:
    """The number of groups that alone have more than ``max_tokens``."""
    return sum(1 for number in num_tokens if number > max_tokens)


@dataclass(frozen=True)
class Placement:
    """The replica on which each group of the step trains. Groups are numbered over all replicas, in the order drawn.

    Example: two replicas drew groups 0 1 and 2 3; ``groups_of == ((0, 3), (1, 2))`` swaps groups 1 and 3.
    """

    drawn: tuple[tuple[int, ...], ...]
    """The groups that each replica drew."""
    groups_of: tuple[tuple[int, ...], ...]
    """The groups that each replica trains on, ascending."""
    imbalance_before: float
    """Work of the busiest replica / mean work."""
    imbalance_after: float

    @property
    def moves(self) -> dict[tuple[int, int], list[int]]:
        """Groups that change places, by (from replica, to replica)."""
        origin = {index: replica for replica, indices in enumerate(self.drawn) for index in indices}
        found: dict[tuple[int, int], list[int]] = {}
        for replica, indices in enumerate(self.groups_of):
            for index in indices:
                if origin[index] != replica:
                    found.setdefault((origin[index], replica), []).append(index)
        return dict(sorted(found.items()))


def balance_replicas(costs: Sequence[Sequence[float]], *, keep_counts: bool = False) -> Placement:
    """Evens out the work of data-parallel replicas. ``costs`` are those of each replica's groups, all above 0."""
    drawn, start = [], 0
    for of_replica in costs:
        drawn.append(tuple(range(start, start + len(of_replica))))
        start += len(of_replica)
    flat = [cost for of_replica in costs for cost in of_replica]
    groups_of = tuple(tuple(part) for part in balance_parts(drawn, flat, keep_counts=keep_counts))
    return Placement(tuple(drawn), groups_of, imbalance(drawn, flat), imbalance(groups_of, flat))


def balance_parts(parts: Sequence[Sequence[int]], costs: Sequence[float], *, keep_counts: bool) -> list[list[int]]:
    """``parts`` after groups have moved between them until work is even; one for one with ``keep_counts``."""
    return _even_out(parts, costs, may_move=not keep_counts, tolerance=TOLERANCE)


def imbalance(parts: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    """Cost of the most costly part / mean cost of the parts."""
    loads = [sum(costs[index] for index in part) for part in parts]
    return max(loads) * len(loads) / sum(loads)


def _first_fit(num_tokens: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the largest group first, each into the first part with room."""
    parts: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        place = next((at for at, free in enumerate(room) if free >= num_tokens[index]), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(max_tokens)
        parts[place].append(index)
        room[place] -= num_tokens[index]
    return parts


def _even_out(
    parts: Sequence[Sequence[int]],
    costs: Sequence[float],
    *,
    tolerance: float,
    may_move: bool = True,
    fits: Callable[[Sequence[int]], bool] = lambda part: True,
) -> list[list[int]]:
    """``parts`` after exchanges between the most costly part and another one. Every exchange strictly lowers the larger
    cost of the two, so the sorted list of costs only ever decreases, and the loop ends."""
    parts = [list(part) for part in parts]
    mean = sum(costs[index] for part in parts for index in part) / len(parts)
    while True:
        # Loads are summed anew in a fixed order, so that rounding does not depend on the exchanges made before.
        loads = [sum(costs[index] for index in sorted(part)) for part in parts]
        fullest = max(range(len(parts)), key=lambda at: loads[at])
        if loads[fullest] <= (1 + tolerance) * mean:
            break
        for other in sorted(range(len(parts)), key=lambda at: loads[at]):
            found = None
            if other != fullest:
                found = _best_exchange(parts[fullest], parts[other], costs, may_move=may_move, fits=fits)
            if found is not None:
                parts[fullest], parts[other] = found
                break
        else:
            break
    return [sorted(part) for part in parts]


def _best_exchange(
    full: list[int],
    other: list[int],
    costs: Sequence[float],
    *,
    may_move: bool,
    fits: Callable[[Sequence[int]], bool],
) -> tuple[list[int], list[int]] | None:
    """Both parts after the exchange that leaves the least cost to the fuller of them; None if no exchange helps."""
    load, other_load = (sum(costs[index] for index in sorted(part)) for part in (full, other))
    # A tiny improvement is rounding, not progress.
    best, found = load * (1 - 1e-9), None
    for given in full:
        # Trying the plain move first prefers it to swaps with the same result.
        for taken in [None, *other] if may_move and len(full) > 1 else other:
            moved = costs[given] - (0.0 if taken is None else costs[taken])
            larger = max(load - moved, other_load + moved)
            if larger >= best:
                continue
            after = [index for index in full if index != given] + ([] if taken is None else [taken])
            other_after = [index for index in other if index != taken] + [given]
            if fits(after) and fits(other_after):
                best, found = larger, (after, other_after)
    return found
