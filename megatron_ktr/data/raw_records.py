"""Streams the records of a question file, as they are written: a JSON array, or JSONL with one record a line.

The file is read in pieces, so the memory does not depend on its size: a piece of the text and one record are held at a
time. A single record may have ``MAX_RECORD_CHARS`` characters.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import parse_json

T = TypeVar("T")
MAX_RECORD_CHARS = 16 * 1024 * 1024
"""The longest record, in characters of its JSON. It bounds what a file that is no question file can cost."""
_PIECE_BYTES = 1024 * 1024
_MARGIN = 16
"""What the decoder says about the last characters of a window is not final, because a number, a word or an escape may
go on in the next piece. None of them has more characters than this that the decoder looks at without using them."""
_DECODER = json.JSONDecoder()
_JSON_BLANKS = re.compile(r"[ \t\n\r]*")


def iter_raw_records(path: Path | str, *, option: str = "data_path") -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of each record of a JSON array or a JSONL file, in constant memory.

    A file that begins with "[" is one JSON array; any other is JSONL. The number counts from 1; in JSONL it is the
    line's. Blank lines are passed over. The values are as ``json.loads`` gives them, so that they need not be objects.

    Raises:
        UserError: the file cannot be read, is not JSON (the message has the place), or has a record that is too long.
            It is raised when the iteration reaches the mistake.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            window = _Window(file)
            if window.skip_blank_lines() == "[":
                yield from _array_items(window, path=path, option=option)
            else:
                yield from _lines(window, path=path, option=option)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from error


def iter_raw_entries(path: Path | str, *, option: str = "data_path") -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of each entry of a file that is one JSON object, in constant memory.

    Raises:
        UserError: as ``iter_raw_records`` does.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            yield from _object_entries(_Window(file), path=path, option=option)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from error


def _lines(window: _Window, *, path: Path, option: str) -> Iterator[tuple[int, Any]]:
    while (line := window.take_line()) is not None:
        number = window.num_lines  # the line that was taken is the last of them
        if len(line) > MAX_RECORD_CHARS:
            raise UserError(f"{option}: {path}, line {number} {_TOO_LONG}")
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{option}: {path}, line {number} is not valid JSON: {error}; "
                    "expected a JSON array, or one object a line"
                ) from error


_TOO_LONG = f"is longer than the {MAX_RECORD_CHARS} characters that one record may have"


def _array_items(window: _Window, *, path: Path, option: str) -> Iterator[tuple[int, Any]]:
    """The items of the array that the window begins with, each with its number."""
    values = _between(window, "[]", _Window.take_value, what="record", path=path, option=option)
    yield from enumerate(values, start=1)


def _object_entries(window: _Window, *, path: Path, option: str) -> Iterator[tuple[str, Any]]:
    """The entries of the object that the window begins with."""

    def take_entry(window: _Window) -> tuple[str, Any]:
        if window.next_char() != '"':
            raise window.error("Expecting property name enclosed in double quotes", window.start)
        key = window.take_value()
        window.require(":", missing="Expecting ':' delimiter")
        return key, window.take_value()

    yield from _between(window, "{}", take_entry, what="entry", path=path, option=option)


def _between(
    window: _Window, brackets: str, take: Callable[[_Window], T], *, what: str, path: Path, option: str
) -> Iterator[T]:
    """What ``take`` takes between the brackets that the file's text begins and ends with. The messages are those of
    ``json.loads`` for the whole text, with lines and columns of the file."""
    opening, closing = brackets
    number = 0
    try:
        window.require(opening, missing=f"Expecting '{opening}'")
        is_open = window.next_char() != closing
        while is_open:
            number += 1
            yield take(window)
            is_open = window.next_char() != closing
            if is_open:
                window.require(",", missing="Expecting ',' delimiter")
        window.require(closing, missing="Expecting value")
        if window.next_char():
            raise window.error("Extra data", window.start)
    except _TooLongError:
        raise UserError(f"{option}: {path}, {what} {number} {_TOO_LONG}") from None
    except UnicodeDecodeError:  # a ValueError, too
        raise
    except ValueError as error:
        raise UserError(f"{option}: {path} is not valid JSON: {error}") from error


class _TooLongError(Exception):
    """A value of an array has more than ``MAX_RECORD_CHARS`` characters."""


class _Window:
    """A part of a file's text, from ``start`` on, that is moved forward."""

    def __init__(self, file: BinaryIO) -> None:
        self._pieces = _text_pieces(file)
        self._text = ""
        self.start = 0
        """The place in the window's text up to which everything was taken."""
        self.num_lines = 0
        """Lines taken by ``take_line`` or passed over by ``skip_blank_lines``."""
        self._is_at_end = False
        self._chars_before = 0
        self._lines_before = 0
        self._column_before = 0
        """Characters between the last line end and the window's text."""

    def skip_blank_lines(self) -> str:
        """The first character of the text that is no blank, "" without one. Passes over the blank lines before it."""
        while True:
            first = self._text.lstrip()[:1]
            # Blank lines may go, but not blanks in the line of the first character, which count in messages, nor
            # blanks that JSON does not know, which are a mistake before an array.
            blanks = _JSON_BLANKS.match(self._text)
            assert blanks is not None, "the pattern matches nothing, too"
            self.start = self._text.rfind("\n", 0, blanks.end()) + 1
            if first or self._is_at_end or len(self._text) > MAX_RECORD_CHARS:
                self._forget()
                self.num_lines = self._lines_before
                return first
            self._read()

    def take_line(self) -> str | None:
        """The next line without its end, or None after the last. Of a line that is too long only its beginning."""
        looked_at = self.start
        while (end := self._text.find("\n", looked_at)) < 0:
            size = len(self._text) - self.start
            if self._is_at_end or size > MAX_RECORD_CHARS:
                if not size and self._is_at_end:
                    return None
                end = len(self._text)
                break
            self._read()
            looked_at = self.start + size
        line, self.start = self._text[self.start : end], min(end + 1, len(self._text))
        self.num_lines += 1
        return line

    def next_char(self) -> str:
        """The next character that is no blank, which becomes the window's start; "" at the end of the file."""
        while True:
            found = _JSON_BLANKS.match(self._text, self.start)
            assert found is not None, "the pattern matches nothing, too"
            self.start = found.end()
            if self.start < len(self._text) or self._is_at_end:
                return self._text[self.start : self.start + 1]
            self._read()

    def require(self, char: str, *, missing: str) -> None:
        """Takes ``char``, which must come next."""
        if self.next_char() != char:
            raise self.error(missing, self.start)
        self.start += 1

    def take_value(self) -> Any:
        """The next value of the text.

        Raises:
            ValueError: there is none.
            _TooLongError: it is too long.
        """
        self.next_char()
        while True:
            size = len(self._text) - self.start
            try:
                value, end = _DECODER.raw_decode(self._text, self.start)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _MARGIN
                if self._is_at_end or not may_go_on:
                    raise self.error(error.msg, error.pos) from None
            else:
                if self._is_at_end or end <= len(self._text) - _MARGIN:
                    if end - self.start > MAX_RECORD_CHARS:
                        raise _TooLongError
                    self.start = end
                    return value
            if size > MAX_RECORD_CHARS:
                raise _TooLongError
            # What was decoded in vain is at least doubled, so that a long value costs no more than twice its length.
            self._read(at_least=size)

    def error(self, message: str, place: int) -> ValueError:
        """The error of ``json.loads`` at ``place`` of the window's text, with the place in the file."""
        line_end = self._text.rfind("\n", 0, place)
        column = place - line_end if line_end >= 0 else self._column_before + place + 1
        line = self._lines_before + self._text.count("\n", 0, place) + 1
        return ValueError(f"{message}: line {line} column {column} (char {self._chars_before + place})")

    def _forget(self) -> None:
        taken, self._text = self._text[: self.start], self._text[self.start :]
        self.start = 0
        self._chars_before += len(taken)
        self._lines_before += taken.count("\n")
        line_end = taken.rfind("\n")
        self._column_before = len(taken) - line_end - 1 if line_end >= 0 else self._column_before + len(taken)

    def _read(self, *, at_least: int = 0) -> None:
        """Adds ``at_least`` characters to the window, and at least one piece, if the file has them."""
        self._forget()
        pieces, size = [self._text], 0
        while not self._is_at_end and (size == 0 or size < at_least):
            piece = next(self._pieces, None)
            self._is_at_end = piece is None
            pieces.append(piece or "")
            size += len(piece or "")
        self._text = "".join(pieces)


def _text_pieces(file: BinaryIO) -> Iterator[str]:
    """The text of a file in UTF-8, with or without a byte order mark; line ends become newlines.

    Raises:
        UnicodeDecodeError: as for the whole file, with the place in the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    num_bytes, is_last = 0, False
    while not is_last:
        piece = file.read(_PIECE_BYTES)
        is_last = not piece
        num_held = len(decoder.getstate()[0])
        try:
            text = newlines.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            raise _in_file(error, offset=num_bytes - num_held) from None
        num_bytes += len(piece)
        if text:
            yield text


def _in_file(error: UnicodeDecodeError, *, offset: int) -> OSError:
    """The error in the words of one about the whole file."""
    wrong = error.object[error.start : error.end]
    start, end = error.start + offset, error.end + offset - 1
    where = f"byte 0x{wrong[0]:02x} in position {start}" if start == end else f"bytes in position {start}-{end}"
    return OSError(f"'{error.encoding}' codec can't decode {where}: {error.reason}")
