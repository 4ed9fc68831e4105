"""Several updates per rollout: which groups each of them trains on, and on which replica.

Mini-batches are made of the groups of all replicas in the order in which they were drawn. So the mini-batch that a
group is in depends neither on the number of replicas nor on what groups cost. Within a mini-batch, replicas then get
nearly equal numbers of groups, and after that nearly equal work (``step/balance.py``).

``plan_mini_batches`` guarantees:

1. every group is in exactly one mini-batch and on exactly one replica;
2. every replica has a group in every mini-batch. Where there are too few groups for that (a filter of groups may leave
   fewer than a step asks for), there are fewer mini-batches;
3. sizes of mini-batches differ by at most one group; without balance, numbers of groups per replica do too;
4. the same numbers give the same plan, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.step.balance import Placement, balance_parts, imbalance


@dataclass(frozen=True)
class MiniBatchPlan:
    """Groups are numbered over all replicas, replica after replica, in the order in which each replica has them."""

    placement: Placement
    members: tuple[tuple[int, ...], ...]
    """The groups of each mini-batch, over all replicas."""

    def split_of(self, replica: int) -> list[list[int]]:
        """For each mini-batch, the places of its groups in ``placement.groups_of[replica]``."""
        of_replica = self.placement.groups_of[replica]
        return [[place for place, group in enumerate(of_replica) if group in set(part)] for part in self.members]


def plan_mini_batches(
    draws: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    *,
    number: int,
    has_balance: bool,
    keep_counts: bool = False,
) -> MiniBatchPlan:
    """The mini-batches of a step.

    Args:
        draws: the draw number of each group, by replica. Where numbers are equal, the place in the replica decides,
            then the replica.
        costs: the cost of each group likewise, above 0.
        number: how many mini-batches there should be.
        has_balance: whether groups move to even out work; otherwise they move only to even out numbers of groups.
        keep_counts: work is evened out by exchanging groups one for one.
    """
    drawn = _numbered([len(of_replica) for of_replica in draws])
    replica_of = {group: replica for replica, groups in enumerate(drawn) for group in groups}
    flat = [cost for of_replica in costs for cost in of_replica]
    places = [
        (draw, place, replica, drawn[replica][place])
        for replica, of_replica in enumerate(draws)
        for place, draw in enumerate(of_replica)
    ]
    ordered = [group for *_, group in sorted(places)]
    number = max(1, min(number, len(ordered) // len(draws)))
    members = tuple(_shares(ordered, number))
    groups_of: list[list[int]] = [[] for _ in draws]
    for part in members:
        own: list[list[int]] = [[] for _ in draws]
        for group in part:
            own[replica_of[group]].append(group)
        even = _equal_counts(own)
        if has_balance:
            even = balance_parts(even, flat, keep_counts=keep_counts)
        for replica, groups in enumerate(even):
            groups_of[replica] += groups
    placed = tuple(tuple(sorted(groups)) for groups in groups_of)
    placement = Placement(drawn, placed, imbalance(drawn, flat), imbalance(placed, flat))
    return MiniBatchPlan(placement, members)


def _numbered(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    found, start = [], 0
    for size in sizes:
        found.append(tuple(range(start, start + size)))
        start += size
    return tuple(found)


def _shares(ordered: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """``ordered`` in ``number`` parts whose sizes differ by at most one, the larger ones first."""
    size, more = divmod(len(ordered), number)
    found, start = [], 0
    for index in range(number):
        end = start + size + (index < more)
        found.append(tuple(ordered[start:end]))
        start = end
    return found


def _equal_counts(parts: Sequence[Sequence[int]]) -> list[list[int]]:
    """``parts`` after the last groups of the longest parts have moved to the shortest ones, until lengths differ by at
    most one."""
    parts = [list(part) for part in parts]
    while True:
        longest = max(range(len(parts)), key=lambda at: (len(parts[at]), at))
        shortest = min(range(len(parts)), key=lambda at: (len(parts[at]), at))
        if len(parts[longest]) - len(parts[shortest]) <= 1:
            return parts
        parts[shortest].append(parts[longest].pop())
