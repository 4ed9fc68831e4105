"""The two counterfactual inputs of Video-KTR: the video hidden, and the video in random order.

Hidden: the visual tokens are removed from the prompt, a forward over text alone (``batch/packing.py``). Every prompt
with media has one.

Shuffled: each video's units change places. A unit is a decoded ``frame``, moved before frames are paired into
temporal patches (the authors' choice and the default), or a ``temporal_patch``, a pair that moves as a whole, so
that the vision features are only re-ordered. Images have no order; a video of a single temporal patch has none
either, nor has one whose frames are all alike.

One order per prompt and step, shared by its G responses: scores of a group are compared with one another, so
they must ask about the same counterfactual. It depends on seed, step and the prompt's identity (``types.Prompt``)
alone, not on the rank or the micro-batch the prompt landed in, so every parallel layout sees the same one.
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
    """Whether the shuffled view differs from the intact one: some video has at least two temporal patches, and frames
    that differ."""
    return any(_has_order(medium) for medium in prompt.media)


def draw_permutation(
    num_units: int, *, seed: int, step: int, identity: str, medium: int = 0, draw: int = 0
) -> Tensor | None:
    """A uniformly random order of ``num_units`` other than the identity; None where there is no other order.

    ``medium`` counts the prompt's media and ``draw`` the shuffles of one step (``num_shuffles``). int64
    [num_units]; place i of the shuffled video shows unit ``order[i]``.
    """
    if num_units < 2:
        return None
    # A cryptographic hash, because Python's own differs between processes.
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
    """The frame order of each medium of a prompt, for ``packing.pack_groups``; None where nothing moves.

    Always in frames, whatever the unit: ``temporal_patch`` moves runs of ``temporal_patch_size`` frames, after
    the last frame was repeated to fill the last run.
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
    """The medium with frame ``order[i]`` in place i; same grid and timing."""
    return dataclasses.replace(medium, frames_FCHW=medium.frames_FCHW[order])


def _has_order(medium: VisualInput) -> bool:
    """Not where all frames are alike: a difference of log-probs would be that of two computations of the same, which is
    not even 0 where they differ in precision or packing. Of most videos only the first two frames are compared."""
    if medium.kind != "video" or medium.grid_thw[0] < 2:
        return False
    first, *others = medium.frames_FCHW
    return not all(torch.equal(first, frame) for frame in others)
