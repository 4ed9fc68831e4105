"""Plans context parallelism: which rows of a packed sequence each of c ranks keeps, and which keys they attend.

Every rank keeps some of the query rows. Before attention it gathers the keys and values of all rows
(``ops/key_exchange.py``). The rows are distributed as follows:

    prompt of a group   cut into 2c chunks; rank r keeps chunks r and 2c - 1 - r ("zig-zag": the work of causal
                        attention grows along the prompt, and the two chunks of every rank add up to the same work)
    responses           never cut; the longest first, each goes to the rank with the fewest response rows so far

This file only plans and does not communicate: every rank computes the shares of all ranks. The tests assert that

1. every row that is not padding lies on exactly one rank, and the layout's own padding lies on none;
2. all ranks keep the same number of rows ``num_rows``, a multiple of ``multiple`` (for sequence parallelism and FP8),
   with as few padding rows as possible; padding rows attend nothing, and no row attends them;
3. a rank's segments, in its own row order, attend exactly the keys that those rows attend in the whole layout;
4. a prompt's last row, which predicts the first token of every response, lies on rank 0;
5. the rank that predicts response token r depends only on the responses' lengths. It is therefore the same in every
   view of a micro-batch, and hidden rows of two views can be compared without moving them. (Balancing rows also nearly
   balances work: a response's work, rows * (model + prompt length + rows / 2), is nearly proportional to its rows.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_ktr.ops.prefix_attention_plan import AttentionPlan, Segment
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, PackedLayout


@dataclass(frozen=True)
class ContextShard:
    """One rank's share of a layout.

    Example: a prompt of 5 rows, responses of 1 and 2 rows, two ranks. The prompt's chunks are rows 0 | 1 | 2 | 3 4.
    Rank 0 keeps rows 0, 3, 4 and response 1 (row 5); rank 1 keeps rows 1, 2 and response 2 (rows 6, 7).
    """

    size: int
    rank: int
    num_rows: int
    """The number of rows on every rank, padding included."""
    rows: Tensor
    """int64: for each of this rank's rows except padding, its row in the packed sequence."""
    place: Tensor
    """int64 [rows of the layout without padding]: each row's place when the rows of all ranks are concatenated, which
    is ``owner * num_rows + local row``."""
    plan: AttentionPlan
    """How this rank's query rows attend the keys of the whole layout, which are in the layout's order, unpadded."""

    def take(self, batch: PackedBatch) -> LocalRows:
        """This rank's rows of ``batch``, on the batch's device.

        The host selects them, because on the device their number would have to be read back.
        """
        device, host = batch.token_ids_T.device, batch.on_host
        rows = send(self.rows, device)
        num_padding = self.num_rows - len(rows)
        visual_owner, visual_row = self._located(self.place[host.visual_rows])
        is_visual_here = visual_owner == self.rank
        owner_R, row_R = self._located(self.place[host.predicting_rows_R])
        return LocalRows(
            token_ids_T=_padded(batch.token_ids_T[rows], num_padding),
            position_ids_3T=_padded(batch.position_ids_3T[:, rows], num_padding),
            visual_rows=send(visual_row[is_visual_here], device),
            visual_index=send(is_visual_here.nonzero()[:, 0], device),
            predicting_rows_R=send(row_R[owner_R == self.rank], device),
        )

    def owners(self, batch: PackedBatch) -> Tensor:
        """int64 [R] in host memory: the rank that predicts each response token."""
        return self._located(self.place[batch.on_host.predicting_rows_R])[0]

    def _located(self, place: Tensor) -> tuple[Tensor, Tensor]:
        return place // self.num_rows, place % self.num_rows


@dataclass(frozen=True)
class LocalRows:
    """The part of a batch that the model reads on one context rank; T and R count this rank's rows."""

    token_ids_T: Tensor
    position_ids_3T: Tensor
    visual_rows: Tensor
    """int64: the local rows that receive vision features."""
    visual_index: Tensor | None
    """int64: for each of ``visual_rows``, the index of its feature in the batch's features; None: all, in order."""
    predicting_rows_R: Tensor
    """int64: the local rows that predict response tokens, in the order of the batch's response tokens."""

    @classmethod
    def whole(cls, batch: PackedBatch) -> LocalRows:
        """All rows of the batch, for a model without context parallelism."""
        rows = (batch.token_ids_T, batch.position_ids_3T, batch.visual_rows)
        return cls(*rows, visual_index=None, predicting_rows_R=batch.predicting_rows_R)


@lru_cache(maxsize=16)
def shard_layout(layout: PackedLayout, *, size: int, rank: int, multiple: int = 1) -> ContextShard:
    """The share of rank ``rank`` of ``size`` context ranks; ``num_rows`` becomes a multiple of ``multiple``."""
    if not 0 <= rank < size or multiple < 1:
        raise ValueError(f"expected 0 <= rank < size and multiple >= 1, got {rank=}, {size=}, {multiple=}")
    owner_of = _assign_responses([length for group in layout.groups for length in group.response_lengths], size=size)
    parts = [_segments(layout, owner_of, size=size, rank=index) for index in range(size)]
    rows = [_rows(segments) for segments in parts]
    num_rows = max(1, -(-max(len(kept) for kept in rows) // multiple)) * multiple
    num_real = layout.num_tokens - layout.num_padding
    place = torch.empty(num_real, dtype=torch.int64)
    for index, kept in enumerate(rows):
        place[kept] = index * num_rows + torch.arange(len(kept))
    plan = AttentionPlan(tuple(parts[rank]), num_keys=num_real, num_padding=num_rows - len(rows[rank]))
    return ContextShard(size=size, rank=rank, num_rows=num_rows, rows=rows[rank], place=place, plan=plan)


def _assign_responses(lengths: Sequence[int], *, size: int) -> list[int]:
    """The rank of each response: longest first, each goes to the rank with the fewest rows so far.

    Of several such ranks it is the last one, because rank 0 also predicts from the prompts' last rows.
    """
    loads = [0] * size
    owner_of = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        owner = min(range(size), key=lambda r: (loads[r], -r))
        owner_of[index] = owner
        loads[owner] += lengths[index]
    return owner_of


def _segments(layout: PackedLayout, owner_of: Sequence[int], *, size: int, rank: int) -> list[Segment]:
    """This rank's segments in the order of its rows: group by group, its two prompt chunks, then its responses."""
    segments: list[Segment] = []
    start = response = 0

    def add(first_key: int, length: int, prefix_start: int, prefix_length: int) -> None:
        nonlocal start
        if length:
            segments.append(Segment(start, length, first_key, prefix_start, prefix_length))
            start += length

    for group in layout.groups:
        bounds = [chunk * group.prompt_length // (2 * size) for chunk in range(2 * size + 1)]
        for chunk in (rank, 2 * size - 1 - rank):
            begin, end = bounds[chunk], bounds[chunk + 1]
            add(group.start + begin, end - begin, group.start, begin)
        first_key = group.start + group.prompt_length
        for length in group.response_lengths:
            if owner_of[response] == rank:
                add(first_key, length, group.start, group.prompt_length)
            first_key += length
            response += 1
    return segments


def _rows(segments: Sequence[Segment]) -> Tensor:
    parts = [torch.arange(segment.own.start, segment.own.stop) for segment in segments]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _padded(values: Tensor, num_padding: int) -> Tensor:
    """Appends zeros along the last axis: padding is token 0 at position 0, which is computed and never read."""
    return torch.nn.functional.pad(values, (0, num_padding))
