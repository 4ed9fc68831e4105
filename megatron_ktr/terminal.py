"""What reaches a terminal or a log: text of models, of data sets and names of files may hold anything.

printable       a line with its control characters as their numbers, and without secrets
keep_secret     names a secret: nothing here lets it pass from then on
LineFormatter   a record of ``logging`` as one such line
guarded         standard output and errors that no control sequence passes, whoever prints
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, cast

_UNSEEN = "\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
"""What has no width, turns the direction of what follows, or ends a line where an editor shows none."""
_CONTROL = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff{_UNSEEN}]")
_PRINTED = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_UNSEEN}]")
_PRINTED_BESIDE_BARS = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_UNSEEN}]")
"""The same without the return to the beginning of the line, by which bars of progress are drawn."""


_SECRETS: set[str] = set()
LEAST_SECRET = 12
"""Shorter ones, such as "EMPTY", stand in many a text by chance."""
HIDDEN = "***"


def keep_secret(value: str) -> None:
    """From now on ``without_secrets`` hides ``value``, a key or a token."""
    if len(value) >= LEAST_SECRET:
        _SECRETS.add(value)


def without_secrets(text: str) -> str:
    """``text`` with every secret of this process hidden: a library or a server may repeat what it was sent."""
    for secret in _SECRETS:
        text = text.replace(secret, HIDDEN)
    return text


def printable(text: str) -> str:
    """A line of text for a terminal: without secrets, and with control characters, which could move its cursor, clear
    it or turn around what follows, as their numbers. Text of data sets and names of files may hold any.

    >>> printable("a\\x1b[2Jb\\u202ec é")
    'a\\\\x1b[2Jb\\\\u202ec é'
    """
    return _CONTROL.sub(_number, without_secrets(text))


def _number(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """Each record is one line, whatever its text holds; the lines of a traceback stay lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class _Guard:
    """A stream that writes text to another one: without secrets, and without control characters but the ends of lines
    and tabs."""

    def __init__(self, stream: Any, unwanted: re.Pattern[str]) -> None:
        self._stream, self._unwanted = stream, unwanted

    def write(self, text: str) -> int:
        self._stream.write(self._unwanted.sub(_number, without_secrets(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, what this process prints and logs reaches the terminal without control sequences and secrets. What
    libraries write past Python, and what child processes write, is not looked at.

    Bytes (``sys.stdout.buffer``) pass as they are: they are no text for a terminal.
    """
    before = sys.stdout, sys.stderr
    last_resort = logging.lastResort
    formatter = None if last_resort is None else last_resort.formatter
    sys.stdout = cast(Any, _guard(sys.stdout, _PRINTED))
    sys.stderr = cast(Any, _guard(sys.stderr, _PRINTED_BESIDE_BARS))
    if last_resort is not None:  # what logs where nobody has set up logging, as in most tools
        last_resort.setFormatter(LineFormatter("%(message)s"))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if last_resort is not None:
            last_resort.setFormatter(formatter)


def _guard(stream: Any, unwanted: re.Pattern[str]) -> Any:
    return stream if stream is None or isinstance(stream, _Guard) else _Guard(stream, unwanted)


def log_to_errors(form: str = "%(levelname)s %(name)s: %(message)s") -> None:
    """Warnings of all loggers go to standard error, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
