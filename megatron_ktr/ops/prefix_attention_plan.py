"""Describes which rows attend which, as a list of segments, on a single rank or on one of several context ranks.

A segment is a run of consecutive query rows. Each of them attends all keys of a prefix, and the segment's own keys
causally:

    row i of a segment attends  keys[prefix_start : prefix_start + prefix_length]  and  keys[own_start : own_start + i]

                                            prefix                 own
    a whole prompt                          nothing                the prompt
    rows a .. b of a prompt                 prompt rows 0 .. a     prompt rows a .. b
    a response                              the whole prompt       the response

A context-parallel rank holds some of the query rows and all keys. Its plan differs from that of a single rank only in
the list of segments.

Invariants (the tests assert them): segments cover the query rows from 0 on, in order, without gaps, and none is empty.
Padding rows follow them; they attend nothing, their output is zero, and no row attends them. ``prefix_blocks`` joins
neighbouring segments with the same prefix, so that all responses of a group read the prompt's keys as one dense block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_ktr.ops.row_copies import RowCopies
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedLayout

Placed = TypeVar("Placed", "VarlenCall", RowCopies)
SEQLEN_BUCKET = 128
"""Maximum lengths are rounded up to a multiple of this, because fused kernels cache a plan per maximum length."""


@dataclass(frozen=True)
class Segment:
    """``length`` query rows from ``start`` on, and the keys that they attend (see the module)."""

    start: int
    length: int
    own_start: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def own(self) -> slice:
        return slice(self.own_start, self.own_start + self.length)

    @property
    def prefix(self) -> slice:
        return slice(self.prefix_start, self.prefix_start + self.prefix_length)


@dataclass(frozen=True)
class AttentionPlan:
    """Segments over ``num_queries`` query rows (padding included) and ``num_keys`` key rows."""

    segments: tuple[Segment, ...]
    num_keys: int
    num_padding: int = 0
    _calls: dict[tuple[str, torch.device], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    @lru_cache(maxsize=16)
    def of_layout(cls, layout: PackedLayout) -> AttentionPlan:
        """The plan of a rank that holds all rows of ``layout``; key rows are the layout's rows.

        The latest plans are cached. Several passes of a step use the same layout, and its indices are then already on
        the device.
        """
        segments = []
        for group in layout.groups:
            prompt_end = group.start + group.prompt_length
            segments.append(Segment(group.start, group.prompt_length, group.start))
            start = prompt_end
            for length in group.response_lengths:
                segments.append(Segment(start, length, start, group.start, group.prompt_length))
                start += length
        return cls(tuple(s for s in segments if s.length), layout.num_tokens, layout.num_padding)

    @property
    def num_attending(self) -> int:
        """The number of query rows that are not padding."""
        return self.segments[-1].rows.stop if self.segments else 0

    @property
    def num_queries(self) -> int:
        return self.num_attending + self.num_padding

    @cached_property
    def prefix_blocks(self) -> tuple[tuple[slice, slice], ...]:
        """(query rows, key rows) of every prefix that is not empty; each block is dense and needs no mask."""
        blocks: list[tuple[slice, slice]] = []
        for segment in self.segments:
            if not segment.prefix_length:
                continue
            if blocks and blocks[-1][1] == segment.prefix and blocks[-1][0].stop == segment.start:
                blocks[-1] = (slice(blocks[-1][0].start, segment.rows.stop), segment.prefix)
            else:
                blocks.append((segment.rows, segment.prefix))
        return tuple(blocks)

    @cached_property
    def own_runs(self) -> tuple[tuple[Segment, int], ...]:
        """Runs of neighbouring segments of equal length whose own keys are neighbours too: (first, count)."""
        runs: list[tuple[Segment, int]] = []
        for segment in self.segments:
            if runs:
                first, count = runs[-1]
                offset = first.length * count
                if (segment.length, segment.start - first.start, segment.own_start - first.own_start) == (
                    first.length,
                    offset,
                    offset,
                ):
                    runs[-1] = (first, count + 1)
                    continue
            runs.append((segment, 1))
        return tuple(runs)

    # The methods below describe the same attention as variable-length calls, in the form of indices on a device. The
    # keys of such a call must lie back to back. The indices are built and moved on first use, and all layers of a
    # forward share them. The examples are for a prompt of 2 rows and responses of 1 and 2 rows.

    def whole_call(self, device: torch.device) -> VarlenCall:
        """One bottom-right causal call, in which every segment has its own copy of its prefix (``whole_copies``).

        Example: ``cu_seqlens_q == [0, 2, 3, 5]``, ``cu_seqlens_kv == [0, 2, 5, 9]``.
        """
        return self._placed("whole", device, self._plan_whole)

    def whole_copies(self, device: torch.device) -> RowCopies:
        """The key rows of ``whole_call``, and how to sum the gradients of a row's copies.

        Example: the rows are ``[0, 1, 0, 1, 2, 0, 1, 3, 4]``.
        """
        return self._placed("whole copies", device, self._plan_whole_copies)

    def own_call(self, device: torch.device) -> VarlenCall:
        """One causal call, in which every segment attends its own keys only.

        Example: ``cu_seqlens_q == cu_seqlens_kv == [0, 2, 3, 5]``.
        """
        return self._placed("own", device, self._plan_own)

    def prefix_call(self, device: torch.device) -> VarlenCall | None:
        """One dense call of the prefix blocks, which holds every prefix once; None if no segment has a prefix.

        Example: ``q_rows == [2, 3, 4]``, ``kv_rows == [0, 1]``.
        """
        return self._placed("prefix", device, self._plan_prefix) if self.prefix_blocks else None

    def own_and_prefix_copies(self, device: torch.device) -> RowCopies:
        """The key rows of ``own_call`` followed by those of ``prefix_call``."""
        return self._placed("own and prefix copies", device, self._plan_own_and_prefix_copies)

    def _placed(self, name: str, device: torch.device, make: Callable[[], Placed]) -> Placed:
        if (name, device) not in self._calls:
            self._calls[name, device] = make().to(device)
        return self._calls[name, device]

    def _plan_whole(self) -> VarlenCall:
        lengths = [segment.length for segment in self.segments]
        lengths_kv = [segment.prefix_length + segment.length for segment in self.segments]
        return VarlenCall.of_lengths(None, None, lengths, lengths_kv)

    def _plan_whole_copies(self) -> RowCopies:
        runs = [part for segment in self.segments for part in (segment.prefix, segment.own)]
        return RowCopies.of(runs, num_rows=self.num_keys)

    def _plan_own(self) -> VarlenCall:
        own, lengths = [segment.own for segment in self.segments], [segment.length for segment in self.segments]
        is_identity = own == [segment.rows for segment in self.segments] and self.num_keys == self.num_attending
        rows = None if is_identity else torch.cat([_rows(keys) for keys in own])
        return VarlenCall.of_lengths(None, rows, lengths, lengths)

    def _plan_own_and_prefix_copies(self) -> RowCopies:
        runs = [segment.own for segment in self.segments] + [keys for _, keys in self.prefix_blocks]
        return RowCopies.of(runs, num_rows=self.num_keys)

    def _plan_prefix(self) -> VarlenCall:
        queries, keys = ([_rows(block[i]) for block in self.prefix_blocks] for i in (0, 1))
        lengths_q, lengths_kv = ([len(part) for part in parts] for parts in (queries, keys))
        return VarlenCall.of_lengths(torch.cat(queries), torch.cat(keys), lengths_q, lengths_kv)


@dataclass(frozen=True)
class VarlenCall:
    """The query and key rows of one variable-length call; an index of None means all rows."""

    q_rows: Tensor | None
    kv_rows: Tensor | None
    """int64 [sum of key lengths]"""
    cu_seqlens_q: Tensor
    """int32 [segments + 1]"""
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    """Rounded up, as ``max_seqlen_kv`` is. Both are Python numbers, so that nobody has to read them from the device."""
    max_seqlen_kv: int

    @classmethod
    def of_lengths(
        cls, q_rows: Tensor | None, kv_rows: Tensor | None, lengths_q: Sequence[int], lengths_kv: Sequence[int]
    ) -> VarlenCall:
        """The call whose segments have these numbers of query and key rows; there must be at least one segment."""
        return cls(
            q_rows=q_rows,
            kv_rows=kv_rows,
            cu_seqlens_q=_cumulative(lengths_q),
            cu_seqlens_kv=_cumulative(lengths_kv),
            max_seqlen_q=_bucket(max(lengths_q)),
            max_seqlen_kv=_bucket(max(lengths_kv)),
        )

    def to(self, device: torch.device) -> VarlenCall:
        names = ("q_rows", "kv_rows", "cu_seqlens_q", "cu_seqlens_kv")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: send(value, device) for name, value in found.items()})


def _rows(rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _bucket(length: int) -> int:
    return -(-length // SEQLEN_BUCKET) * SEQLEN_BUCKET
