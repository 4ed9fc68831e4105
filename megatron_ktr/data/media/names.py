"""What the name of a medium says, as a record has it, without a look at the file system."""

from __future__ import annotations

from pathlib import PurePosixPath

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))
"""The suffixes of files that are one picture. A GIF is a picture under ``image`` and an animation under ``video``."""
VIDEO_SUFFIXES = frozenset((".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"))
IS_FOLDER = "is a folder; where its pictures are the frames of a video, its path must end in '/'"


def is_picture(written: str) -> bool:
    """Whether the suffix is that of a picture."""
    return not names_folder(written) and PurePosixPath(written.replace("\\", "/")).suffix.lower() in PICTURE_SUFFIXES


def names_folder(written: str) -> bool:
    """Whether the path names a folder of pictures: it ends in "/". The file system is not asked, because the meaning of
    a record's ``fps`` depends on it."""
    return written.endswith(("/", "\\"))
