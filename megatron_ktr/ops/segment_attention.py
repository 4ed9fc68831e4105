"""Attention within independent segments: the vision encoder's windows and, in its full-attention blocks, its frames.

    runs on                how
    CUDA, half precision   one variable-length call of the flash kernel over all segments
    everything else        segments of equal length as one batch (most windows are of one size)

Neither builds a mask. ``SegmentPlan`` prepares the indices once for all layers of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ktr.ops.prefix_attention import check_heads
from megatron_ktr.ops.prefix_attention_kernels import can_flash_varlen
from megatron_ktr.ops.prefix_attention_plan import VarlenCall
from megatron_ktr.ops.prefix_attention_varlen import varlen_call
from megatron_ktr.transfer import send


@dataclass(frozen=True)
class SegmentBatches:
    """Segments grouped by their length.

    Example: the bounds 0 2 3 5 give ``lengths == (2, 1)``, ``rows == ([0, 1, 3, 4], [2])`` and
    ``order == [0, 1, 4, 2, 3]``.
    """

    lengths: tuple[int, ...]
    rows: tuple[Tensor, ...]
    """int64, one tensor per length: the rows of its segments, one segment after the other. The tuple is empty if there
    is only one length, because then it is all rows in order."""
    order: Tensor | None
    """int64 [S]: the index that puts the results back in order; None if there is only one length."""


@dataclass(frozen=True)
class SegmentPlan:
    """Segments ``[bounds[i], bounds[i + 1])`` of S rows; empty ones are allowed.

    Raises:
        ValueError: the bounds do not begin at 0, or they decrease.
    """

    bounds: tuple[int, ...]
    _calls: dict[torch.device, VarlenCall] = field(default_factory=dict, compare=False, repr=False)
    _batches: dict[torch.device, SegmentBatches] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.bounds or self.bounds[0] != 0 or min(self.lengths, default=0) < 0:
            raise ValueError(f"segments: bounds must rise from 0, got {list(self.bounds)}")

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def num_rows(self) -> int:
        return self.bounds[-1]

    def call(self, device: torch.device) -> VarlenCall:
        """All segments as one variable-length call; it is sent to ``device`` only once."""
        if device not in self._calls:
            self._calls[device] = VarlenCall.of_lengths(None, None, self.lengths, self.lengths).to(device)
        return self._calls[device]

    def batches(self, device: torch.device) -> SegmentBatches:
        """All segments grouped by length; the indices are sent to ``device`` only once."""
        if device not in self._batches:
            self._batches[device] = self._planned_batches(device)
        return self._batches[device]

    def _planned_batches(self, device: torch.device) -> SegmentBatches:
        starts_by_length: dict[int, list[int]] = {}
        for start, length in zip(self.bounds, self.lengths, strict=False):
            if length:
                starts_by_length.setdefault(length, []).append(start)
        lengths = tuple(starts_by_length)
        if len(lengths) < 2:
            return SegmentBatches(lengths, (), None)
        rows = [
            (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
            for length, starts in starts_by_length.items()
        ]
        order = torch.argsort(torch.cat(rows))
        return SegmentBatches(lengths, tuple(send(part, device) for part in rows), send(order, device))


def segment_attention(
    q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, *, segments: SegmentPlan, scale: float | None = None
) -> Tensor:
    """Every row attends to all rows of its own segment and to no other: block-diagonal attention without a mask.

    Args:
        q_SNH, k_SNH, v_SNH: [S, N, H]; keys and values may have fewer heads, as in ``prefix_attention``.
        segments: S must be ``segments.num_rows``.
        scale: factor on the scores; ``H ** -0.5`` when None.

    Returns:
        [S, N, H].

    Raises:
        ValueError: the numbers of rows or of heads do not fit together.
    """
    check_heads(q_SNH, k_SNH, v_SNH)
    if not len(q_SNH) == len(k_SNH) == segments.num_rows:
        raise ValueError(
            f"segment_attention: the segments have {segments.num_rows} rows, but there are {len(q_SNH)} queries and "
            f"{len(k_SNH)} keys"
        )
    if not segments.num_rows:
        return q_SNH[:0]
    if can_flash_varlen(q_SNH):
        given = q_SNH.shape[-1] ** -0.5 if scale is None else scale
        return varlen_call(q_SNH, k_SNH, v_SNH, call=segments.call(q_SNH.device), scale=given, is_causal=False)
    batches = segments.batches(q_SNH.device)
    if batches.order is None:  # all segments have one length, so the rows are in order and need no gather
        return _attend_batch(q_SNH, k_SNH, v_SNH, length=batches.lengths[0], scale=scale)
    outputs = [
        _attend_batch(q_SNH[rows], k_SNH[rows], v_SNH[rows], length=length, scale=scale)
        for length, rows in zip(batches.lengths, batches.rows, strict=True)
    ]
    return torch.cat(outputs).index_select(0, batches.order)


def _attend_batch(q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, *, length: int, scale: float | None) -> Tensor:
    """Consecutive segments of one ``length`` as a batch; S is a multiple of ``length``."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_SNH, k_SNH, v_SNH))
    out_BNLH = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q_SNH.shape[1] != k_SNH.shape[1])
    return out_BNLH.transpose(1, 2).flatten(0, 1)
