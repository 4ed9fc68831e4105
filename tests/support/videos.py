"""Small video and image files made on the spot, in several codecs and several states of repair."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.support.paths import REPOSITORY

SHARED_VIDEOS_VARIABLE = "KTR_SHARED_DATA"

CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("mp4", "libx264", {"g": "8", "bf": "2"}),
    "h264 all-intra": ("mkv", "libx264", {"g": "1"}),
    "hevc open gop": ("mp4", "libx265", {"x265-params": "keyint=6:min-keyint=6:open-gop=1:bframes=2:log-level=none"}),
    "av1": ("mp4", "libsvtav1", {"g": "8", "preset": "12", "svtav1-params": "lp=1"}),
    "vp8 hidden frames": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8", "g": "8", "b": "200k"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "8", "lag-in-frames": "8", "cpu-used": "8"}),
    "mpeg4 avi": ("avi", "mpeg4", {"g": "8", "bf": "2"}),
    "mpeg2 ts": ("ts", "mpeg2video", {"g": "8", "bf": "2"}),
    "mjpeg mov": ("mov", "mjpeg", {}),
}
"""Name -> container, encoder, options: short groups of pictures so that seeking matters in a second of video."""


def shared_data() -> Path:
    """Where real videos and benchmark records are, if they are here: $KTR_SHARED_DATA, else ../shared/data beside the
    repository."""
    return Path(os.environ.get(SHARED_VIDEOS_VARIABLE) or REPOSITORY.parent / "shared" / "data")


def shared_videos() -> list[Path]:
    """The real videos, if this machine has them."""
    folder = shared_data() / "videos"
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def numbered_frames(num_frames: int, *, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [F, H, W, 3]: a gradient, a bright bar whose place is the frame number, a red top left corner."""
    frames_FHWC = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    frames_FHWC[..., 1] = np.linspace(40, 120, height, dtype=np.uint8)[None, :, None]
    frames_FHWC[..., 2] = np.linspace(120, 40, width, dtype=np.uint8)[None, None, :]
    for number in range(num_frames):
        left = int((width - 8) * number / max(num_frames - 1, 1))
        frames_FHWC[number, height // 2 :, left : left + 8] = (240, 240, 240)
    frames_FHWC[:, : height // 4, : width // 4] = (220, 30, 30)
    return frames_FHWC


@contextlib.contextmanager
def _own_priority() -> Iterator[None]:
    """Puts this thread's scheduling back: where root runs it, the AV1 encoder gives its caller the highest realtime
    priority, for good. Every process started later inherits it, and starves the rest of the machine."""
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_video(
    path: Path,
    frames_FHWC: np.ndarray,
    *,
    fps: int = 10,
    encoder: str = "libx264",
    options: dict[str, str] | None = None,
    audio: bool = False,
    milliseconds: Sequence[int] | None = None,
) -> Path:
    """Encodes ``frames_FHWC`` (uint8 RGB) and returns ``path``; its suffix chooses the container.

    ``milliseconds`` are the times at which the frames are shown; by default ``fps`` of them a second, from 0 on.
    """
    with _own_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=fps, options=options or {})
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        stream.thread_count = 1
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number, picture_HWC in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def write_codec(folder: Path, name: str, frames_FHWC: np.ndarray, *, fps: int = 10) -> Path:
    """One of ``CODECS``."""
    suffix, encoder, options = CODECS[name]
    path = folder / f"{name.replace(' ', '_')}.{suffix}"
    return write_video(path, frames_FHWC, fps=fps, encoder=encoder, options=options)


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes (a, b, c, d) into the track header of an mp4 or mov: how players turn and mirror its pictures."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    # version 0: version and flags 4, times 8, track 4, reserved 4, duration 4, reserved 8, layer to volume 8
    start = header + (52 if data[header] else 40)
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
