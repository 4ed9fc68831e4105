"""Writes media that a table holds as bytes to files: the features Image and Video of ``datasets``.

    {"image": {"bytes": b"...", "path": "a.jpg"}}   becomes   {"image": "media/3f/3f09...e1.jpg"}

A file is named by its content, so that media that many rows share are written once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data.prepare.layout import Keyed
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically

FOLDER = "media"
_SIGNS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (0, b"II*\x00", ".tif"),
    (0, b"MM\x00*", ".tif"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1a\x45\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
)
"""(place, bytes there, suffix of such a file). The content says what a file is; published names often do not."""


class EmbeddedMedia:
    """The media of one output folder."""

    def __init__(self, folder: Path, *, limit_bytes: float, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._limit_bytes = limit_bytes
        self._pending: dict[str, bytes] = {}
        self.num_files = 0
        self.num_bytes = 0
        self.is_used = False
        """Whether any record has embedded media, so that the output folder is their media root."""

    def take_out(self, row: Any) -> Any:
        """The row with paths in place of embedded media, which wait for ``write``.

        Raises:
            ValueError: the bytes are of no known picture or video.
        """
        self._pending = {}
        if isinstance(row, Keyed) or not isinstance(row, dict):
            return row
        return {name: self._replaced(value) for name, value in row.items()}

    def write(self) -> None:
        """Writes the media of the row that was last taken.

        Raises:
            UserError: all media together exceed the limit.
        """
        for name, content in self._pending.items():
            path = self._folder / name
            if path.is_file() and path.stat().st_size == len(content):
                continue
            self.num_bytes += len(content)
            if self.num_bytes > self._limit_bytes:
                raise UserError(
                    f"--media-limit-gb {self._limit_bytes / 1e9:g}: the table's media are more than that; "
                    f"{self.num_files} files are in {self._folder / FOLDER}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            self.num_files += 1
        self._pending = {}

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return self._named(value)
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            return self._named(value["bytes"]) if value["bytes"] else value["path"]
        if isinstance(value, list) and value and isinstance(value[0], dict | bytes):
            return [self._replaced(inner) for inner in value]
        return value

    def _named(self, content: Any) -> str:
        if not isinstance(content, bytes):
            raise ValueError(f"expected bytes of a picture or video, got {type(content).__name__}")
        suffix = next((suffix for place, sign, suffix in _SIGNS if content[place : place + len(sign)] == sign), None)
        if suffix is None:
            raise ValueError(f"{len(content)} embedded bytes are of no known picture or video")
        digest = xxhash.xxh3_128(content).hexdigest()
        name = f"{FOLDER}/{digest[:2]}/{digest}{suffix}"
        if self._prefix:
            raise UserError(f"--add-prefix {self._prefix}: the table has embedded media, which are written below --out")
        self.is_used = True
        self._pending[name] = content
        return name
