"""Opens pictures with Pillow, of the formats of the web and of cameras alone."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import is_out_of_memory

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow knows more formats. For one (PostScript) it starts another program on the file, and most of the others are
seldom read by anybody, and so seldom tested. Pillow refuses more than 178,956,970 pixels of any of them."""

# A large picture is no fault of the program: what it costs is bounded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextlib.contextmanager
def open_picture(path: Path | str) -> Iterator[Image.Image]:
    """The picture of a regular file. Its pixels are decoded when they are first used, inside the context.

    Raises:
        UnusableMedia: for whatever Pillow raises inside the context but a lack of memory: on damaged files its readers
            raise errors of almost every kind.
    """
    try:
        with Image.open(path, formats=_formats()) as picture:
            yield picture
    except UnusableMedia:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnusableMedia(path, f"cannot be read as an image: {str(error) or type(error).__name__}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that the installed Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
