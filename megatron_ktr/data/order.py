"""The order in which a run visits its records: a function of the seed and of the place in the endless sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class EpochOrder:
    """The orders of all epochs of ``num_records`` records, one after the other."""

    def __init__(self, num_records: int, *, seed: int, shuffle: bool) -> None:
        self.num_records = num_records
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def place_of(self, element: int) -> int:
        """The index of the record at place ``element`` of the sequence."""
        epoch, offset = divmod(element, self.num_records)
        if not self.shuffle:
            return offset
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return int(self._order[offset])

    def _order_of(self, epoch: int) -> Tensor:
        # A generator takes one number as its seed. The large factor keeps pairs of seed and epoch apart, because both
        # are small numbers.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_records, generator=generator)
