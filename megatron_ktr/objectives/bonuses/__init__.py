"""Bonuses: rewards that depend on the other responses of a group, added before advantages are taken. One file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_ktr.types import RolloutGroup


class Bonus(Protocol):
    """One bonus. Its mean over responses is the metric ``reward/NAME``."""

    @property
    def name(self) -> str: ...

    def values(self, group: RolloutGroup, lengths: Sequence[int]) -> list[float]:
        """The bonus of each response of ``group``; ``lengths`` are the responses' lengths in tokens."""
        ...

    def shares(self, group: RolloutGroup) -> Mapping[str, float]:
        """Further numbers about ``group``, by name; their means over groups become metrics."""
        ...
