"""Which rows attend which: packed attention as a list of segments, on one rank or on one of several context ranks.

A segment is a run of query rows that sees a prefix of keys as a whole and its own keys causally:

    row i of a segment attends  keys[prefix_start : prefix_start + prefix_length]  and  keys[own_start : own_start + i]

                                            prefix                 own
    a whole prompt                          nothing                the prompt
    rows a .. b of a prompt                 prompt rows 0 .. a     prompt rows a .. b
    a response                              the whole prompt       the response

So one process and a context-parallel rank that holds some of the query rows and all keys differ in the list alone.

Invariants (the tests assert them): segments tile the query rows from 0 on, in order, without gaps; none is empty;
padding rows follow them and attend nothing: their output is zero, and nobody attends them. ``prefix_blocks`` joins
neighbouring segments with the same prefix: all responses of a group read the prompt's keys as one dense block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_ktr.types import PackedLayout

SEQLEN_BUCKET = 128
"""Maximum lengths are rounded up to this: fused kernels cache a plan per maximum length."""


@dataclass(frozen=True)
class Segment:
    """``length`` query rows from ``start`` on, and what they attend (see the module)."""

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
    _varlen: dict[torch.device, VarlenPlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_layout(cls, layout: PackedLayout) -> AttentionPlan:
        """All rows on one rank: the plain meaning of ``PackedLayout``. Key rows are the layout's rows."""
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
        """Query rows that are not padding."""
        return self.segments[-1].rows.stop if self.segments else 0

    @property
    def num_queries(self) -> int:
        return self.num_attending + self.num_padding

    @cached_property
    def prefix_blocks(self) -> tuple[tuple[slice, slice], ...]:
        """(query rows, key rows) of every prefix that is not empty, each dense: no mask inside."""
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
        """Neighbouring segments of one length whose own keys are neighbours too: (the first, how many)."""
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

    def varlen(self, device: torch.device) -> VarlenPlan:
        """Built and moved on first use: all layers of a forward share it."""
        if device not in self._varlen:
            self._varlen[device] = plan_varlen(self).to(device)
        return self._varlen[device]


@dataclass(frozen=True)
class VarlenPlan:
    """The same attention as variable-length calls, whose keys must lie back to back, as indices on a device.

    ``whole``: one bottom-right causal call, every segment with its own copy of its prefix. Example: prompt 2,
    responses 1 and 2: ``whole.kv_rows == [0, 1, 0, 1, 2, 0, 1, 3, 4]``, ``whole.cu_seqlens_q == [0, 2, 3, 5]``,
    ``whole.cu_seqlens_kv == [0, 2, 5, 9]``. ``own`` (causal) and ``prefix`` (dense) are the two calls that read every
    prefix once; ``prefix`` is None where no segment has one.
    """

    whole: VarlenCall
    own: VarlenCall
    prefix: VarlenCall | None

    def to(self, device: torch.device) -> VarlenPlan:
        prefix = None if self.prefix is None else self.prefix.to(device)
        return VarlenPlan(self.whole.to(device), self.own.to(device), prefix)


@dataclass(frozen=True)
class VarlenCall:
    """Query and key rows of one variable-length call; all of them where the index is None."""

    q_rows: Tensor | None
    kv_rows: Tensor | None
    """int64 [sum of key lengths]"""
    cu_seqlens_q: Tensor
    """int32 [calls + 1]"""
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    """Rounded up, like the next; as host numbers, so that nobody has to ask the device."""
    max_seqlen_kv: int

    def to(self, device: torch.device) -> VarlenCall:
        names = ("q_rows", "kv_rows", "cu_seqlens_q", "cu_seqlens_kv")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in found.items()})


def plan_varlen(plan: AttentionPlan) -> VarlenPlan:
    """The variable-length calls of a plan, on the host; queries are the attending rows, padding left out."""
    segments, blocks = plan.segments, plan.prefix_blocks
    own = [segment.own for segment in segments]
    whole = [torch.cat([_rows(segment.prefix), _rows(segment.own)]) for segment in segments]
    rows = [segment.rows for segment in segments]
    prefix = None
    if blocks:
        queries, keys = ([_rows(block[i]) for block in blocks] for i in (0, 1))
        prefix = _call(torch.cat(queries), torch.cat(keys), [len(q) for q in queries], [len(k) for k in keys])
    lengths = [segment.length for segment in segments]
    own_rows = None if own == rows and plan.num_keys == plan.num_attending else torch.cat([_rows(s) for s in own])
    return VarlenPlan(
        whole=_call(None, torch.cat(whole), lengths, [len(k) for k in whole]),
        own=_call(None, own_rows, lengths, lengths),
        prefix=prefix,
    )


def _call(
    q_rows: Tensor | None, kv_rows: Tensor | None, lengths_q: Sequence[int], lengths_kv: Sequence[int]
) -> VarlenCall:
    return VarlenCall(
        q_rows=q_rows,
        kv_rows=kv_rows,
        cu_seqlens_q=_cumulative(lengths_q),
        cu_seqlens_kv=_cumulative(lengths_kv),
        max_seqlen_q=_bucket(max(lengths_q)),
        max_seqlen_kv=_bucket(max(lengths_kv)),
    )


def _rows(rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _bucket(length: int) -> int:
    return -(-length // SEQLEN_BUCKET) * SEQLEN_BUCKET
