"""Reads videos and images: chooses the frames of a video and decodes them upright.

decord is tried first, in a child process (``video_decord.py``). PyAV (``video_pyav.py``) decodes the codecs that decord
lacks (AV1), files whose frames decord numbers wrongly, and everything on machines without decord. Both give the same
frames. Each reason for using PyAV is logged once, and returned with every video to be counted.

Which frames are taken is decided by ``select_frames`` (``sampling.py``).
"""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megatron_ktr.data.media.names import IS_FOLDER
from megatron_ktr.data.media.picture_file import open_picture
from megatron_ktr.data.media.sampling import FrameSampling, FrameSelection, select_frames
from megatron_ktr.data.media.video_decord import DecordFailed, DecordProcess
from megatron_ktr.data.media.video_pyav import VideoIndex, decode_frames, index_video
from megatron_ktr.data.unusable import UnusableMedia

__all__ = [
    "DecodedVideo",
    "FrameSampling",
    "FrameSelection",
    "UnusableMedia",
    "read_image",
    "read_video",
    "select_frames",
]

_log = logging.getLogger(__name__)

DECORD_TIMEOUT_SECONDS = 120.0
"""The time limit for one chunk of frames. After it decord is assumed to hang; its process is replaced, and PyAV decodes
the video."""
_CHUNK_BYTES = 256 << 20
"""The most bytes of full-size frames in memory at once, but at least one frame. Frames are resized chunk by chunk."""

Backend = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True)
class DecodedVideo:
    """The sampled frames of one video, upright."""

    frames_FCHW: Tensor
    """uint8 [F, 3, H, W], RGB."""
    sampled_fps: float
    native_fps: float
    total_frames: int
    frame_indices: tuple[int, ...]
    num_repeated: int
    backend: Literal["decord", "pyav", "pillow"]
    fallback_reason: str = ""
    """The reason why decord did not decode this video; empty if it did, or was not meant to."""


def read_video(
    path: Path | str,
    *,
    sampling: FrameSampling,
    transform: Callable[[Tensor, int], Tensor] | None = None,
    backend: Backend = "auto",
) -> DecodedVideo:
    """Decodes the sampled frames of the best video stream, upright.

    Args:
        transform: ``transform(frames_FCHW, num_frames)`` is applied chunk by chunk as frames are decoded, for instance
            to resize them, so that the full-size frames of a long video are never all in memory.
        backend: "decord" and "pyav" allow only that decoder (tests); "auto" tries decord and then PyAV.

    Raises:
        UnusableMedia: the file is missing, not a video, damaged or cut off, no decoder has its codec, or it has no
            frame in the span of time asked for.
    """
    path = regular_file(path)
    index = index_video(path)
    try:
        selection = select_frames(index.num_frames, native_fps=index.native_fps, sampling=sampling)
    except ValueError as error:
        raise UnusableMedia(path, error) from error
    wanted = sorted(set(selection.indices))

    def collect(chunks: Iterator[np.ndarray]) -> Tensor:
        parts = []
        for chunk_FHWC in chunks:
            chunk_FCHW = torch.from_numpy(chunk_FHWC).permute(0, 3, 1, 2)
            parts.append(chunk_FCHW if transform is None else transform(chunk_FCHW, len(selection.indices)))
        return torch.cat(parts)

    frames_FCHW, used, reason = _decode(index, wanted, backend=backend, collect=collect)
    position = {number: row for row, number in enumerate(wanted)}
    if len(wanted) < len(selection.indices):
        frames_FCHW = frames_FCHW[[position[number] for number in selection.indices]]
    return DecodedVideo(
        frames_FCHW=frames_FCHW.contiguous(),
        sampled_fps=selection.sampled_fps,
        native_fps=index.native_fps,
        total_frames=index.num_frames,
        frame_indices=selection.indices,
        num_repeated=selection.num_repeated,
        backend=used,
        fallback_reason=reason,
    )


def _decode(
    index: VideoIndex, wanted: list[int], *, backend: Backend, collect: Callable[[Iterator[np.ndarray]], Tensor]
) -> tuple[Tensor, Literal["decord", "pyav"], str]:
    """(result of ``collect`` for the decoded chunks, decoder used, reason why it was not decord).

    decord is used where it can decode the file correctly, PyAV otherwise.
    """
    reason = _why_not_decord(index) if backend == "auto" else ""
    if backend == "decord" or (backend == "auto" and not reason):
        try:
            decoded = collect(_decord_chunks(index, wanted))
            _FAILED_OPENINGS[index.codec] = -1
            return decoded, "decord", reason
        except DecordFailed as error:
            if backend == "decord":
                raise UnusableMedia(index.path, f"decord: {error}") from error
            reason = _explain(index, error)
    frames_FCHW = collect(_pyav_chunks(index, wanted))
    if reason:
        say_fallback_once(reason, str(index.path))
        if reason.startswith("decord cannot open") and _FAILED_OPENINGS[index.codec] >= 0:
            _FAILED_OPENINGS[index.codec] += 1
    return frames_FCHW, "pyav", reason


