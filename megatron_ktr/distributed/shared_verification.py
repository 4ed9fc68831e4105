"""Verifies checksums with all ranks together. Every rank checks a share of the files; all ranks must see all files.

Every rank gets the same list of damage, or raises the same error, so that no rank waits for one that has gone. Damage
found by one rank counts only once rank 0 has confirmed it. Otherwise a directory that only some ranks see would be
taken for a damaged one and set aside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ktr.distributed.agreement import gather_objects, on_every_rank, result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, damage_line, file_shares, find_damage
from megatron_ktr.files.intact_checkpoint import incompleteness

T = TypeVar("T")


class SharedVerification:
    """Provides ``verify`` and ``agree`` for ``find_checkpoint`` (``run/directory.py``); collective over the world."""

    def __init__(self, ranks: ParallelGroups) -> None:
        self.ranks = ranks

    def agree(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on rank 0 and returns its result on every rank."""
        return result_of_rank_zero(action, ranks=self.ranks)

    def verify(self, checkpoint: Path) -> list[Damage]:
        """The damage of a training checkpoint: files that are missing, or that differ from their checksums."""
        return self.agree(lambda: incompleteness(checkpoint)) or self.find_damage(checkpoint)

    def require_intact(self, directory: Path, *, option: str) -> None:
        """Raises ``UserError`` on every rank if the directory has checksums and a file differs from its own."""
        if damage := self.find_damage(directory):
            with same_on_every_rank():
                raise UserError(damage_line(directory, damage, option=option))

    def find_damage(self, directory: Path) -> list[Damage]:
        """The result of ``checksums.find_damage`` for all files, on every rank."""
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
    try:
        return file_shares(directory, num_ranks)
    except DamagedManifest as error:
        return Damage(MANIFEST, str(error))


def _confirmed(directory: Path, reported: dict[str, int]) -> list[Damage]:
    confirmed = find_damage(directory, names=reported)
    if unseen := sorted(reported.keys() - {damage.file for damage in confirmed}):
        raise UserError(
            f"{directory}: rank {reported[unseen[0]]} reads {unseen[0]} otherwise than rank 0 does; it must be on a "
            "file system that all ranks share"
        )
    return confirmed
