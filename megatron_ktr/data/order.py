"""The order in which a run visits its records: a function of the seed and of the place in the endless sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
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


@dataclass(frozen=True)
class LengthBuckets:
    """What a length-bucketed order goes by."""

    lengths: np.ndarray
    """int64 [records], in tokens."""
    is_left_out: np.ndarray
    """bool [records]: the records that are passed over."""
    num_buckets: int
    """Steps whose records are sorted together."""
    step_size: int
    """Records of one step, over all replicas."""

    @cached_property
    def digest(self) -> str:
        """A digest of all that decides the order beside the seed."""
        parts = np.ascontiguousarray(self.lengths, dtype="<i8").tobytes(), np.packbits(self.is_left_out).tobytes()
        sizes = f"{self.num_buckets} {self.step_size} ".encode()
        return xxhash.xxh3_128(sizes + b"".join(parts)).hexdigest()


class BucketedOrder(EpochOrder):
    """The orders of all epochs, in which the records of one step have nearly the same length.

        the epoch's permutation      r1 r2 r3 r4 r5 r6 r7 r8 | ...             windows of num_buckets x step_size places
        sorted by length             r3 r7 r1 r5 r2 r8 r4 r6 | ...             ties stay in the permutation's order
        cut into steps (buckets)     [r3 r7] [r1 r5] [r2 r8] [r4 r6] | ...
        the steps in random order    [r2 r8] [r4 r6] [r3 r7] [r1 r5] | ...

    A bucket is one step of all replicas together, so that the order does not depend on their number. Neighbours in it
    go to different replicas and have nearly the same length, so replicas get nearly the same work. The records of the
    step that one epoch begins and the next one completes are not sorted. Records that are passed over stand at the end
    of their epoch, where they move no other record to another step. The order is a function of seed, epoch and
    ``LengthBuckets``. (The idea is transformers' ``LengthGroupedSampler``, which sorts windows of 50 batches of each
    process and resumes by walking.)
    """

    def __init__(self, buckets: LengthBuckets, *, seed: int) -> None:
        super().__init__(len(buckets.lengths), seed=seed, shuffle=True)
        self._buckets = buckets

    def _order_of(self, epoch: int) -> Tensor:
        buckets, size = self._buckets, self._buckets.step_size
        drawn = super()._order_of(epoch).numpy()
        is_left_out = buckets.is_left_out[drawn]
        kept = drawn[~is_left_out]
        # The first places of an epoch complete the step that the epoch before began.
        first = min(-epoch * len(kept) % size, len(kept))
        num_steps = (len(kept) - first) // size
        last = first + num_steps * size
        middle = kept[first:last]
        window = np.arange(num_steps) // buckets.num_buckets
        by_length = np.lexsort((buckets.lengths[middle], np.repeat(window, size)))  # stable
        steps = middle[by_length].reshape(num_steps, size)
        # Of a sequence of its own: the large factor is another one than that of the permutation.
        generator = torch.Generator().manual_seed(self.seed * 1_000_033 + epoch)
        at_random = np.lexsort((torch.randperm(num_steps, generator=generator).numpy(), window))
        return torch.from_numpy(
            np.concatenate([kept[:first], steps[at_random].reshape(-1), kept[last:], drawn[is_left_out]])
        )
