"""Writes files so that they exist whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file beside ``path`` and renames it over ``path``; text is UTF-8. Nothing is left behind on an error.

    Raises:
        OSError: the directory does not exist or is not writable, or the disk is full.
    """
    with written_whole(Path(path)) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write in pieces, which takes its place ``path`` at the end; else as ``write_atomically``."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:  # ctrl-C too
        scratch.unlink(missing_ok=True)
        raise
