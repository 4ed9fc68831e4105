"""Video-KTR's two counterfactual inputs: where they exist, and the random orders of frames.

The hidden view (``views/hidden.py``): the visual tokens are removed from the prompt, and the forward runs over text
alone (``batch/packing.py``). Every prompt with media has this view.

The shuffled view (``views/shuffled.py``): the units of each video change places. The unit is either a ``frame`` or a
``temporal_patch``. Frames are moved before they are paired into temporal patches; this is the authors' choice and the
default. A temporal patch is such a pair and moves as a whole, so that the vision features are only re-ordered. Some
media have no order to lose: images, videos of a single temporal patch, and videos whose frames are all alike.

One order is drawn per prompt and step, and all G responses share it: their scores are compared with one another, so
they must refer to the same counterfactual. The order depends only on the seed, the step and the prompt's identity
(``types.Prompt``). It does not depend on the rank or the micro-batch of the prompt, so that every parallel layout sees
the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from megatron_ktr.config.words import SHUFFLE_UNITS, ShuffleUnit
from megatron_ktr.types import Prompt, VisualInput


def can_hide(prompt: Prompt) -> bool:
    """Whether the hidden view differs from the intact one: the prompt has an image or a video."""
    return bool(prompt.media)


def can_shuffle(prompt: Prompt) -> bool:
    """Whether the shuffled view differs from the intact one: some video has at least two temporal patches and frames
    that are not all alike."""
    return any(_has_order(medium) for medium in prompt.media)


def draw_permutation(
    num_units: int, *, seed: int, step: int, identity: str, medium: int = 0, draw: int = 0
) -> Tensor | None:
    """A uniformly random order of ``num_units`` units, int64 [num_units], that is never the identity; None for fewer
    than two units. Place i of the shuffled video shows unit ``order[i]``.

    ``medium`` is the index of the medium in the prompt, and ``draw`` the index of the shuffle within the step
    (``num_shuffles``).
    """
    if num_units < 2:
        return None
    # A cryptographic hash, because Python's own hash of a string differs between processes.
    key = "\x1f".join((str(seed), str(step), identity, str(medium), str(draw)))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    unmoved = torch.arange(num_units)
    while True:
        order = torch.randperm(num_units, generator=generator)
        if not torch.equal(order, unmoved):
            return order


def draw_permutations(
    prompt: Prompt, *, unit: ShuffleUnit = "frame", seed: int, step: int, draw: int = 0, temporal_patch_size: int = 2
) -> tuple[Tensor | None, ...]:
    """The frame order of each medium of a prompt, for ``packing.pack_groups``; None for a medium where nothing moves.

    The order always lists frames, whatever the unit. The unit ``temporal_patch`` moves runs of
    ``temporal_patch_size`` frames; where the last run is incomplete, the last frame is repeated to fill it.
    """
    if unit not in SHUFFLE_UNITS:
        raise ValueError(f"shuffle_unit must be one of {SHUFFLE_UNITS}, got {unit!r}")
    orders: list[Tensor | None] = []
    for index, medium in enumerate(prompt.media):
        if not _has_order(medium):
            orders.append(None)
            continue
        num_frames = medium.frames_FCHW.shape[0]
        num_units = num_frames if unit == "frame" else medium.grid_thw[0]
        order = draw_permutation(num_units, seed=seed, step=step, identity=prompt.identity, medium=index, draw=draw)
        if order is not None and unit == "temporal_patch":
            frames = order[:, None] * temporal_patch_size + torch.arange(temporal_patch_size)
            order = frames.flatten().clamp(max=num_frames - 1)
        orders.append(order)
    return tuple(orders)


def shuffle_frames(medium: VisualInput, order: Tensor) -> VisualInput:
    """The medium with frame ``order[i]`` in place i; grid and timing stay the same."""
    return dataclasses.replace(medium, frames_FCHW=medium.frames_FCHW[order])


def _has_order(medium: VisualInput) -> bool:
    """Whether the medium is a video that changes when its units are moved.

    A video whose frames are all alike has no order. Both passes would see the same input, and the difference of their
    log-probs would only be rounding noise from other precision or packing. For most videos the first two frames already
    differ, and no others are compared.
    """
    if medium.kind != "video" or medium.grid_thw[0] < 2:
        return False
    first, *others = medium.frames_FCHW
    return not all(torch.equal(first, frame) for frame in others)
