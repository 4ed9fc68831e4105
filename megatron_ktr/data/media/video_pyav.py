"""Indexes a video file and decodes its frames by number, with PyAV.

Frames are identified reliably, for these reasons:

1. One pass over the packets gives the presentation times of all frames; only the first picture is decoded. Frame ``i``
   is the i-th of them in time. Packets that an edit list discards do not count as frames.
2. To decode a wanted frame, decoding starts at the last key frame shown at or before it, and the frame is recognised by
   its time. So seeking cannot shift the numbering. Files without usable times are decoded from the start, and frames
   are counted.
3. The display matrix is applied, so that rotated and mirrored recordings come out upright.

A decoding error between that key frame and a wanted frame makes the file unusable. So does a frame there that is
flagged as damaged; otherwise, training on pictures invented by error concealment would go unnoticed.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ktr.data.media.video_file import VIDEO_ERRORS, best_stream, open_video
from megatron_ktr.data.unusable import UnusableMedia

MOST_WRONG_RATE = 0.1
"""A declared frame rate that is further than this share from the mean of the frames' times is not believed."""
MOST_PACKETS = 10_000_000
"""The most frames of one file: 46 hours at 60 a second."""


class _FrameNotFound(Exception):
    """The decoder returned no frame with the expected presentation time (hidden packets, wrong times)."""


@dataclass(frozen=True)
class VideoIndex:
    """Everything that is needed to choose frames of a video and to find them again.

    Example: 10 frames of 0.1 s, key frames 0 and 6, frame 5 stored after key frame 6 (an open group of pictures):
    ``pts == (0, 1, .., 9)``, ``key_pts == (0, 6)``, ``has_open_groups``.
    """

    path: Path
    codec: str
    num_frames: int
    native_fps: float
    pts: tuple[int, ...] | None
    """Sorted presentation times in stream ticks; None if the file has no usable ones."""
    key_pts: tuple[int, ...]
    key_dts: tuple[int, ...]
    """The decoding time of each key frame, which is the target of a seek. It has the order of ``key_pts``."""
    has_open_groups: bool
    """Whether some frame is stored after a key frame but shown before it, which is usual in HEVC. decord counts frames
    from key frames on, and returns wrong pictures throughout such a file."""
    height: int
    width: int
    """The size as stored, before rotation."""
    quarter_turns: int
    """Clockwise quarter turns that make the picture upright, applied after mirroring."""
    is_mirrored: bool

    @property
    def upright_size(self) -> tuple[int, int]:
        return (self.width, self.height) if self.quarter_turns % 2 else (self.height, self.width)


def index_video(path: Path) -> VideoIndex:
    """Reads all packet headers of the best video stream and decodes its first frame.

    Raises:
        UnusableMedia: the file is not a video, has no decoder, no frame of it can be decoded, or it is shorter than it
            declares.
    """
    try:
        with open_video(path) as container:
            return _index_stream(path, container, best_stream(path, container))
    except VIDEO_ERRORS as error:
        raise UnusableMedia(path, f"cannot be opened as a video: {error}") from error


def read_codec(path: Path) -> str:
    """The codec of the best video stream, from the beginning of the file.

    Raises:
        UnusableMedia: the file is not a video, or has no decoder.
    """
    try:
        with open_video(path) as container:
            return best_stream(path, container).codec_context.codec.canonical_name
    except VIDEO_ERRORS as error:
        raise UnusableMedia(path, f"cannot be opened as a video: {error}") from error


