"""Verifying checksums by all ranks together, each a share of the files, which all of them see.

Every rank comes to the same list, or raises the same error: nobody waits for a rank that has gone. What one rank finds
is looked at again by rank 0 before it counts: a directory that only some ranks see is no damaged directory, and must
not be set aside as one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ktr.distributed.agreement import gather_objects, on_every_rank, result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, damage_line, find_damage, read_manifest
from megatron_ktr.files.intact_checkpoint import incompleteness

T = TypeVar("T")


class SharedVerification:
    """``verify`` and ``agree`` of ``run_directory.find_checkpoint``; collective over the world."""

    def __init__(self, ranks: ParallelGroups) -> None:
        self.ranks = ranks

    def agree(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, on every rank."""
        return result_of_rank_zero(action, ranks=self.ranks)

    def verify(self, checkpoint: Path) -> list[Damage]:
        """Of a checkpoint of a training."""
        return self.agree(lambda: incompleteness(checkpoint)) or self.find_damage(checkpoint)

    def require_intact(self, directory: Path, *, option: str) -> None:
        """Raises ``UserError`` on every rank where a directory has checksums and a file differs from them."""
        if damage := self.find_damage(directory):
            with same_on_every_rank():
                raise UserError(damage_line(directory, damage, option=option))

    def find_damage(self, directory: Path) -> list[Damage]:
        """As ``checksums.find_damage``, of all files, on every rank."""
        shares = self.agree(lambda: _shares(directory, self.ranks.world_size))
        if isinstance(shares, Damage):
            return [shares]
        mine = on_every_rank(
            lambda: find_damage(directory, names=shares[self.ranks.rank]) if shares else [], ranks=self.ranks
        )
        found = gather_objects(mine, group=self.ranks.world)
        reported = {damage.file: rank for rank, damages in enumerate(found) for damage in damages}
        return self.agree(lambda: _confirmed(directory, reported)) if reported else []


def _shares(directory: Path, num_ranks: int) -> list[list[str]] | Damage:
    """Files by rank, the largest first to whoever has least to read; [] where there are no checksums."""
    try:
        digests = read_manifest(directory)
    except DamagedManifest as error:
        return Damage(MANIFEST, str(error))
    if digests is None:
        return []
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(digests, key=lambda name: (-digests[name].num_bytes, name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += digests[name].num_bytes
    return shares


def _confirmed(directory: Path, reported: dict[str, int]) -> list[Damage]:
    confirmed = find_damage(directory, names=reported)
    if unseen := sorted(reported.keys() - {damage.file for damage in confirmed}):
        raise UserError(
            f"{directory}: rank {reported[unseen[0]]} reads {unseen[0]} otherwise than rank 0 does; it must be on a "
            "file system that all ranks share"
        )
    return confirmed
