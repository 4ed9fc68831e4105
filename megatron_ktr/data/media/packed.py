"""Loaded media as a JSON object of facts and the bytes of the frames: for pipes between processes and files on disk.

Nothing is pickled, so that reading bytes of a damaged or foreign file runs no code.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.types import VisualInput

_OF_VISUAL = tuple(
    field.name for field in fields(VisualInput) if field.name not in ("frames_FCHW", "source", "features")
)
_OF_MEDIA = tuple(field.name for field in fields(LoadedMedia) if field.name != "visual")


def pack_media(media: LoadedMedia) -> tuple[dict[str, Any], memoryview]:
    """The facts, which JSON can represent, and the bytes of ``frames_FCHW`` in row-major order.

    The name of the source is left out: the reader of the bytes knows which medium it asked for.
    """
    frames = media.visual.frames_FCHW.contiguous()
    facts: dict[str, Any] = {"shape": list(frames.shape)}
    facts["visual"] = {name: getattr(media.visual, name) for name in _OF_VISUAL}
    facts["media"] = {name: getattr(media, name) for name in _OF_MEDIA}
    return facts, frames.numpy().data.cast("B")


def num_frame_bytes(facts: dict[str, Any]) -> int:
    """The number of bytes that belong to the facts.

    Raises:
        ValueError, TypeError, KeyError: these are no facts of media.
    """
    shape = facts["shape"]
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"expected the shape of frames, got {shape!r}")
    return math.prod(shape)


def unpack_media(facts: dict[str, Any], frames: np.ndarray, *, source: str) -> LoadedMedia:
    """The media of ``pack_media``. ``frames`` is uint8 [bytes]; its memory is not copied.

    Raises:
        ValueError, TypeError, KeyError: these are no facts of media.
    """
    if num_frame_bytes(facts) != frames.nbytes:
        raise ValueError(f"expected {num_frame_bytes(facts)} bytes of frames, got {frames.nbytes}")
    visual = {name: _as_tuple(facts["visual"][name]) for name in _OF_VISUAL}
    frames_FCHW = torch.from_numpy(frames).view(facts["shape"])
    return LoadedMedia(
        VisualInput(frames_FCHW=frames_FCHW, source=source, **visual),
        **{name: _as_tuple(facts["media"][name]) for name in _OF_MEDIA},
    )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
