"""M-RoPE positions: the (time, height, width) triple of every token, computed here and nowhere else.

The rule is the one the sampler (vLLM) and transformers 4.49 follow, which the published weights were trained
with. With ``m = 1 + the largest position so far on any axis`` (0 at the start):

- text: the i-th token of a run has position m + i on all three axes;
- an image or video of (t, h, w) merged tokens: token (i, j, k) has positions
  (m + floor(i * seconds_per_grid * tokens_per_second), m + j, m + k); an image's i is 0.

transformers 5.16 and later continue after a medium at ``m + max(h, w)`` and ignore its temporal extent. That
differs as soon as a video lasts longer than it is wide, and moves log-probabilities by whole nats; so
Hugging Face models always receive explicit ``position_ids`` from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.types import MEDIA_KINDS, MediaKind
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


def mrope_positions(
    token_ids: Sequence[int] | Tensor,
    *,
    grid_thw: Sequence[Sequence[int]],
    kinds: Sequence[MediaKind],
    seconds_per_grid: Sequence[float],
    config: Qwen2_5_VLConfig,
) -> tuple[Tensor, int]:
    """The positions of a prompt's tokens, and the position of the first token after the prompt.

    Args:
        token_ids: the prompt with every visual placeholder expanded: a medium of n visual tokens is a run of
            n times its placeholder id. Two media may stand back to back.
        grid_thw: patches along time, height and width of each medium, before merging, in order of occurrence.
        kinds: "image" or "video" for each medium.
        seconds_per_grid: seconds between two temporal patches of each medium; ignored for images.

    Returns:
        ``position_ids`` int64 [3, T] and ``next_position``: token i of a response has
        ``next_position + i`` on all three axes.

    Raises:
        UserError: placeholders and media disagree in number, kind or length.
    """
    tokens_T = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    if not len(grid_thw) == len(kinds) == len(seconds_per_grid):
        raise UserError(
            f"expected one grid, kind and seconds_per_grid per medium, got {len(grid_thw)} grids, {len(kinds)} kinds "
            f"and {len(seconds_per_grid)} seconds_per_grid"
        )
    is_placeholder_T = (tokens_T == config.image_token_id) | (tokens_T == config.video_token_id)
    parts: list[np.ndarray] = []
    row = next_position = 0
    for index, (grid, kind, seconds) in enumerate(zip(grid_thw, kinds, seconds_per_grid, strict=True)):
        start = row + _first_true(is_placeholder_T[row:])
        medium_3n = _medium_positions(grid, kind=kind, seconds_per_grid=seconds, config=config, index=index)
        end = start + medium_3n.shape[1]
        _check_run(tokens_T, start=start, end=end, kind=kind, grid=grid, index=index, config=config)
        parts.append(_text_positions(start - row) + next_position)
        next_position += start - row
        parts.append(medium_3n + next_position)
        next_position = int(parts[-1].max()) + 1
        row = end
    if is_placeholder_T[row:].any():
        raise UserError(
            f"the prompt has {int(is_placeholder_T[row:].sum())} visual tokens more than its {len(grid_thw)} media"
        )
    parts.append(_text_positions(len(tokens_T) - row) + next_position)
    next_position += len(tokens_T) - row
    return torch.from_numpy(np.concatenate(parts, axis=1)), next_position


def _first_true(is_true: np.ndarray) -> int:
    """Index of the first True, or the length where there is none."""
    return int(is_true.argmax()) if is_true.any() else len(is_true)


def _text_positions(length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length, dtype=np.int64), (3, length))


def _medium_positions(
    grid: Sequence[int], *, kind: str, seconds_per_grid: float, config: Qwen2_5_VLConfig, index: int
) -> np.ndarray:
    """Positions [3, tokens] of one medium, counted from 0."""
    merge = config.vision.spatial_merge_size
    num_t, num_h, num_w = (int(size) for size in grid)
    if kind not in MEDIA_KINDS:
        raise UserError(f"medium {index}: expected kind 'image' or 'video', got {kind!r}")
    if min(num_t, num_h, num_w) < 1 or num_h % merge or num_w % merge or (kind == "image" and num_t != 1):
        raise UserError(
            f"medium {index}: grid {(num_t, num_h, num_w)} is not valid for an {kind}: height and width must be "
            f"positive multiples of {merge} patches, and an image has one temporal patch"
        )
    positions = np.indices((num_t, num_h // merge, num_w // merge), dtype=np.int64)
    if kind == "video":
        # The sampler holds the seconds in fp32 and multiplies in fp64, so we do the same. Any other precision can move
        # a position by one where the product is close to an integer (0.1 s in fp32 is a little more than 0.1).
        interval = float(np.float32(seconds_per_grid)) * config.vision.tokens_per_second
        if not interval > 0 and num_t > 1:
            raise UserError(f"medium {index}: a video needs seconds_per_grid > 0, got {seconds_per_grid}")
        positions[0] = (positions[0] * interval).astype(np.int64)
    return positions.reshape(3, -1)


def _check_run(
    tokens_T: np.ndarray, *, start: int, end: int, kind: str, grid: Sequence[int], index: int, config: Qwen2_5_VLConfig
) -> None:
    token = config.image_token_id if kind == "image" else config.video_token_id
    found = int((tokens_T[start:end] == token).sum())
    if found != end - start:
        raise UserError(
            f"medium {index}: an {kind} with grid {tuple(int(size) for size in grid)} needs {end - start} consecutive "
            f"tokens of id {token} in the prompt, found {found} from position {start}"
        )
