"""Jobs of reading media, and how two results of one are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.data.media.job import MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings
from megatron_ktr.data.media.request import MediaRequest
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.unusable import UnusableMedia


def video_job(*paths: Path, **request: Any) -> MediaJob:
    """One video of a few small frames; several paths are its pictures."""
    return MediaJob(
        paths=paths,
        kind="video",
        is_pictures=len(paths) > 1,
        request=MediaRequest(**request),
        settings=PreprocessSettings(video_min_pixels=784, video_max_pixels=32 * 784),
        sampling=FrameSampling(fps=2, max_frames=6),
    )


def outcome(read: Callable[[], LoadedMedia]) -> LoadedMedia | str:
    """What reading gives, or what it says."""
    try:
        return read()
    except UnusableMedia as error:
        return str(error)


def facts(media: LoadedMedia | str) -> Any:
    """Everything about loaded media in a form that ``==`` compares: pixels as bytes, all other facts as they are."""
    if isinstance(media, str):
        return media
    frames = media.visual.frames_FCHW
    assert frames.dtype == torch.uint8
    visual = {name: value for name, value in vars(media.visual).items() if name != "frames_FCHW"}
    others = {name: value for name, value in vars(media).items() if name != "visual"}
    return tuple(frames.shape), frames.contiguous().numpy().tobytes(), visual, others
