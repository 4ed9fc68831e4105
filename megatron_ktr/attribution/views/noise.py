"""The view ``noise``: Gaussian noise on every pixel.

    x' = x + noise_std * n,    n ~ N(0, 1),    x the normalised pixel, (value / 255 - mean) / std of its channel

The noise is independent over pixels, channels and frames (also the two frames of a temporal patch). The sum is neither
rounded nor clipped, so the frames of this view are fp32 numbers in units of pixel values. 1 is one standard deviation
of natural pictures in each channel.

The rows are those of the intact view, and the encoder runs over all media again, once for each draw. Drawing the noise
is work of the host, about 10 ns for each channel of a pixel.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_ktr.attribution.views.base import CounterfactualView, ViewDraw, generator_of
from megatron_ktr.types import Prompt, VisualInput


class Noise(CounterfactualView):
    name = "noise"
    own_options = ("noise_std",)

    def applies(self, prompt: Prompt) -> bool:
        return bool(prompt.media)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        scale_C11 = draw.options.noise_std * draw.sizes.pixels_per_unit_C[:, None, None]
        noisy = []
        for index, medium in enumerate(prompt.media):
            generator = generator_of(self.name, prompt, draw, medium=index)
            noise_FCHW = torch.randn(medium.frames_FCHW.shape, generator=generator)
            noisy.append(dataclasses.replace(medium, frames_FCHW=medium.frames_FCHW.float() + noise_FCHW * scale_C11))
        return tuple(noisy)


NOISE = Noise()
