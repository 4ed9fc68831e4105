"""Rollout groups around tiny media, and a media spec whose positions and patches can be worked out by hand."""

from __future__ import annotations

import dataclasses

import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput

IMAGE, VIDEO, START, END = 92, 93, 94, 95


def count_positions(token_ids, *, grid_thw, kinds, seconds_per_grid):
    """The rule of M-RoPE by hand: one token per second in time, merge 2."""
    rows, next_position, row, media = [], 0, 0, list(zip(grid_thw, kinds, seconds_per_grid, strict=True))
    while row < len(token_ids):
        if token_ids[row] not in (IMAGE, VIDEO):
            rows.append([next_position] * 3)
            next_position, row = next_position + 1, row + 1
            continue
        (t, h, w), kind, seconds = media.pop(0)
        scale = seconds if kind == "video" else 0
        cells = [
            [next_position + int(i * scale), next_position + j, next_position + k]
            for i in range(t)
            for j in range(h // 2)
            for k in range(w // 2)
        ]
        rows += cells
        next_position, row = max(map(max, cells)) + 1, row + len(cells)
    assert not media
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T, next_position


def name_frames(frames_FCHW, visual):
    """Patches that carry the value of the two frames they were made of: order becomes visible."""
    frames = frames_FCHW if len(frames_FCHW) % 2 == 0 else torch.cat([frames_FCHW, frames_FCHW[-1:]])
    t, h, w = visual.grid_thw
    pairs = frames[:, 0, 0, 0].float().reshape(-1, 2)
    assert len(pairs) == t
    return pairs.repeat_interleave(h * w, dim=0)


MEDIA = MediaSpec(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    positions=count_positions,
    patchify=name_frames,
)


def video(num_frames=4, height=2, width=4, *, kind="video", seconds=1.0):
    frames = torch.arange(1, num_frames + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width)
    grid = (-(-num_frames // 2), height, width) if kind == "video" else (1, height, width)
    return VisualInput(
        kind=kind, frames_FCHW=frames, grid_thw=grid, seconds_per_grid=seconds if kind == "video" else 0.0
    )


def image(height=2, width=2):
    return dataclasses.replace(video(1, height, width, kind="image"), grid_thw=(1, height, width))


def group_of(*parts, responses, problem_id="p"):
    """``parts`` are token ids and media, in order."""
    tokens, media = [], []
    for part in parts:
        if isinstance(part, VisualInput):
            media.append(part)
            tokens += [START, *[MEDIA.token_id(part)] * MEDIA.num_visual_tokens(part), END]
        else:
            tokens.append(part)
    return RolloutGroup(
        prompt=Prompt(problem_id=problem_id, token_ids=tuple(tokens), media=tuple(media)),
        rollouts=tuple(Rollout(token_ids=tuple(response)) for response in responses),
    )
