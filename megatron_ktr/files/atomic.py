"""Writes files so that they exist whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file beside ``path`` and renames it over ``path``; text is UTF-8. Nothing is left behind on an error.

    Raises:
        OSError: the directory does not exist or is not writable, or the disk is full.
    """
    path, data = Path(path), content.encode("utf-8") if isinstance(content, str) else content
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:  # ctrl-C too
        scratch.unlink(missing_ok=True)
        raise
