"""Writes questions as messages of OpenAI's chat API, with the frames that were decoded here.

    images   every frame is a picture of its own, in order, at the place of its video: what every such server reads
    video    the frames of a video travel as one part of type ``video_url``, which vLLM reads

A server resizes and cuts pictures as its model's processor does; the frames themselves are those of the protocol.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from megatron_ktr.data.template import place_media, question_turns
from megatron_ktr.types import VisualInput

FramesAs = Literal["images", "video"]
FrameFormat = Literal["jpeg", "png"]
JPEG_QUALITY = 95


def chat_messages(
    record: Mapping[str, Any], media: Sequence[VisualInput], *, frames_as: FramesAs, frame_format: FrameFormat
) -> list[dict[str, Any]]:
    """The conversation of ``record``. Its media stand where ``PromptBuilder`` would place them.

    Raises:
        UnusableSample: the numbers of places and of media differ.
    """
    system, turns = question_turns(record)
    placed = place_media(turns, [medium.kind for medium in media], source="the question")
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for role, pieces in placed:
        parts: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, int):
                parts += _medium_parts(media[piece], frames_as=frames_as, frame_format=frame_format)
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += piece
            elif piece:
                parts.append({"type": "text", "text": piece})
        is_text = all(part["type"] == "text" for part in parts)
        messages.append({"role": role, "content": "".join(p["text"] for p in parts) if is_text else parts})
    return messages


def frames_per_second(medium: VisualInput) -> float:
    """The rate at which frames of a video were sampled; 1 for a single temporal patch, of which no position depends on
    it."""
    frames_per_patch = -(-len(medium.frames_FCHW) // medium.grid_thw[0])
    return frames_per_patch / medium.seconds_per_grid if medium.seconds_per_grid > 0 else 1.0


def _medium_parts(medium: VisualInput, *, frames_as: FramesAs, frame_format: FrameFormat) -> list[dict[str, Any]]:
    frames = [_encoded(frame_CHW, frame_format) for frame_CHW in medium.frames_FCHW]
    if medium.kind == "video" and frames_as == "video":
        # The type says "frames", whatever their format: vLLM lets Pillow find out.
        return [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(frames)}"}}]
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/{frame_format};base64,{frame}"}} for frame in frames
    ]


def _encoded(frame_CHW: Tensor, frame_format: FrameFormat) -> str:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if frame_format == "jpeg" else {}
    Image.fromarray(frame_CHW.permute(1, 2, 0).contiguous().numpy()).save(buffer, frame_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
