"""Opens video files with PyAV: as what they are, and never as a list of other files or hosts."""

from __future__ import annotations

import functools
import os
import re
import stat
from pathlib import Path
from typing import Any

from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError

try:
    import av
    import av.error
    import av.stream

    VIDEO_ERRORS: tuple[type[Exception], ...] = (av.error.FFmpegError, OSError, ValueError, EOFError, RuntimeError)
except ModuleNotFoundError:
    # PyAV is needed only when a video file is opened. Runs without video files work without it.
    av, VIDEO_ERRORS = None, ()

_CONTAINERS = (
    "mov mp4 m4a 3gp 3g2 mj2 matroska webm avi flv live_flv asf ogg mpeg mpegvideo mpegts mpegtsraw m4v h261 h263 h264 "
    "hevc vvc obu av1 ivf vc1 mjpeg mjpeg_2000 dv nut gif apng mxf mxf_opatom rm wtv nsv swf dirac yuv4mpegpipe"
)
"""The formats that are read, by FFmpeg's names. All others are refused before FFmpeg looks further into the file: some
refer to other files or hosts (playlists, session descriptions, patterns of names, subtitles in two files), others are
scripts. Following them would lead outside the media root."""
_TEXT_AT_HEAD = re.compile(
    rb"\xef?\xbb?\xbf?\s*(#EXT|ffconcat|<\?xml|<MPD|<Smooth|<ASX|\[playlist|v=0|RTSP|rtsp)", re.IGNORECASE
)
"""How files that refer to others begin. decord has a FFmpeg of its own, which might take for a playlist what PyAV takes
for a video."""
MOST_PIXELS = 178_956_970
"""The most pixels of one frame: Pillow's limit for pictures, too. The largest displays (8K) have 33 million. A file of
some kilobytes can claim, and decode to, a hundred times this."""
_CODEC_OPTIONS = {"max_pixels": str(MOST_PIXELS)}
_OPEN_TIMEOUT_SECONDS = (30.0, 30.0)
_DECODER_THREADS = 2
# Titles and comments in odd encodings must not make a file unusable. PyAV 19 never raises for them, and lacks the
# argument.
_LENIENT: dict[str, Any] = (
    {} if av is None or int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
)


def open_video(path: Path) -> Any:
    """The open container (PyAV's).

    Raises:
        UnusableMedia: it is a picture, or of a format that may refer to others.
        One of ``VIDEO_ERRORS``: FFmpeg cannot read it.
    """
    if av is None:
        raise UserError("reading videos needs the package av, which is not installed (pip install av)")
    _refuse_at_sight(path)
    try:
        # "file:" makes a name what it is: without it, FFmpeg takes "concat:a|b" or "http:..." for an address.
        container = av.open(
            f"file:{path}",
            options=_CODEC_OPTIONS,
            container_options=_container_options(),
            timeout=_OPEN_TIMEOUT_SECONDS,
            **_LENIENT,
        )
    except av.error.ArgumentError as error:  # FFmpeg's word for a format that is not listed
        raise UnusableMedia(path, "is none of the formats that are read as a video") from error
    # FFmpeg reads a picture as a video of one frame at 25 a second, whatever the file is called.
    if container.format.name.endswith("_pipe"):
        container.close()
        raise UnusableMedia(path, "is a picture, not a video; a list of pictures is one video")
    return container


@functools.cache
def _container_options() -> dict[str, str]:
    assert av is not None, "a container is being opened with it"
    pictures = sorted(name for name in av.formats_available if name.endswith("_pipe"))
    return {"protocol_whitelist": "file", "format_whitelist": ",".join((*_CONTAINERS.split(), *pictures))}


def _refuse_at_sight(path: Path) -> None:
    # A pipe that took the place of the file since it was looked at must not be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UnusableMedia(path, "is not a regular file any more")
        if found := _TEXT_AT_HEAD.match(file.read(64)):
            begin = found.group(1).decode()
            raise UnusableMedia(path, f"is none of the formats that are read as a video: it begins with {begin!r}")


def best_stream(path: Path, container: Any) -> Any:
    """The stream that FFmpeg ranks first (by default flag, then size); decord chooses the same."""
    assert av is not None, "a container was opened with it"
    stream = container.streams.best("video")
    if stream is None:
        raise UnusableMedia(path, "has no video stream")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise UnusableMedia(path, "has no video stream, only a cover picture")
    if stream.codec_context is None:
        raise UnusableMedia(path, "no decoder here can read its codec")
    stream.codec_context.thread_count = _DECODER_THREADS
    stream.codec_context.options = _CODEC_OPTIONS
    return stream
