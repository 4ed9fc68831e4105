"""The facts about Qwen2.5-VL's images and videos that packing needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.types import VisualInput
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.mrope import mrope_positions


def media_spec(config: Qwen2_5_VLConfig, *, patchify: Callable[[Tensor, VisualInput], Tensor]) -> MediaSpec:
    """Placeholder ids, patch sizes and M-RoPE positions of ``config``; the caller provides ``patchify``."""
    return MediaSpec(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        patch_size=config.vision.patch_size,
        temporal_patch_size=config.vision.temporal_patch_size,
        merge_size=config.vision.spatial_merge_size,
        positions=partial(mrope_positions, config=config),
        patchify=patchify,
    )
