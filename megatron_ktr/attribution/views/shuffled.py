"""The view ``shuffled``: the frames of every video in a random order (``attribution/counterfactuals.py``).

It applies to prompts with a video that has an order to lose. ``shuffle_unit: frame`` makes new pairs of frames, which
the encoder must see; ``temporal_patch`` moves whole pairs, whose features are only put into another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.counterfactuals import can_shuffle, draw_permutations, shuffle_frames
from megatron_ktr.attribution.views.base import CounterfactualView, Encoded, ViewDraw
from megatron_ktr.types import Prompt, VisualInput

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


class Shuffled(CounterfactualView):
    name = "shuffled"
    needs = "video"
    own_options = ("shuffle_unit",)

    def applies(self, prompt: Prompt) -> bool:
        return can_shuffle(prompt)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        orders = draw_permutations(
            prompt,
            unit=draw.options.shuffle_unit,
            seed=draw.seed,
            step=draw.step,
            draw=draw.draw,
            temporal_patch_size=draw.sizes.temporal_patch_size,
        )
        pairs = zip(prompt.media, orders, strict=True)
        return tuple(medium if order is None else shuffle_frames(medium, order) for medium, order in pairs)

    def shows_intact_patches(self, prompt: Prompt, options: ObjectiveSection) -> bool:
        """A temporal patch that moves as a whole stays what it is, and so does an image (one patch) beside a video."""
        return options.shuffle_unit == "temporal_patch" or any(medium.kind == "image" for medium in prompt.media)

    def encodes(self, options: ObjectiveSection) -> Encoded:
        return "videos" if options.shuffle_unit == "frame" else "nothing"


SHUFFLED = Shuffled()
