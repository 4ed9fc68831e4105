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
        sampling = FrameSampling(
            fps=data.get("video_fps", FrameSampling.fps),
            num_frames=data.get("video_num_frames"),
            max_frames=data.get("video_max_frames", 16),
            rule=data.get("frame_sampling"),
        )
        return cls(media_root, sampling, max_frames=max_frames)

    def strips_of(self, record: Mapping[str, Any]) -> list[Strip]:
        """One strip per image or video of a record."""
        return [self._strip(source) for source in media_sources(record)]

    def _strip(self, source: MediaSource) -> Strip:
        if source not in self._strips:
            self._strips[source] = self._read(source)
        return self._strips[source]

    def _read(self, source: MediaSource) -> Strip:
        kind, name, request = source.kind, source.name, source.request
        if self.media_root is None:
            return Strip(kind, name, problem="not shown: no media root is known (--media-root)")
        try:
            files = files_of(source, self.media_root)
            sampling = self.sampling
            if kind == "video":
                sampling = request.sampling(self.sampling, is_pictures=source.is_pictures)
            video = read_frames(
                files,
                kind=kind,
                sampling=sampling,
                pictures_fps=request.pictures_fps or self.sampling.fps,
                transform=_small,
                # Only PyAV is used: it needs no second process and gives the same frames as decord.
                backend="pyav",
            )
        except (UnusableMedia, UserError, ValueError) as error:
            return Strip(kind, name, problem=f"not shown: {error}")
        if kind == "image":
            return Strip(kind, name, (picture_of(video.frames_FCHW[0], caption="image"),), num_sampled=1)
        total = len(video.frame_indices)
        shown = sorted({round(index) for index in torch.linspace(0, total - 1, min(total, self.max_frames)).tolist()})
        pictures = tuple(
            picture_of(video.frames_FCHW[index], caption=f"{video.frame_indices[index] / video.native_fps:.1f} s")
            for index in shown
        )
        return Strip(kind, name, pictures, num_sampled=total)


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


def _small(frames_FCHW: Tensor, num_frames: int) -> Tensor:
    height, width = frames_FCHW.shape[-2:]
    share = min(1.0, LONG_SIDE / max(height, width))
    return resize_frames(frames_FCHW, (max(round(height * share), 1), max(round(width * share), 1)))


def picture_of(frame_CHW: Tensor, *, caption: str) -> Picture:
    """The frame as a JPEG inside the page, in its own size."""
    image = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, caption, image.width, image.height)
