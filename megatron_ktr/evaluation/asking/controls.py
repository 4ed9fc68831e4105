"""What a control does to the media of a question (``item.Control``). Positions and lengths do not change, except that a
hidden medium is not there.

shuffled   the order of a video's frames is drawn by ``attribution.draw_permutations`` from the seed and the question's
           identity, and is never the order it had. Images, videos of one temporal patch and videos whose frames are all
           alike have no order to lose.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_ktr.attribution.counterfactuals import draw_permutations, shuffle_frames
from megatron_ktr.evaluation.item import Control
from megatron_ktr.types import Prompt


def apply_control(prompt: Prompt, control: Control, *, seed: int = 0) -> Prompt:
    """The same question with its media as ``control`` shows them.

    Raises:
        ValueError: the media of a tokenised prompt are to be hidden, in whose tokens they have places.
    """
    if control == "intact":
        return prompt
    if control == "hidden":
        if prompt.token_ids:
            raise ValueError("a prompt is hidden before it is tokenised")
        return dataclasses.replace(prompt, media=())
    if control == "blank":
        media = tuple(
            dataclasses.replace(medium, frames_FCHW=torch.zeros_like(medium.frames_FCHW)) for medium in prompt.media
        )
        return dataclasses.replace(prompt, media=media)
    orders = draw_permutations(prompt, seed=seed, step=0)
    media = tuple(
        medium if order is None else shuffle_frames(medium, order)
        for medium, order in zip(prompt.media, orders, strict=True)
    )
    return dataclasses.replace(prompt, media=media)


def is_felt(original: Prompt, shown: Prompt) -> bool:
    """Whether a control changed anything: with it, the difference between the two accuracies has a meaning."""
    return len(original.media) != len(shown.media) or any(
        not torch.equal(before.frames_FCHW, after.frames_FCHW)
        for before, after in zip(original.media, shown.media, strict=True)
    )
