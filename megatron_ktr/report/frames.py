"""Makes small pictures of the media of a question, as data URIs inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megatron_ktr.config.data_sources import parse_data_path, sources_of
from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.frames import read_frames
from megatron_ktr.data.media.preprocess import resize_frames
from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from megatron_ktr.report.run_data import RunData

LONG_SIDE = 128
"""The longer side of a picture in pixels. Smaller frames are kept as they are."""
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """One frame."""

    uri: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """The frames of one image or video, or the reason why there are none."""

    kind: str
    source: str
    pictures: tuple[Picture, ...] = ()
    num_sampled: int = 0
    """The number of frames that the run's settings take. ``pictures`` may be fewer, evenly chosen among them."""
    problem: str = ""


@dataclass
class FrameReader:
    """Reads the frames of media. Each file is decoded only once."""

    media_root: Path | None
    sampling: FrameSampling
    max_frames: int = 16
    _strips: dict[MediaSource, Strip] = field(default_factory=dict)

    @classmethod
    def of_run(cls, run: RunData, *, media_root: Path | None, max_frames: int = 16) -> FrameReader:
        """A reader that samples as the run's config says. Media lie below ``media_root``; None means where the run
        found them."""
        if media_root is not None and not media_root.is_dir():
            raise UserError(f"--media-root {media_root} is not a directory")
        if media_root is None:
            media_root = _media_root_of(run)
        data: Mapping[str, Any] = run.config.get("data", {})
        try:
            sampling = FrameSampling(
                fps=data.get("video_fps", FrameSampling.fps),
                num_frames=data.get("video_num_frames"),
                max_frames=data.get("video_max_frames", 16),
                rule=data.get("frame_sampling"),
            )
        except TypeError:
            raise UserError(f"{run.path / 'config.yaml'}: expected numbers in data.video_fps and the like") from None
        return cls(media_root, sampling, max_frames=max_frames)

    def strips_of(self, record: Mapping[str, Any]) -> list[Strip]:
        """One strip per image or video of a record."""
        return [self._strip(source) for source in media_sources(record)]

    def _strip(self, source: MediaSource) -> Strip:
        if source not in self._strips:
            self._strips[source] = self._read(source)
        return self._strips[source]

    def _read(self, source: MediaSource) -> Strip:
        if self.media_root is None:
            return Strip(source.kind, source.name, problem="not shown: no media root is known (--media-root)")
        try:
            shown = read_shown(source, self.media_root, sampling=self.sampling, max_frames=self.max_frames)
        except (UnusableMedia, UserError, ValueError) as error:
            return Strip(source.kind, source.name, problem=f"not shown: {error}")
        pictures = tuple(
            picture_of(frame, caption=caption) for frame, caption in zip(shown.frames_FCHW, shown.captions, strict=True)
        )
        return Strip(source.kind, source.name, pictures, num_sampled=shown.num_sampled)


@dataclass(frozen=True)
class ShownFrames:
    """Some frames of one image or video, made small."""

    frames_FCHW: Tensor
    captions: tuple[str, ...]
    """When each frame is shown."""
    num_sampled: int
    """The number of frames that the sampling takes, from which these are chosen evenly."""


def read_shown(
    source: MediaSource, media_root: Path, *, sampling: FrameSampling, max_frames: int, long_side: int = LONG_SIDE
) -> ShownFrames:
    """Reads at most ``max_frames`` of the frames that ``sampling`` takes.

    Raises:
        UnusableMedia, UserError, ValueError: the medium cannot be read.
    """
    request = source.request
    if source.kind == "video":
        sampling = request.sampling(sampling, is_pictures=source.is_pictures)
    video = read_frames(
        files_of(source, media_root),
        kind=source.kind,
        sampling=sampling,
        pictures_fps=request.pictures_fps or sampling.fps,
        transform=lambda frames_FCHW, num_frames: make_small(frames_FCHW, long_side=long_side),
        # Only PyAV is used: it needs no second process and gives the same frames as decord.
        backend="pyav",
    )
    if source.kind == "image":
        return ShownFrames(video.frames_FCHW[:1], ("image",), num_sampled=1)
    chosen = choose_evenly(len(video.frame_indices), max_frames)
    captions = tuple(f"{video.frame_indices[index] / video.native_fps:.1f} s" for index in chosen)
    return ShownFrames(video.frames_FCHW[chosen], captions, num_sampled=len(video.frame_indices))


def choose_evenly(num: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 .. num - 1, evenly, with the first and the last.

    >>> choose_evenly(9, 3), choose_evenly(2, 3)
    ([0, 4, 8], [0, 1])
    """
    return sorted({round(place) for place in torch.linspace(0, num - 1, min(num, most)).tolist()})


def _media_root_of(run: RunData) -> Path | None:
    """Where all media of the run's files lie; None if that is unknown, or not the same for all files of a mixture."""
    file = run.option("rollout", "replay_path") or run.option("data", "data_path")
    try:
        sources = sources_of(None if file is None else parse_data_path(file))
    except ValueError as error:
        raise UserError(f"{run.path}: data_path of its config.yaml: {error}") from error
    default = run.option("data", "media_root")
    roots = {source.media_root or default or str(Path(source.path).parent) for source in sources} or {default}
    root = roots.pop()
    return Path(root) if root and not roots else None


def make_small(frames_FCHW: Tensor, *, long_side: int) -> Tensor:
    """The frames with their longer side at most this many pixels."""
    height, width = frames_FCHW.shape[-2:]
    share = min(1.0, long_side / max(height, width))
    return resize_frames(frames_FCHW, (max(round(height * share), 1), max(round(width * share), 1)))


def picture_of(frame_CHW: Tensor, *, caption: str) -> Picture:
    """The frame as a JPEG inside the page, in its own size."""
    image = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, caption, image.width, image.height)
