"""The fixed prompts on which sampler and trainer are compared. Each prompt adds one thing that can go wrong.

    TEXT      no media                                             weights, temperature
    IMAGE     one image                                            vision encoder, pixels
    PATCH     two frames: one temporal patch                       pixels of videos
    VIDEO     several temporal patches of 1 s, wider than long     grid
    TIMING    the same frames, another 1.5 s per temporal patch    seconds
    LONG      longer in time than wide                             where text goes on after a video
    SIZED     frames as large as the run's own                     resizing, limits

The first prompt on which they differ tells which part is wrong (``rollout/check/sampler.py``). Frames are seeded noise,
so that any flip and any other order of frames or channels changes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.template import PromptBuilder
from megatron_ktr.types import Prompt, VisualInput

TEXT, IMAGE, PATCH, VIDEO, TIMING, LONG, SIZED = (
    "text",
    "image",
    "video of one temporal patch",
    "video of 1 s per temporal patch",
    "video of 1.5 s per temporal patch",
    "video longer than wide",
    "video of the run's size",
)
"""The names of the prompts, in the order in which they are compared."""
QUESTIONS = ("What comes first, and what comes last? Answer with a few words.", "Why?")
"""The questions of the prompts. The second is used where a prompt with the first would be too long."""


def probe_prompts(
    builder: PromptBuilder,
    *,
    media: MediaSpec,
    video_max_pixels: int,
    max_prompt_length: int | None = None,
    seconds_per_grid: float | None = None,
) -> dict[str, Prompt]:
    """The prompts by name, in order, with a question that fits; without those that no question makes as short as
    ``max_prompt_length``: the run would reject such prompts, and an engine may have no room for them.

    ``seconds_per_grid`` replaces every video's own, as ``original_compat`` does for the run's videos; TIMING, which
    then has nothing to tell, is left out.

    The question goes through the model's chat format, not through the run's wording template, which may ask for fields
    that no made-up record has.
    """
    unit = media.patch_size * media.merge_size
    patch = media.temporal_patch_size
    height, width = _run_size(video_max_pixels, unit=unit)
    several = _medium("video", media, num_frames=3 * patch, height=2 * unit, width=8 * unit, seconds=1.0)
    found = {
        TEXT: (),
        IMAGE: (_medium("image", media, num_frames=1, height=2 * unit, width=3 * unit),),
        PATCH: (_medium("video", media, num_frames=patch, height=2 * unit, width=3 * unit, seconds=1.0),),
        VIDEO: (several,),
        TIMING: (_medium("video", media, num_frames=3 * patch, height=2 * unit, width=8 * unit, seconds=1.5),),
        LONG: (_medium("video", media, num_frames=7 * patch, height=unit, width=2 * unit, seconds=2.5),),
        SIZED: (_medium("video", media, num_frames=2 * patch, height=height, width=width, seconds=0.5),),
    }
    if seconds_per_grid is not None:
        del found[TIMING]
        found = {name: tuple(_timed(medium, seconds_per_grid) for medium in visuals) for name, visuals in found.items()}
    prompts = {}
    for name, visuals in found.items():
        choices = (_prompt(builder, name, visuals, question=question) for question in QUESTIONS)
        fitting = (p for p in choices if max_prompt_length is None or len(p.token_ids) <= max_prompt_length)
        if (prompt := next(fitting, None)) is not None:
            prompts[name] = prompt
    return prompts


def _prompt(builder: PromptBuilder, name: str, visuals: Sequence[VisualInput], *, question: str) -> Prompt:
    content = [*({"type": visual.kind} for visual in visuals), {"type": "text", "text": question}]
    record = {"problem_id": f"sampler check: {name}", "messages": [{"role": "user", "content": content}]}
    return builder.build(record, visuals)


def _medium(
    kind: Literal["image", "video"],
    media: MediaSpec,
    *,
    num_frames: int,
    height: int,
    width: int,
    seconds: float = 0.0,
) -> VisualInput:
    generator = torch.Generator().manual_seed(num_frames + height)
    frames_FCHW = torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)
    num_t = -(-num_frames // media.temporal_patch_size)
    grid_thw = (num_t, height // media.patch_size, width // media.patch_size)
    return VisualInput(kind, frames_FCHW, grid_thw, seconds_per_grid=seconds, source="sampler check")


def _timed(medium: VisualInput, seconds: float) -> VisualInput:
    return dataclasses.replace(medium, seconds_per_grid=seconds) if medium.kind == "video" else medium


def _run_size(max_pixels: int, *, unit: int) -> tuple[int, int]:
    """(height, width) in about the ratio 3 : 4 with an area of about ``max_pixels``, both in multiples of ``unit``."""
    num_units = max(1, max_pixels // unit**2)
    rows = max(1, math.isqrt(num_units * 3 // 4))
    return rows * unit, num_units // rows * unit
