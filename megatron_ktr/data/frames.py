"""The frames of an image or a video: the one way in, for training, the report, the doctor and the tools.

read_frames
    an image file        read_image       Pillow
    a list of pictures   read_pictures    Pillow, one picture at a time
    a video file         read_video       decord in a child process, PyAV behind it
DecodedVideo             the one way out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_ktr.data.media_source import MediaKind
from megatron_ktr.data.pictures import read_pictures
from megatron_ktr.data.video import Backend, DecodedVideo, FrameSampling, read_image, read_video


def read_frames(
    files: Path | str | Sequence[Path],
    *,
    kind: MediaKind,
    sampling: FrameSampling,
    pictures_fps: float | None = None,
    transform: Callable[[Tensor, int], Tensor] | None = None,
    backend: Backend = "auto",
) -> DecodedVideo:
    """The sampled frames of one image or video, upright. An image is a video of one frame that takes no time.

    Args:
        files: one file, or a video given as a list of pictures.
        sampling: not read for an image.
        pictures_fps: at which a list of pictures is shown; None = ``sampling.fps``.
        transform: applied to frames as they are decoded; see ``read_video``.
        backend: which decoder a video file is for; see ``read_video``.

    Raises:
        UnusableMedia: missing, damaged, in a codec no decoder has, or without a frame in the span that is asked for.
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
