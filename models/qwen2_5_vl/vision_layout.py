"""Order, attention segments and rotary angles of the vision encoder's patches: index planning, no weights.

Words: a *patch* is one encoder token; a *unit* is the merge x merge square of patches that becomes one visual
token; a *frame* is one temporal patch of a video, or an image; a *window* is a square of ``window_side`` units of
one frame, cut off at the right and bottom edges.

Patches arrive unit by unit (time, unit row, unit column, then row and column inside the unit). The encoder works
in *window order*: units sorted by window, row-major inside each, so that a window is a contiguous segment. Frames
stay contiguous too, because no window spans two of them.

Invariants, asserted by the tests: ``unit_order`` and ``unit_position`` are inverse permutations; both segmentations
start at 0, end at the number of patches and have no empty segment; every window segment lies in one frame segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_ktr.ops.segment_attention import SegmentPlan
from megatron_ktr.transfer import send
from models.qwen2_5_vl.config import VisionConfig


@dataclass(frozen=True)
class VisionLayout:
    """Plan for the S patches of all media of a micro-batch.

    Example: one image of 4 x 6 patches, merge 2, windows of 2 units a side: units 0..5 lie in rows of 3, window 0
    holds units 0, 1, 3, 4 and window 1 the cut-off column 2, 5. So ``unit_order == [0, 1, 3, 4, 2, 5]``,
    ``unit_position == [0, 1, 4, 2, 3, 5]``, ``window_bounds == [0, 16, 24]`` and ``frame_bounds == [0, 24]``.
    """

    unit_order: Tensor
    """int64 [S / merge_unit]: unit at each place of the window order."""
    unit_position: Tensor
    """int64 [S / merge_unit]: place of each unit in the window order; undoes ``unit_order``."""
    window_bounds: Tensor
    """int32 [windows + 1]: cumulative patches, in host memory."""
    frame_bounds: Tensor
    """int32 [frames + 1]: cumulative patches, in host memory."""
    cos_SH: Tensor
    """float32 [S, head size], in window order."""
    sin_SH: Tensor
    full_attention_layers: frozenset[int]
    """0-based layers that attend over frames; all others attend over windows."""

    def segments(self, layer: int) -> SegmentPlan:
        """The segments within which 0-based ``layer`` attends; all layers of a kind share one plan."""
        return self._frames if layer in self.full_attention_layers else self._windows

    @cached_property
    def _windows(self) -> SegmentPlan:
        return SegmentPlan(tuple(self.window_bounds.tolist()))

    @cached_property
    def _frames(self) -> SegmentPlan:
        return SegmentPlan(tuple(self.frame_bounds.tolist()))

    def to(self, device: torch.device) -> VisionLayout:
        """Sends the tensors that the device needs; the bounds stay in host memory, where they are read as numbers."""
        names = ("unit_order", "unit_position", "cos_SH", "sin_SH")
        return dataclasses.replace(self, **{name: send(getattr(self, name), device) for name in names})


def plan_vision(grid_thw: Sequence[Sequence[int]], *, config: VisionConfig) -> VisionLayout:
    """Plans the encoder's work on media of these grids (patches along time, height and width), in order.

    Raises:
        ValueError: an empty grid, or a height or width that is no multiple of the merge size.
    """
    merge, side = config.spatial_merge_size, config.window_side
    windows, positions, frame_lengths = [], [], []
    num_windows = 0
    for num_t, num_h, num_w in grid_thw:
        if min(num_t, num_h, num_w) < 1 or num_h % merge or num_w % merge:
            raise ValueError(
                f"vision grid {(num_t, num_h, num_w)}: expected positive sizes, height and width multiples of {merge}"
            )
        unit_t, unit_y, unit_x = torch.meshgrid(
            torch.arange(num_t), torch.arange(num_h // merge), torch.arange(num_w // merge), indexing="ij"
        )
        windows_y, windows_x = -(-num_h // (merge * side)), -(-num_w // (merge * side))
        window = (unit_t * windows_y + unit_y // side) * windows_x + unit_x // side
        windows.append(window.flatten() + num_windows)
        num_windows += num_t * windows_y * windows_x
        positions.append(_patch_positions(unit_y.flatten(), unit_x.flatten(), merge=merge))
        frame_lengths += [num_h * num_w] * num_t
    window_of_unit = torch.cat(windows)
    unit_order = torch.argsort(window_of_unit, stable=True)
    # A unit's patches keep their order and move together.
    angles_SH = _rotary_angles(torch.cat(positions)[unit_order].flatten(0, 1), config=config)
    return VisionLayout(
        unit_order=unit_order,
        unit_position=torch.argsort(unit_order),
        window_bounds=_cumulative(torch.bincount(window_of_unit) * config.merge_unit),
        frame_bounds=_cumulative(torch.tensor(frame_lengths)),
        cos_SH=angles_SH.cos(),
        sin_SH=angles_SH.sin(),
        full_attention_layers=frozenset(config.fullatt_block_indexes),
    )


def _patch_positions(unit_y: Tensor, unit_x: Tensor, *, merge: int) -> Tensor:
    """Row and column of every patch of every unit: int64 [units, merge * merge, 2]."""
    inner_y, inner_x = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    rows = unit_y[:, None] * merge + inner_y.flatten()
    columns = unit_x[:, None] * merge + inner_x.flatten()
    return torch.stack([rows, columns], dim=-1)


def _rotary_angles(positions_S2: Tensor, *, config: VisionConfig) -> Tensor:
    """Angles [S, head size] in fp32: a quarter of the head turns with the row, a quarter with the column, and the
    second half of the head repeats the first (it holds the partners of the rotated pairs)."""
    half = config.head_size // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = (positions_S2[:, :, None].float() * frequencies).flatten(1)
    return torch.cat([angles, angles], dim=-1)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