def read_image(path: Path | str) -> Tensor:
    """The image as uint8 [1, 3, H, W], RGB. It is rotated by its EXIF orientation, and transparent parts are put on
    white.

    Raises:
        UnusableMedia: the image is missing, damaged, cut off, or larger than Pillow's limit against malicious files.
    """
    path = regular_file(path)
    with open_picture(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to 8 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise UnusableMedia(path, "has 32 bits a pixel, whose white is not known")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels_HWC = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].contiguous()


def regular_file(path: Path | str) -> Path:
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UnusableMedia(path, getattr(error, "strerror", None) or error) from error
    if stat.S_ISDIR(status.st_mode):
        raise UnusableMedia(path, IS_FOLDER)
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device would block or never end
        raise UnusableMedia(path, "is not a regular file")
    if status.st_size == 0:
        raise UnusableMedia(path, "is empty")
    if not os.access(path, os.R_OK):
        raise UnusableMedia(path, "may not be read")
    return path


def _why_not_decord(index: VideoIndex) -> str:
    """The reason why decord must not decode this file; empty if it may."""
    if not _has_decord():
        return "decord is not installed"
    if _FAILED_OPENINGS[index.codec] >= _MOST_FAILED_OPENINGS:
        return f"decord cannot open {index.codec}"
    if index.pts is None:
        return "decord needs presentation times, which this file lacks"
    if index.is_mirrored:
        return "decord ignores mirrored display matrices"
    if index.has_open_groups:
        return "decord miscounts frames in open groups of pictures"
    return ""


def _explain(index: VideoIndex, error: DecordFailed) -> str:
    """The reason for a failure, as one of a few kinds, so that logging each kind once does not flood the log. Details
    go to the debug log."""
    _log.debug("decord, %s: %s", index.path, error)
    if error.stage == "open":
        return "decord counts other frames" if "counts" in str(error) else f"decord cannot open {index.codec}"
    return {"timeout": "decord hangs", "crash": "decord crashed"}.get(error.stage, "decord failed while decoding")


def _decord_chunks(index: VideoIndex, wanted: list[int]) -> Iterator[np.ndarray]:
    process = _decord_process(os.getpid())
    parts = list(_chunks(index, wanted))
    for part in parts:
        yield process.read_frames(
            index.path,
            part,
            num_frames=index.num_frames,
            size=index.upright_size,
            is_last=part is parts[-1],
            timeout_seconds=DECORD_TIMEOUT_SECONDS,
        )


def _pyav_chunks(index: VideoIndex, wanted: list[int]) -> Iterator[np.ndarray]:
    frames = decode_frames(index, wanted)
    for part in _chunks(index, wanted):
        yield np.stack([next(frames) for _ in part])


def _chunks(index: VideoIndex, wanted: list[int]) -> Iterator[list[int]]:
    size = max(1, _CHUNK_BYTES // (index.height * index.width * 3))
    for start in range(0, len(wanted), size):
        yield wanted[start : start + size]


_FAILED_OPENINGS: Counter[str] = Counter()
"""By codec: how many files decord has failed to open in this process, or -1 once it has decoded one."""
_MOST_FAILED_OPENINGS = 3
"""After so many files that decord cannot open, it is taken to lack their codec, and is no longer tried for it. One file
alone may be an odd one."""
_REASONS_SAID: set[str] = set()


@functools.cache
def _has_decord() -> bool:
    return DecordProcess.is_installed()


@functools.cache
def _decord_process(process_id: int) -> DecordProcess:
    """The decord child of this process. Each process has its own, because a pipe that is shared with the parent after a
    fork would mix their answers."""
    del process_id
    return DecordProcess()


def say_fallback_once(reason: str, example: str) -> None:
    """Logs why decord does not decode some files, each reason once in a process."""
    if reason not in _REASONS_SAID:
        _REASONS_SAID.add(reason)
        _log.warning("decoding with PyAV: %s (first: %s; said once, counted in the metrics)", reason, example)
