"""Several sources of records in one endless sequence: which source is drawn at each place of it, and which record.

The sequence goes round in periods. Source s stands ``draws[s]`` times in each of them, evenly spread: before the
permutation below at the times

    (k + 1/2) x period / draws[s],    k = 0 .. draws[s] - 1

so that the beginning of the sequence has the sources in the right proportion wherever it is cut off. Neighbouring
places, ``WINDOW`` of them, are then put into a random order. Without that a replica that takes every n-th place could
see one source only. The k-th place of a source takes the k-th record of that source's own endless order
(``EpochOrder``). Everything follows from the seed and the place, so a run can resume at any place, with any number of
replicas. A single source has exactly the order it has without a mixture.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.order import BucketedOrder, EpochOrder, LengthBuckets
from megatron_ktr.data.records import Record

WINDOW = 256
"""Neighbouring places of a period that are permuted."""
_BLOCK = 4096
"""Short periods are made together, so many that they have about this number of places."""


@dataclass(frozen=True)
class RecordSource:
    """The records of one file and how prompts are made of them."""

    records: Sequence[Record]
    loader: PromptLoader
    left_out: Collection[int] = ()
    """Indices of ``records`` that are passed over. They keep their place in the order."""
    name: str = ""
    draws: int = 0
    """How often the source is drawn in a period; 0 means once for each record."""
    rewards: tuple[str, ...] | None = None
    """The reward parts of its responses; None means the run's."""
    buckets: LengthBuckets | None = None
    """The lengths that its records are ordered by, if it is the only source; None: they come in a plain order."""
    is_left_out: np.ndarray = field(init=False, repr=False)
    """Bool [records]."""

    def __post_init__(self) -> None:
        mask = np.zeros(len(self.records), dtype=bool)
        mask[np.fromiter(self.left_out, dtype=np.int64, count=len(self.left_out))] = True
        object.__setattr__(self, "is_left_out", mask)
        object.__setattr__(self, "draws", self.draws or len(self.records))

    @property
    def num_kept(self) -> int:
        """Draws of a period that are not passed over; of several epochs a rounded share."""
        kept = len(self.records) - len(self.left_out)
        return round(self.draws * kept / len(self.records))


class Place(NamedTuple):
    """What stands at a place of the sequence."""

    source: int
    record: int
    """Index in the records of the source."""


class Visit(NamedTuple):
    """What stands at a place of the sequence, and which round through its source that is."""

    source: int
    record: int
    """Index in the records of the source."""
    epoch: int
    """How many whole rounds through the source lie before it."""


class MixtureOrder:
    """The sequence of all periods of a mixture."""

    def __init__(
        self,
        draws: Sequence[int],
        num_records: Sequence[int],
        *,
        seed: int,
        shuffle: bool,
        buckets: LengthBuckets | None = None,
    ) -> None:
        """``draws`` and ``num_records`` have one number for each source. ``buckets``: of the only source, whose records
        then come in steps of nearly equal length."""
        self.period = sum(draws)
        self.round = self.period * max(-(-number // drawn) for number, drawn in zip(num_records, draws, strict=True))
        """Places in which every source is gone through once. By weights it takes many periods: 1 : 1 has two places."""
        self._draws = np.asarray(draws, dtype=np.int64)
        self._seed = seed
        self._orders: list[EpochOrder] = [
            EpochOrder(number, seed=seed if len(draws) == 1 else _seed_of(f"source {index}", seed), shuffle=shuffle)
            for index, number in enumerate(num_records)
        ]
        if buckets is not None:
            if len(draws) != 1 or not shuffle:
                raise ValueError("length buckets are those of a single source that is shuffled")
            self._orders = [BucketedOrder(buckets, seed=seed)]
        self._periods_of_block = max(1, _BLOCK // self.period)
        self._block = -1
        self._sources = np.empty(0, dtype=np.int16)
        self._counts = np.empty(0, dtype=np.int64)

    def place_of(self, element: int) -> Place:
        """What stands at place ``element``."""
        if len(self._orders) == 1:
            return Place(0, self._orders[0].place_of(element))
        source, draw = self.draw_of(element)
        return Place(source, self._orders[source].place_of(draw))

    def visit(self, element: int) -> Visit:
        """What stands at place ``element``, with the epoch of its source."""
        source, draw = (0, element) if len(self._orders) == 1 else self.draw_of(element)
        order = self._orders[source]
        return Visit(source, order.place_of(draw), draw // order.num_records)

    def draw_of(self, element: int) -> tuple[int, int]:
        """(source, how often it was drawn before) at place ``element``."""
        block, offset = divmod(element, self._periods_of_block * self.period)
        if block != self._block:
            self._sources, self._counts = self._make(block)
            self._block = block
        source = int(self._sources[offset])
        before = block * self._periods_of_block * int(self._draws[source])
        return source, before + int(self._counts[offset])

    def _make(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a block's places, and at each place how often its source stands before it in the block."""
        times = np.concatenate([(np.arange(number) + 0.5) * (self.period / number) for number in self._draws])
        labels = np.repeat(np.arange(len(self._draws), dtype=np.int16), self._draws)
        spread = np.tile(labels[np.argsort(times, kind="stable")], self._periods_of_block)
        place = np.arange(len(spread))
        # Windows end with their period, so that every period has the exact numbers.
        window = place // self.period * (self.period // WINDOW + 1) + place % self.period // WINDOW
        generator = torch.Generator().manual_seed(_seed_of(f"block {block}", self._seed))
        sources = spread[np.lexsort((torch.randperm(len(spread), generator=generator).numpy(), window))]
        counts = np.empty(len(sources), dtype=np.int64)
        for source, number in enumerate(self._draws):
            counts[sources == source] = np.arange(number * self._periods_of_block)
        return sources, counts


def _seed_of(what: str, seed: int) -> int:
    """A seed of its own for ``what``; small enough for ``EpochOrder``, which multiplies it."""
    return xxhash.xxh3_64_intdigest(f"{what} of {seed}".encode()) >> 33
