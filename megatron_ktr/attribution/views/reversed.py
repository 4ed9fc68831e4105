"""The view ``reversed``: every video runs backwards.

It applies to the prompts that can be shuffled, except those whose videos are their own mirror image. The order is not
random, so there is one draw. ``shuffle_unit`` is that of the shuffled view: with ``frame`` the last frame comes first,
with ``temporal_patch`` the last pair of frames does, and the frames inside a pair keep their order. An odd number of
frames is filled up by repeating the last one, before the pairs move; the last frame of such a video then stands twice
at the beginning.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_ktr.attribution.views.base import CounterfactualView, Encoded, ViewDraw
from megatron_ktr.types import Prompt, VisualInput

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


class Reversed(CounterfactualView):
    name = "reversed"
    is_random = False
    needs = "video"
    own_options = ("shuffle_unit",)

    def applies(self, prompt: Prompt) -> bool:
        return any(_changes(medium) for medium in prompt.media)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        size = draw.sizes.temporal_patch_size if draw.options.shuffle_unit == "temporal_patch" else 1
        return tuple(
            dataclasses.replace(medium, frames_FCHW=_backwards(medium.frames_FCHW, size))
            if _changes(medium)
            else medium
            for medium in prompt.media
        )

    def shows_intact_patches(self, prompt: Prompt, options: ObjectiveSection) -> bool:
        return options.shuffle_unit == "temporal_patch" or any(medium.kind == "image" for medium in prompt.media)

    def encodes(self, options: ObjectiveSection) -> Encoded:
        return "videos" if options.shuffle_unit == "frame" else "nothing"


def _backwards(frames_FCHW: Tensor, unit: int) -> Tensor:
    """The runs of ``unit`` frames in reverse order; a last incomplete run is filled up with the last frame."""
    num_frames = len(frames_FCHW)
    places = torch.arange(-(-num_frames // unit)).flip(0)[:, None] * unit + torch.arange(unit)
    return frames_FCHW[places.flatten().clamp(max=num_frames - 1)]


def _changes(medium: VisualInput) -> bool:
    """Whether the medium is a video that differs from itself run backwards, by frames and also by temporal patches.

    ``shuffle_unit`` needs only one of the two, but prompts are asked without knowing it.
    """
    frames_FCHW, num_patches = medium.frames_FCHW, medium.grid_thw[0]
    if medium.kind != "video" or num_patches < 2:
        return False
    size = -(-len(frames_FCHW) // num_patches)
    padded_FCHW = _backwards(_backwards(frames_FCHW, size), size) if len(frames_FCHW) % size else frames_FCHW
    return not any(torch.equal(_backwards(padded_FCHW, unit), padded_FCHW) for unit in (1, size))


REVERSED = Reversed()
