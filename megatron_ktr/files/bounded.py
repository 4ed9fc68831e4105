"""Opens files that a user names, and reads text of a bounded size: a pipe without a writer must not be waited for, and
a device or a file that is no text must not fill the memory."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from megatron_ktr.errors import UserError

MOST_JSON_BYTES = 1 << 30
"""Larger than any tokenizer, index of weights or file of results."""
MOST_OPTIONS_BYTES = 1 << 20
"""Run files and templates have some kilobytes. YAML of this size takes seconds to be read."""
_MOST_DEPTH = 100
_BRACKET = re.compile(r"[\[\]{}]")


def open_file(path: Path | str) -> BufferedReader:
    """Opens a file for reading. It never waits, and reads nothing that is not a file: what a pipe such as that of
    ``<(command)`` holds can be read once, and by one process, while every rank and every worker reads what an option
    names. ``/dev/stdin`` is a file where a file is its source.

    Raises:
        OSError: it cannot be read, or is a pipe, a socket or a device, which ``strerror`` says.
    """
    _require_file(os.stat(path), path)  # first, because opening a device may have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_file(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_file(status: os.stat_result, path: Path | str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        text = "a pipe, a socket or a device, and no file; write what it gives to a file first"
        raise OSError(errno.EINVAL, text, str(path))


def read_text(path: Path | str, *, most_bytes: int, encoding: str = "utf-8") -> str:
    """The text of a file, with newlines at the ends of its lines.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than ``most_bytes``, or no text.
    """
    most_bytes = _most(most_bytes)
    with open_file(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than the {most_bytes} bytes that such a file may have")
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_yaml_text(path: Path | str) -> str:
    """The text of a run file. Raises as ``read_text`` does, and ``ValueError`` for brackets within more brackets than
    any run file has: PyYAML looks at all open brackets for every word behind them."""
    text = read_text(path, most_bytes=MOST_OPTIONS_BYTES)
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > _MOST_DEPTH:
            raise ValueError(f"nested too deeply: more than {_MOST_DEPTH} open brackets")
    return text


def refuse_pipes(model: Path) -> None:
    """Raises ``UserError`` for a pipe, a socket or a device as ``model``, or among the files of that directory: whoever
    reads a pipe waits for its writer, and only rank 0 would get what it wrote."""
    for path in [model, *(sorted(model.iterdir()) if model.is_dir() else ())]:
        with suppress(OSError):  # a link that leads nowhere, as any other missing file
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{path} is a pipe, a socket or a device; a model is a directory of files")


def _most(limit: int) -> int:
    """The limit; tests lower it."""
    return limit
