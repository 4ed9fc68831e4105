"""Looks at one image or video in a process of its own: opens it, reads its frames' numbers, or decodes them.

Look.HEADER   the codec; the file is opened
Look.INDEX    also the number and size of the frames that a prompt takes; all packets are read, no frame but the first
Look.FRAMES   the same, and these frames are decoded as training decodes them
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ktr.data.media.frames import read_frames
from megatron_ktr.data.media.picture_file import open_picture
from megatron_ktr.data.media.preprocess import PreprocessSettings, resize_frames
from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.media.video import FrameSampling, regular_file, select_frames
from megatron_ktr.data.media.video_pyav import index_video, read_codec
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.types import MediaKind


class Look(enum.IntEnum):
    """How closely a medium is looked at."""

    HEADER = 1
    INDEX = 2
    FRAMES = 3


@dataclass(frozen=True)
class MediaTask:
    """One medium to look at. It can be sent to another process."""

    number: int
    source: MediaSource
    paths: tuple[str, ...]
    """Resolved. Several are the pictures of one video."""
    sampling: FrameSampling
    """The run's, with the model's temporal patch size."""
    look: Look
    settings: PreprocessSettings | None = None
    """If given, decoded frames are resized as for a prompt, so that the time measured is that of training."""


@dataclass(frozen=True)
class MediaFacts:
    """What is known of a medium, or why it cannot be used (``problem``)."""

    look: Look
    kind: MediaKind = "video"
    problem: str = ""
    codec: str = ""
    height: int = 0
    width: int = 0
    """The upright size in the file."""
    num_frames: int = 0
    """The number of frames that a prompt takes."""
    total_frames: int = 0
    native_fps: float = 0.0
    num_repeated: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """How long it took to look."""

    @property
    def duration(self) -> float:
        """Seconds of video; 0 for an image."""
        return self.total_frames / self.native_fps if self.native_fps else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MediaFacts:
        return cls(**{**values, "look": Look(values["look"])})


def look_at(task: MediaTask) -> MediaFacts:
    """Opens, indexes or decodes one medium, by the code that training uses. It never raises for a bad file."""
    start = time.perf_counter()
    facts = MediaFacts(task.look, task.source.kind, num_bytes=_size(task.paths))
    try:
        found = _FUNCTIONS[task.look](task, facts)
    except (UnusableMedia, ValueError) as error:
        found = replace(
            facts, problem=error.reason if isinstance(error, UnusableMedia) else " ".join(str(error).split())
        )
    return replace(found, seconds=time.perf_counter() - start)


def _open(task: MediaTask, facts: MediaFacts) -> MediaFacts:
    first = regular_file(task.paths[0])
    return replace(facts, codec=_codec(task, first))


def _index(task: MediaTask, facts: MediaFacts) -> MediaFacts:
    if task.source.kind == "image" or task.source.is_pictures:
        width, height = _picture_size(regular_file(task.paths[0]))
        facts = replace(facts, codec=_codec(task, Path(task.paths[0])), height=height, width=width)
        if task.source.kind == "image":
            return replace(facts, num_frames=1, total_frames=1)
        total, fps = len(task.paths), task.source.request.pictures_fps or task.sampling.fps
    else:
        index = index_video(regular_file(task.paths[0]))
        height, width = index.upright_size
        facts = replace(facts, codec=index.codec, height=height, width=width)
        total, fps = index.num_frames, index.native_fps
    sampling = task.source.request.sampling(task.sampling, is_pictures=task.source.is_pictures)
    chosen = select_frames(total, native_fps=fps, sampling=sampling)
    return replace(
        facts,
        num_frames=len(chosen.indices),
        total_frames=total,
        native_fps=fps,
        num_repeated=chosen.num_repeated,
    )


def _decode(task: MediaTask, facts: MediaFacts) -> MediaFacts:
    source, size = task.source, [0, 0]
    settings = None if task.settings is None else source.request.settings(task.settings, kind=source.kind)

    def note_size(chunk_FCHW: Tensor, num_frames: int) -> Tensor:
        size[:] = chunk_FCHW.shape[-2:]
        if settings is None:
            return chunk_FCHW[..., :1, :1]
        wanted = settings.frame_size(size[0], size[1], kind=source.kind, num_frames=num_frames)
        return resize_frames(chunk_FCHW, wanted)

    sampling = task.sampling
    if source.kind == "video":
        sampling = source.request.sampling(sampling, is_pictures=source.is_pictures)
    paths = [Path(path) for path in task.paths]
    decoded = read_frames(
        paths if source.is_pictures else paths[0],
        kind=source.kind,
        sampling=sampling,
        pictures_fps=source.request.pictures_fps or task.sampling.fps,
        transform=note_size,
    )
    return replace(
        facts,
        codec=_codec(task, paths[0]),
        height=size[0],
        width=size[1],
        num_frames=len(decoded.frames_FCHW),
        total_frames=decoded.total_frames,
        native_fps=decoded.native_fps,
        num_repeated=decoded.num_repeated,
    )


_FUNCTIONS = {Look.HEADER: _open, Look.INDEX: _index, Look.FRAMES: _decode}


def _codec(task: MediaTask, path: Path) -> str:
    if task.source.kind == "video" and not task.source.is_pictures:
        return read_codec(path)
    with open_picture(path) as image:
        return str(image.format).lower()


def _picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture after its EXIF rotation, from its header."""
    with open_picture(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def _size(paths: Sequence[str]) -> int:
    total = 0
    for path in paths:
        try:
            total += os.stat(path).st_size
        except OSError:
            pass
    return total
