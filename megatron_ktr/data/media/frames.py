"""Reads the frames of an image or a video. Training, the report, the doctor and the tools all use ``read_frames``.

read_frames
    an image file        read_image       Pillow
    a list of pictures   read_pictures    Pillow, one picture at a time
    a video file         read_video       decord in a child process, else PyAV
DecodedVideo             the result in all cases
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_ktr.data.media.pictures import read_pictures
from megatron_ktr.data.media.request import MediaKind
from megatron_ktr.data.media.video import Backend, DecodedVideo, FrameSampling, read_image, read_video


def read_frames(
    files: Path | str | Sequence[Path],
    *,
    kind: MediaKind,
    sampling: FrameSampling,
    pictures_fps: float | None = None,
    transform: Callable[[Tensor, int], Tensor] | None = None,
    backend: Backend = "auto",
) -> DecodedVideo:
    """The sampled frames of one image or video, upright. An image is treated as a video of one frame and no duration.

    Args:
        files: one file, or a list of pictures that form a video.
        sampling: not used for an image.
        pictures_fps: the frame rate of a list of pictures; None means ``sampling.fps``.
        transform: applied to frames as they are decoded; see ``read_video``.
        backend: the decoder of a video file; see ``read_video``.

    Raises:
        UnusableMedia: a file is missing or damaged, no decoder has its codec, or it has no frame in the span asked for.
    """
    if not isinstance(files, Path | str):
        fps = pictures_fps or sampling.fps
        return read_pictures(files, pictures_fps=fps, sampling=sampling, transform=transform)
    if kind == "video":
        return read_video(files, sampling=sampling, transform=transform, backend=backend)
    frames_1CHW = read_image(files)
    return DecodedVideo(
        frames_FCHW=frames_1CHW if transform is None else transform(frames_1CHW, 1),
        sampled_fps=0.0,
        native_fps=0.0,
        total_frames=1,
        frame_indices=(0,),
        num_repeated=0,
        backend="pillow",
    )
