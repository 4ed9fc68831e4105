"""The view ``patches``: a random part of every picture is black (VPPO, arXiv 2510.09285, blackens patches of images).

Of the n units of a medium, round(``patch_share`` x n), but at least one, are black in all channels; which ones is
uniformly random without replacement, over the whole medium. ``patch_unit: merged`` takes squares of merge x merge
patches, each the area of one visual token (28 x 28 pixels). ``vit`` takes single patches of the encoder (14 x 14).
In a video a unit spans the frames of its temporal patch: all frames of one visual token are black, or none is. Units of
different temporal patches are drawn independently, so a place may be black at one time and seen at another.

VPPO's release differs: it blackens each patch with probability 0.5, so that the share varies; it draws a mask for each
response; its patches need not coincide with those of the encoder; and it leaves videos as they are.

The rows are those of the intact view, and the encoder runs over all media again, once for each draw.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_ktr.attribution.views.base import CounterfactualView, ViewDraw, generator_of
from megatron_ktr.types import Prompt, VisualInput


class Patches(CounterfactualView):
    name = "patches"
    own_options = ("patch_share", "patch_unit")

    def applies(self, prompt: Prompt) -> bool:
        """A medium that is black already does not change."""
        return any(bool(medium.frames_FCHW.any()) for medium in prompt.media)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        return tuple(self._blackened(prompt, index, draw) for index in range(len(prompt.media)))

    def _blackened(self, prompt: Prompt, index: int, draw: ViewDraw) -> VisualInput:
        medium, sizes = prompt.media[index], draw.sizes
        num_t, *sides = medium.grid_thw
        merge = sizes.merge_size if draw.options.patch_unit == "merged" else 1
        num_h, num_w = (side // merge for side in sides)
        num_units = num_t * num_h * num_w
        num_black = max(1, round(draw.options.patch_share * num_units))
        generator = generator_of(self.name, prompt, draw, medium=index)
        is_black = torch.zeros(num_units, dtype=torch.bool)
        is_black[torch.randperm(num_units, generator=generator)[:num_black]] = True
        pixels = merge * sizes.patch_size
        is_black = is_black.reshape(num_t, num_h, num_w)
        for dim, times in enumerate((sizes.temporal_patch_size, pixels, pixels)):
            is_black = is_black.repeat_interleave(times, dim)
        # An image, and a last incomplete temporal patch, have fewer frames than the grid has room for.
        is_black_F1HW = is_black[: len(medium.frames_FCHW), None]
        return dataclasses.replace(medium, frames_FCHW=medium.frames_FCHW.masked_fill(is_black_F1HW, 0))


PATCHES = Patches()
