"""Reads text files of a bounded size: a device or a file that is no text must not fill the memory."""

from __future__ import annotations

from pathlib import Path

MOST_JSON_BYTES = 1 << 30
"""Larger than any tokenizer, index of weights or file of results."""
MOST_OPTIONS_BYTES = 1 << 20
"""Run files and templates have some kilobytes. YAML of this size takes seconds to be read."""
_MOST_BRACKETS = 10_000


def read_text(path: Path | str, *, most_bytes: int, encoding: str = "utf-8") -> str:
    """The text of a file, with newlines at the ends of its lines.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than ``most_bytes``, or no text.
    """
    most_bytes = _most(most_bytes)
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than the {most_bytes} bytes that such a file may have")
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_yaml_text(path: Path | str) -> str:
    """The text of a run file. Raises as ``read_text`` does, and ``ValueError`` for more brackets than any run file has:
    reading them takes a time that grows with the square of their depth."""
    text = read_text(path, most_bytes=MOST_OPTIONS_BYTES)
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ValueError(f"has more than {_MOST_BRACKETS} brackets")
    return text


def _most(limit: int) -> int:
    """The limit; tests lower it."""
    return limit