def decode_frames(index: VideoIndex, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the frames ``wanted`` (sorted, without repeats) as uint8 [H, W, 3] RGB, upright.

    Raises:
        UnusableMedia: a wanted frame, or one it depends on, cannot be decoded.
    """
    num_done = 0
    try:
        with open_video(index.path) as container:
            stream = best_stream(index.path, container)
            seek_exactly = index.pts is not None
            find = _frames_by_time if seek_exactly else _frames_by_count
            try:
                for frame in find(index, container, stream, wanted):
                    yield _upright(frame, index)
                    num_done += 1
            except _FrameNotFound:
                seek_exactly = False
        if num_done < len(wanted):
            with open_video(index.path) as container:
                stream = best_stream(index.path, container)
                for frame in _frames_by_count(index, container, stream, wanted[num_done:]):
                    yield _upright(frame, index)
                    num_done += 1
    except VIDEO_ERRORS as error:
        raise UnusableMedia(index.path, f"damaged before frame {wanted[num_done]}: {error}") from error
    except _FrameNotFound as error:
        raise UnusableMedia(index.path, f"has no frame {wanted[num_done]} of {index.num_frames}") from error


def _index_stream(path: Path, container: Any, stream: Any) -> VideoIndex:
    first_frame, first_error = None, None
    times: list[tuple[int | None, int | None, bool]] = []
    num_stored = 0
    for packet in container.demux(stream):
        if packet.size:
            num_stored += 1
            if num_stored > MOST_PACKETS:
                raise UnusableMedia(path, f"has more than {MOST_PACKETS} frames")
            if not packet.is_discard:
                times.append((packet.pts, packet.dts, packet.is_keyframe))
        if first_frame is None:
            try:
                first_frame = next(iter(packet.decode()), None)
            except VIDEO_ERRORS as error:
                first_error = error
    if first_frame is None:
        raise UnusableMedia(path, f"no frame can be decoded: {first_error or 'the stream is empty'}")
    # Only formats of the mov family declare an exact number of frames; in others it is an estimate.
    if "mov" in container.format.name and stream.frames > num_stored:
        raise UnusableMedia(path, f"is cut off: {num_stored} of the {stream.frames} declared frames are there")
    pts, keys, has_open_groups = _order_frames(times)
    num_frames = len(times) if pts is not None else _count_frames(path)
    native_fps = float(stream.average_rate or stream.guessed_rate or 0)
    if "mov" not in container.format.name and pts is not None:
        native_fps = _rate_by_times(native_fps, pts, tick_seconds=float(stream.time_base or 0))
    if native_fps <= 0:
        raise UnusableMedia(path, "has no frame rate")
    quarter_turns, is_mirrored = _orientation(first_frame)
    return VideoIndex(
        path=path,
        codec=stream.codec_context.codec.canonical_name,
        num_frames=num_frames,
        native_fps=native_fps,
        pts=pts,
        key_pts=tuple(key for key, _ in keys),
        key_dts=tuple(dts for _, dts in keys),
        has_open_groups=has_open_groups,
        height=first_frame.height,
        width=first_frame.width,
        quarter_turns=quarter_turns,
        is_mirrored=is_mirrored,
    )


def _rate_by_times(declared_fps: float, pts: tuple[int, ...], *, tick_seconds: float) -> float:
    """``declared_fps``, or the mean rate of the presentation times where the two differ by more than a tenth.

    Matroska and WebM files state a nominal rate, or none, and FFmpeg then guesses one from the first frames: recordings
    of browsers seem to have 1000 frames a second. A video would seem a second long and lose most of its frames.
    """
    seconds = (pts[-1] - pts[0]) * tick_seconds
    if seconds <= 0:
        return declared_fps
    measured_fps = (len(pts) - 1) / seconds
    return declared_fps if abs(declared_fps / measured_fps - 1) <= MOST_WRONG_RATE else measured_fps


def _order_frames(
    times: list[tuple[int | None, int | None, bool]],
) -> tuple[tuple[int, ...] | None, list[tuple[int, int]], bool]:
    """(sorted presentation times, (pts, dts) of each key frame, whether groups of pictures are open).

    The result is (None, [], False) if times are missing or repeated, or if no key frame is marked.
    """
    pts = tuple(sorted(time for time, _, _ in times if time is not None))
    has_key = any(is_key for _, _, is_key in times)
    if len(pts) < len(times) or len(set(pts)) < len(pts) or not has_key:
        return None, [], False
    keys: list[tuple[int, int]] = []
    has_open_groups = False
    for time, dts, is_key in times:
        assert time is not None
        if is_key:
            keys.append((time, time if dts is None else dts))
        elif keys and time < keys[-1][0]:
            has_open_groups = True
    return pts, sorted(keys), has_open_groups


def _count_frames(path: Path) -> int:
    """The number of frames that the decoder returns. It is the only reliable count if packets have no times."""
    with open_video(path) as container:
        return sum(1 for _ in container.decode(best_stream(path, container)))


def _frames_by_time(index: VideoIndex, container: Any, stream: Any, wanted: Sequence[int]) -> Iterator[Any]:
    """Yields the wanted frames, recognised by presentation time. It seeks past frames that need not be decoded."""
    assert index.pts is not None
    frames: Iterator[Any] | None = None
    latest = None
    for number in wanted:
        target = index.pts[number]
        key = max(bisect.bisect_right(index.key_pts, target) - 1, 0)
        if frames is None or latest is None or index.key_pts[key] > latest:
            frames = _decode_from_key(index, container, stream, seek_to=index.key_dts[key] if key else None)
            first = next(frames, None)
            if first is not None and first.pts is not None and first.pts > target:
                # The seek ended at a later key frame, because the container's index is not by decoding time. Decoding
                # then starts from the beginning.
                frames = _decode_from_key(index, container, stream, seek_to=None, rewind=True)
                first = next(frames, None)
            frame = first
        else:
            frame = next(frames, None)
        while frame is not None and frame.pts is not None and frame.pts < target:
            frame = next(frames, None)
        if frame is None or frame.pts != target:
            raise _FrameNotFound
        latest = frame.pts
        yield frame


def _decode_from_key(
    index: VideoIndex, container: Any, stream: Any, *, seek_to: int | None, rewind: bool = False
) -> Iterator[Any]:
    """Yields decoded frames in order of time, from the key frame at ``seek_to``. None means from the current position
    of the container, or from the beginning with ``rewind``."""
    if seek_to is not None or rewind:
        start = stream.start_time or 0
        container.seek(seek_to if seek_to is not None else min(start, 0), stream=stream, backward=True)
    first_key: int | None = None
    for packet in container.demux(stream):
        # After a seek some containers start between key frames. Pictures before the next key frame lack their reference
        # frames and are skipped.
        if first_key is None and packet.is_keyframe:
            first_key = packet.pts
        if first_key is None:
            continue
        for frame in packet.decode():
            # Damaged frames that are shown before the key frame are ignored: they lack references only because of the
            # seek, and no wanted frame is among them.
            if frame.is_corrupt and frame.pts is not None and frame.pts >= first_key:
                raise UnusableMedia(index.path, f"a frame at {float(frame.time or 0):.2f} s is damaged")
            yield frame


def _frames_by_count(index: VideoIndex, container: Any, stream: Any, wanted: Sequence[int]) -> Iterator[Any]:
    """Yields the wanted frames, recognised by counting all decoded frames."""
    remaining = iter(wanted)
    number = next(remaining, None)
    for position, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise UnusableMedia(index.path, f"frame {position} is damaged")
        if position == number:
            yield frame
            number = next(remaining, None)
            if number is None:
                return
    if number is not None:
        raise _FrameNotFound


def _orientation(frame: Any) -> tuple[int, bool]:
    """(clockwise quarter turns, whether it is mirrored first), from the display matrix of a decoded frame.

    The matrix maps stored to shown points as row vectors with y downwards: x' = a x + c y, y' = b x + d y.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(bytes(matrix), dtype="<i4", count=9))
    is_mirrored = a * d - b * c < 0
    if is_mirrored:
        a, b = -a, -b
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 2), is_mirrored
    return (1 if b > 0 else 3), is_mirrored


def _upright(frame: Any, index: VideoIndex) -> np.ndarray:
    if (frame.height, frame.width) != (index.height, index.width):  # the picture size changed inside the file
        frame = frame.reformat(width=index.width, height=index.height, format="rgb24")
    picture_HWC = frame.to_ndarray(format="rgb24")
    if index.is_mirrored:
        picture_HWC = picture_HWC[:, ::-1]
    return np.ascontiguousarray(np.rot90(picture_HWC, -index.quarter_turns))
