"""Checksums of tensors that several ranks should hold alike, and which of these ranks differ.

    checksum = sum over the elements of their bits, read as a whole number, modulo 2^64

The sum is of whole numbers, so it is exact, and the same in every order and on every device. Elements are read as
integers of their own width. A change of one bit changes the sum by a power of two, so a single flipped bit is always
found; of changes of many elements one in 2^64 is missed, if they are random.

A rank that differs is named by majority, among three copies or more. Of two copies that differ nobody can tell which is
the right one, unless a second comparison, over other ranks, involves one of them as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.distributed.agreement import gather_objects

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Copy:
    """A tensor on this rank, of which every rank of ``group`` should hold an equal copy."""

    name: str
    """The same on all ranks of the group, in the same order."""
    tensor: Tensor
    group: ProcessGroup


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ, and the ranks of the world that may hold the wrong one."""

    name: str
    suspects: tuple[int, ...]
    """A single rank, or several with a majority against them, or all that cannot be told apart."""
    is_certain: bool
    """Whether a majority, or two comparisons, speak against the suspects."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """int64 [], on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64)


def find_differences(copies: Iterable[Copy], *, world: ProcessGroup) -> list[Difference]:
    """The tensors that ranks hold differently, the same list on every rank. Collective over the world; the host waits
    for the device once for each group."""
    by_group: dict[ProcessGroup, list[Copy]] = {}
    for copy in copies:
        if copy.group.size() > 1:
            by_group.setdefault(copy.group, []).append(copy)
    found: list[tuple[str, tuple[int, ...], bool]] = []
    for group, of_group in by_group.items():
        sums_n = torch.stack([checksum(copy.tensor) for copy in of_group])
        parts = [torch.empty_like(sums_n) for _ in range(group.size())]
        torch.distributed.all_gather(parts, sums_n, group=group)
        columns = torch.stack(parts, dim=1)
        ranks = torch.distributed.get_process_group_ranks(group)
        for copy, sums in zip(of_group, columns.tolist(), strict=True):
            if len(set(sums)) > 1:
                suspects, is_certain = _suspects(sums, ranks)
                found.append((copy.name, suspects, is_certain))
    everywhere = sorted({one for of_rank in gather_objects(found, group=world) for one in of_rank})
    names = dict.fromkeys(name for name, _, _ in everywhere)
    return [_combined(name, [one[1:] for one in everywhere if one[0] == name]) for name in names]


def _suspects(sums: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    (usual, number), *_ = Counter(sums).most_common()
    if 2 * number > len(sums):
        return tuple(rank for rank, value in zip(ranks, sums, strict=True) if value != usual), True
    return tuple(ranks), False


def _combined(name: str, verdicts: Sequence[tuple[tuple[int, ...], bool]]) -> Difference:
    """One tensor's verdicts as one: the ranks that every comparison suspects, or all that any does."""
    sets = [set(suspects) for suspects, _ in verdicts]
    common, whole = set.intersection(*sets), set.union(*sets)
    is_narrower = bool(common) and len(verdicts) > 1 and len(common) < min(map(len, sets))
    is_certain = is_narrower or all(is_sure for _, is_sure in verdicts)
    return Difference(name, tuple(sorted(common or whole)), is_certain)
