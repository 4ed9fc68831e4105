"""Reads a video that is given as a list of pictures, which are its frames in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ktr.data.media.video import DecodedVideo, FrameSampling, read_image, select_frames
from megatron_ktr.data.unusable import UnusableMedia


def read_pictures(
    paths: Sequence[Path | str],
    *,
    pictures_fps: float,
    sampling: FrameSampling,
    transform: Callable[[Tensor, int], Tensor] | None = None,
) -> DecodedVideo:
    """The sampled frames of the video whose frame ``i`` is picture ``i``, shown at ``i / pictures_fps`` seconds.

    Frames are sampled as from any video (``select_frames``). Pictures that are not sampled are not read. ``transform``
    is applied as in ``read_video``, to one picture at a time.

    Raises:
        UnusableMedia: a picture is missing or damaged, sizes differ, or no picture lies in the span of time asked for.
    """
    try:
        selection = select_frames(len(paths), native_fps=pictures_fps, sampling=sampling)
    except ValueError as error:
        raise UnusableMedia(f"{paths[0]} .. {paths[-1]}", error) from error
    frames: dict[int, Tensor] = {}
    first_size: tuple[int, ...] | None = None
    for number in sorted(set(selection.indices)):
        picture_1CHW = read_image(paths[number])
        size = tuple(picture_1CHW.shape[-2:])
        first_size = first_size or size
        if size != first_size:
            raise UnusableMedia(
                paths[number],
                f"is {size[1]} x {size[0]} pixels, other frames of its video are {first_size[1]} x {first_size[0]}",
            )
        frames[number] = picture_1CHW if transform is None else transform(picture_1CHW, len(selection.indices))
    return DecodedVideo(
        frames_FCHW=torch.cat([frames[number] for number in selection.indices]),
        sampled_fps=selection.sampled_fps,
        native_fps=pictures_fps,
        total_frames=len(paths),
        frame_indices=selection.indices,
        num_repeated=selection.num_repeated,
        backend="pillow",
    )
