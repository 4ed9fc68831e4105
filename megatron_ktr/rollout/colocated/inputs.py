"""Converts prompts to vLLM's inputs, so that vLLM sees exactly the tokens, pixels and seconds that the trainer sees.

- Tokens: vLLM expands one placeholder per medium itself. Each run of placeholders in ``Prompt.token_ids`` is therefore
  replaced by a single one.
- Pixels: frames are passed unchanged, as uint8 at their final size. vLLM's own resizing is switched off by size limits
  that admit every size, its frame sampling by ``do_sample_frames: False``.
- Seconds: vLLM derives the seconds of a temporal patch from metadata. A ``VisualInput`` is therefore described as a
  video of just its own frames, at the rate that gives its ``seconds_per_grid`` exactly in the fp32 that vLLM keeps.

If the media carry the trainer's features, these are passed in place of the pixels, together with grid and seconds;
without seconds, vLLM would silently assume one second per temporal patch. The engine then needs ``FEATURE_OPTIONS``.

Nothing here imports vLLM.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.types import Prompt, VisualInput

FEATURE_OPTIONS: dict[str, Any] = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0, "video": 0}}
"""vLLM's options for media that come as features. They admit no pixels, and vLLM then does not build the encoder."""


def engine_input(prompt: Prompt, *, media: MediaSpec, response: Sequence[int] = ()) -> dict[str, Any]:
    """One request for ``vllm.LLM.generate``: the prompt, then the tokens of a ``response`` to be scored, if any."""
    request: dict[str, Any] = {"prompt_token_ids": [*folded_token_ids(prompt, media=media), *response]}
    if any(medium.features is not None for medium in prompt.media):
        request |= feature_data(prompt.media)
    elif prompt.media:
        # The limits are set per request. As an engine option, such large limits would also determine the size of the
        # engine's encoder cache and its profiling run.
        side = media.patch_size * media.merge_size
        request["mm_processor_kwargs"] = {"size": {"shortest_edge": side**2, "longest_edge": 1 << 40}}
        data: dict[str, list[Any]] = {}
        for medium in prompt.media:
            item = _image(medium) if medium.kind == "image" else _video(medium, media.temporal_patch_size)
            data.setdefault(medium.kind, []).append(item)
        request["multi_modal_data"] = data
    return request


def feature_data(media: Sequence[VisualInput]) -> dict[str, Any]:
    """``multi_modal_data`` of media that carry features, and the identities under which vLLM's caches keep them.

    By default vLLM would identify a medium by features and grid only. The same frames at another speed have other
    positions, but would get the keys and values that were cached for the first speed.
    """
    data: dict[str, dict[str, torch.Tensor]] = {}
    identities: dict[str, list[str]] = {}
    for kind in ("image", "video"):
        found = [medium for medium in media if medium.kind == kind]
        if not found:
            continue
        data[kind] = {
            f"{kind}_embeds": torch.cat([_features(medium) for medium in found]),
            f"{kind}_grid_thw": torch.tensor([medium.grid_thw for medium in found]),
        }
        if kind == "video":
            data[kind]["second_per_grid_ts"] = torch.tensor([medium.seconds_per_grid for medium in found])
        identities[kind] = [_identity(medium) for medium in found]
    return {"multi_modal_data": data, "multi_modal_uuids": identities}


def _features(medium: VisualInput) -> torch.Tensor:
    assert medium.features is not None, "the engine is given features, not frames"
    return medium.features


def _identity(medium: VisualInput) -> str:
    digest = hashlib.blake2b(repr((medium.kind, medium.grid_thw, medium.seconds_per_grid)).encode(), digest_size=16)
    # Hashed as bytes, because numpy has no bfloat16.
    digest.update(_features(medium).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folded_token_ids(prompt: Prompt, *, media: MediaSpec) -> list[int]:
    """``prompt.token_ids`` with each medium's run of placeholders replaced by one token. The runs of two media may be
    adjacent.

    Raises:
        ValueError: there are placeholders but no medium left, or a medium has too few placeholders.
    """
    folded: list[int] = []
    remaining = list(prompt.media)
    row = 0
    while row < len(prompt.token_ids):
        token = prompt.token_ids[row]
        length = 1
        if media.is_visual(token):
            length = media.num_visual_tokens(remaining[0]) if remaining else 0
            if not length or prompt.token_ids[row : row + length] != (media.token_id(remaining.pop(0)),) * length:
                raise ValueError(f"prompt {prompt.problem_id!r}: the placeholders from token {row} fit no medium")
        folded.append(token)
        row += length
    if remaining:
        raise ValueError(f"prompt {prompt.problem_id!r} has no placeholders for {len(remaining)} of its media")
    return folded


def _image(medium: VisualInput) -> Image.Image:
    return Image.fromarray(medium.frames_FCHW[0].permute(1, 2, 0).contiguous().numpy())


def _video(medium: VisualInput, temporal_patch_size: int) -> tuple[np.ndarray, dict[str, Any]]:
    frames_FHWC = medium.frames_FCHW.permute(0, 2, 3, 1).contiguous().numpy()
    num_frames = len(frames_FHWC)
    fps = _frames_per_second(medium.seconds_per_grid, temporal_patch_size)
    metadata = {
        "fps": fps,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "duration": num_frames / fps,
        "do_sample_frames": False,
    }
    return frames_FHWC, metadata


def _frames_per_second(seconds_per_grid: float, temporal_patch_size: int) -> float:
    """The rate for which ``temporal_patch_size / rate``, rounded to fp32, equals ``seconds_per_grid`` in fp32."""
    if not seconds_per_grid > 0:  # a single temporal patch: no position depends on its seconds
        return 1.0
    rate = temporal_patch_size / seconds_per_grid
    # The two fp64 divisions may be off by one unit in the last place, which can change the result of rounding to fp32.
    # So the neighbouring rates are tried, too.
    for candidate in (rate, math.nextafter(rate, math.inf), math.nextafter(rate, 0.0)):
        if np.float32(temporal_patch_size / candidate) == np.float32(seconds_per_grid):
            return candidate
    raise AssertionError(f"no rate gives {seconds_per_grid} s per temporal patch of {temporal_patch_size} frames")
