"""Media files that somebody made to hurt, or that a broken tool left: written on the spot, with numpy, PyAV and struct.

Each case has a name, how it is written, and what reading it may end in. Bombs are small files that claim, or unpack to,
far more than they hold.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from megatron_ktr.types import MediaKind
from tests.support.videos import numbered_frames, set_display_matrix, write_video

FRAMES = numbered_frames(12)
BOMB_SIDE = 60_000


@dataclass(frozen=True)
class Case:
    """``usable`` True: frames; False: an unusable medium; None: either of both."""

    file: str
    write: Callable[[Path], object]
    usable: bool | None
    kind: MediaKind = "video"
    reason: str = ""
    """What the reason of an unusable medium says, as a regular expression."""


def write_frames(
    path: Path,
    frames: list[np.ndarray],
    *,
    encoder: str,
    pix_fmt: str,
    source_format: str = "rgb24",
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    time_base: Fraction = Fraction(1, 10),
) -> Path:
    """Encodes frames, of any pixel format and any times, all of the first one's size."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=10, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        stream.time_base = stream.codec_context.time_base = time_base
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source_format)
            frame.pts, frame.time_base = (number if pts is None else pts[number]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _pixels(pix_fmt: str, encoder: str = "ffv1", *, size: tuple[int, int] = (64, 96)) -> Callable[[Path], object]:
    frames = list(numbered_frames(4, height=64, width=96)[:, : size[0], : size[1]])
    return lambda path: write_frames(path, frames, encoder=encoder, pix_fmt=pix_fmt)


def _cut(fraction: float, **options: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        write_video(path, FRAMES, options={"g": "4", **options})
        os.truncate(path, int(path.stat().st_size * fraction))

    return write


def _patched(find: bytes, change: Callable[[bytearray, int], None]) -> Callable[[Path], object]:
    """A short mp4 of which ``change`` alters the bytes behind the first ``find``."""

    def write(path: Path) -> None:
        write_video(path, FRAMES)
        data = bytearray(path.read_bytes())
        change(data, data.index(find) + len(find))
        path.write_bytes(data)

    return write


def _put(offset: int, value: bytes) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, start: int) -> None:
        data[start + offset : start + offset + len(value)] = value

    return change


def _turned(a: int, b: int, c: int, d: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        write_video(path, FRAMES)
        set_display_matrix(path, (a, b, c, d))

    return write


def _sizes_change(path: Path) -> None:
    """Two H.264 streams of different sizes, one behind the other, as some cameras record when they are turned."""
    parts = []
    for number, (height, width) in enumerate(((64, 96), (128, 32))):
        part = path.with_name(f"{path.stem}.{number}.h264")
        write_video(part, numbered_frames(4, height=height, width=width), options={"g": "4", "bf": "0"})
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def _many_streams(path: Path) -> None:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in range(60)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 10)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def _raw_packet(path: Path, *, codec: str, size: tuple[int, int], packet: bytes) -> None:
    """A container with one packet of the given bytes, whatever they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_mux_stream(codec, rate=10, width=size[1], height=size[0])
        written = av.Packet(packet)
        written.pts = written.dts = 0
        written.time_base, written.stream, written.is_keyframe = Fraction(1, 10), stream, True
        container.mux(written)


def png(width: int, height: int, *, chunks: bytes = b"", rows: int | None = None) -> bytes:
    """A PNG of one bit a pixel, all black; ``rows`` of it are there."""
    row = bytes(1 + (width + 7) // 8)
    packer, pieces = zlib.compressobj(1), []
    for start in range(0, height if rows is None else rows, 256):
        pieces.append(packer.compress(row * min(256, (height if rows is None else rows) - start)))
    packed = b"".join(pieces) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + chunks + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _zeros(num_bytes: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(num_bytes >> 20)) + packer.flush()


def _picture(name: str, change: Callable[[bytearray], None] | None = None) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        buffer = io.BytesIO()
        Image.fromarray(FRAMES[0]).save(buffer, name)
        data = bytearray(buffer.getvalue())
        if change is not None:
            change(data)
        path.write_bytes(data)

    return write


def _large_jpeg(data: bytearray) -> None:
    start = data.index(b"\xff\xc0") + 5  # behind the marker, its length and the precision
    data[start : start + 4] = struct.pack(">HH", 65500, 65500)


def _large_webp(data: bytearray) -> None:
    start = data.index(b"\x9d\x01\x2a") + 3  # the start code of a VP8 key frame, then the two sizes
    data[start : start + 4] = struct.pack("<HH", 16383, 16383)


def _large_tiff(data: bytearray) -> None:
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    for place in range(offset + 2, offset + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, place)
        if tag in (256, 257):  # width, length
            struct.pack_into("<HII", data, place + 2, 4, 1, BOMB_SIDE)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n"
MPD = '<?xml version="1.0"?>\n<MPD><Period><AdaptationSet><BaseURL>{0}</BaseURL></AdaptationSet></Period></MPD>\n'
PLAYLISTS = {
    "list.m3u8": HLS,
    "list.ts": HLS,
    "ffconcat.mp4": "ffconcat version 1.0\nfile '{0}'\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "script.avs": 'AviSource("{0}")\n',
    "dash.mpd": MPD,
    "index.idx": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:01:000, filepos: 000000000\n",
    "playlist.mp4": "[playlist]\nFile1={0}\n",
}
"""Text files that name others; ``{0}`` is a file or an address."""

NO_VIDEO, NOT_READ = "cannot be opened as a video", "is a picture|is none of the formats|cannot be opened as a video"
NO_IMAGE = "cannot be read as an image"

CASES = (
    [
        Case(f"cut at {part}.mp4", _cut(part), False, reason="no frame|cannot be opened")
        for part in (0.02, 0.3, 0.6, 0.9)
    ]
    + [Case(f"front cut at {part}.mp4", _cut(part, movflags="faststart"), False) for part in (0.02, 0.3, 0.9)]
    + [Case(f"cut at {part}.{end}", _cut(part), None) for part in (0.1, 0.5, 0.95) for end in ("mkv", "avi", "ts")]
    + [
        Case("empty.mp4", _bytes(b""), False, reason="is empty"),
        Case("one byte.mp4", _bytes(b"\0"), False, reason=NO_VIDEO),
        Case("zeros.mp4", _bytes(bytes(1 << 20)), False, reason=NO_VIDEO),
        Case("text.mp4", _bytes(b"no video\n"), False, reason=NO_VIDEO),
        Case("really mp4.avi", lambda path: write_video(path.with_suffix(".mp4"), FRAMES).rename(path), True),
        Case("really mp4.txt", lambda path: write_video(path.with_suffix(".mp4"), FRAMES).rename(path), True),
        Case("picture.mp4", _picture("PNG"), False, reason="is a picture"),
        Case("webp.mp4", _picture("WEBP"), False, reason="is a picture"),
        Case("with number %03d.jpg", _picture("JPEG"), False, reason=NOT_READ),
        Case("one frame.mp4", lambda path: write_video(path, FRAMES[:1]), True),
        Case(
            "many frames.mkv",
            lambda path: write_frames(path, [FRAMES[0][:16, :16]] * 10_000, encoder="mpeg4", pix_fmt="yuv420p"),
            True,
        ),
        Case(
            "8k.mov",
            lambda path: write_frames(
                path, [np.zeros((4320, 7680, 3), dtype=np.uint8)], encoder="mjpeg", pix_fmt="yuvj420p"
            ),
            True,
        ),
        Case("no frame rate.mp4", _patched(b"stts", _put(8, struct.pack(">II", 12, 0))), None),
        Case("no time scale.mp4", _patched(b"mdhd", _put(12, bytes(4))), None),
        Case("uneven.mkv", lambda path: write_video(path, FRAMES, milliseconds=[n * n * 10 for n in range(12)]), True),
        Case(
            "before zero.mkv",
            lambda path: write_video(path, FRAMES, milliseconds=[100 * n - 5000 for n in range(12)]),
            True,
        ),
        Case(
            "far away.nut",
            lambda path: write_frames(
                path, list(FRAMES[:4]), encoder="ffv1", pix_fmt="yuv420p", pts=[2**40 + n for n in range(4)]
            ),
            True,
        ),
        Case(
            "a gap of ages.nut",
            lambda path: write_frames(path, list(FRAMES[:4]), encoder="ffv1", pix_fmt="yuv420p", pts=[0, 1, 2, 2**50]),
            None,
        ),
        Case("sound alone.mp4", _sound, False, reason="no video stream"),
        Case("av1.mp4", lambda path: write_video(path, FRAMES, encoder="libsvtav1", options={"preset": "12"}), True),
        Case("10 bit.mkv", _pixels("yuv420p10le", "libx264"), True),
        Case("444.mkv", _pixels("yuv444p", "libx264"), True),
        Case("gray.mkv", _pixels("gray"), True),
        Case("16 bit gray.mkv", _pixels("gray16le"), True),
        Case("alpha.mkv", _pixels("yuva420p"), True),
        Case("1x1.mkv", _pixels("bgr0", size=(1, 1)), True),
        Case("1xN.mkv", _pixels("bgr0", size=(1, 96)), True),
        Case("odd.mkv", _pixels("yuv444p", size=(33, 67)), True),
        Case("sizes change.h264", _sizes_change, None),
        Case("many streams.mkv", _many_streams, True),
    ]
    + [
        Case(f"turned {number}.mp4", _turned(*matrix), True)
        for number, matrix in enumerate(
            [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (1, 1, -1, 1), (0, 0, 0, 0), (3, 0, 0, 3)]
        )
    ]
    + [
        Case(name, _bytes(text.format("there.mp4").encode()), False, reason=NOT_READ)
        for name, text in PLAYLISTS.items()
    ]
    + [
        Case(
            "bomb png.mov",
            lambda path: _raw_packet(path, codec="png", size=(16384, 16384), packet=png(16384, 16384)),
            False,
        ),
        Case("bomb gif.gif", _bytes(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b";"), False),
        Case(
            "bomb vp8.webm",
            lambda path: _raw_packet(
                path,
                codec="vp8",
                size=(16383, 16383),
                packet=b"\x10\x02\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(3000),
            ),
            False,
        ),
        Case("bomb.png", lambda path: path.write_bytes(png(BOMB_SIDE, BOMB_SIDE)), False, "image", NO_IMAGE),
        Case("claims.png", lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, rows=1)), False, "image", NO_IMAGE),
        Case(
            "text.png",
            lambda path: path.write_bytes(png(8, 8, chunks=_chunk(b"zTXt", b"Title\0\0" + _zeros(128 << 20)))),
            False,
            "image",
            NO_IMAGE,
        ),
        Case(
            "profile.png",
            lambda path: path.write_bytes(png(8, 8, chunks=_chunk(b"iCCP", b"x\0\0" + _zeros(128 << 20)))),
            None,
            "image",
        ),
        Case("bomb.gif", _bytes(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b";"), False, "image", NO_IMAGE),
        Case("bomb.jpg", _picture("JPEG", _large_jpeg), False, "image", NO_IMAGE),
        Case("bomb.webp", _picture("WEBP", _large_webp), False, "image", NO_IMAGE),
        Case("bomb.tiff", _picture("TIFF", _large_tiff), False, "image", NO_IMAGE),
        Case(
            "video.png",
            lambda path: write_video(path.with_suffix(".mp4"), FRAMES).rename(path),
            False,
            "image",
            NO_IMAGE,
        ),
        Case(
            "postscript.png",
            _bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
            False,
            "image",
            NO_IMAGE,
        ),
        Case("one pixel.png", lambda path: path.write_bytes(png(1, 1)), True, "image"),
        Case("a line.png", lambda path: path.write_bytes(png(4000, 1)), False, "image", "200-fold"),
    ]
)
"""What a question file may name, by file."""

HUNGRY = Case("hungry.png", lambda path: path.write_bytes(png(13_000, 13_000)), None, "image")
"""A picture within Pillow's limit that takes more than a gigabyte on its way to the model."""
