"""Reads published files row by row, in constant memory: JSON, JSONL, one JSON object, CSV, TSV, text lines, tables.

A row is what one published record is: an object, an entry of a file that is one object (``Keyed``), or a line of text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ktr.data.prepare import tables
from megatron_ktr.data.prepare.layout import Keyed, Unreadable
from megatron_ktr.data.raw_records import MAX_RECORD_CHARS, iter_raw_entries, iter_raw_records
from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import parse_json

OPTION = "convert"
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""
_BEGINNING = 4096
SUFFIXES = (*_JSON_SUFFIXES, *_DELIMITERS, ".txt", *tables.SUFFIXES)


def iter_rows(path: Path, *, split: str | None) -> Iterator[tuple[int, Any]]:
    """Yields (number, row) of a file or of a folder with tables. The number counts from 1; in JSONL and text files it
    is the line's, in CSV files the row's behind the heading.

    Args:
        split: which part of a Hugging Face data set to read.

    Raises:
        UserError: the path cannot be read, or is none of these.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in tables.SUFFIXES:
        return tables.iter_table_rows(path, split=split)
    if split is not None:
        raise UserError(f"--split {split}: {path} is one file, not a Hugging Face data set")
    if suffix in _JSON_SUFFIXES:
        return _json_rows(path)
    if suffix in _DELIMITERS:
        return _csv_rows(path, delimiter=_DELIMITERS[suffix])
    if suffix == ".txt":
        return _text_rows(path)
    if not path.exists():
        raise UserError(f"{OPTION}: {path}: no such file or folder")
    raise UserError(f"{OPTION}: {path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if _is_one_object(path):
        entries = iter_raw_entries(path, option=OPTION)
        return ((number, Keyed(key, value)) for number, (key, value) in enumerate(entries, start=1))
    return iter_raw_records(path, option=OPTION)


def _is_one_object(path: Path) -> bool:
    """Whether a file is one JSON object of objects, such as video -> questions, rather than an array or JSONL.

    Its first line tells: in JSONL it is an object by itself, and further lines follow or its values are no objects.
    """
    try:
        with open_file(path) as file:
            # An array may be one line of the whole file, which is not worth reading for its first character.
            if file.read(_BEGINNING).removeprefix(_MARK).lstrip()[:1] not in (b"{", b""):
                return False
            file.seek(0)
            line = _first_line(file)
            if not line.startswith(b"{"):
                return False
            has_more = bool(_first_line(file))
    except OSError as error:
        raise UserError(f"{OPTION}: {path} cannot be read: {error}") from error
    if len(line) >= MAX_RECORD_CHARS:
        return True
    try:
        value = parse_json(line.decode("utf-8", errors="replace"))
    except ValueError:
        # A line that is no JSON by itself: an object over several lines, or JSONL with a damaged first line.
        return line.strip() == b"{" or line.rstrip().endswith((b"{", b"[", b",", b":"))
    return not has_more and isinstance(value, dict) and bool(value) and all(isinstance(v, dict) for v in value.values())


def _first_line(file: BinaryIO) -> bytes:
    """The next line that is not blank, or its first ``MAX_RECORD_CHARS`` bytes; empty at the end."""
    num_lines = 0
    while line := file.readline(MAX_RECORD_CHARS):
        line = line.removeprefix(_MARK).lstrip()
        num_lines += 1
        if line or num_lines > MAX_RECORD_CHARS:
            return line
    return b""


def _csv_rows(path: Path, *, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_RECORD_CHARS)
    number = 0
    try:
        with _open_text(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            heading = [name.strip() for name in next(reader, [])]
            if len(set(heading)) != len(heading) or not all(heading):
                raise UserError(f"{OPTION}: {path}: expected a heading of different names, got {heading[:20]}")
            for row in reader:
                if row:
                    number += 1
                    # Not cut or filled up: a row of another length has lost a quote or a comma.
                    lacks = Unreadable(f"expected {len(heading)} columns as in the heading, got {len(row)}")
                    yield number, dict(zip(heading, row, strict=True)) if len(row) == len(heading) else lacks
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{OPTION}: {path} cannot be read behind row {number}: {error}") from error


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open_text(path, newline=None) as file:
            number = 0
            while line := file.readline(MAX_RECORD_CHARS):
                number += 1
                if line.strip():
                    yield number, line.strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{OPTION}: {path} cannot be read: {error}") from error


def _open_text(path: Path, *, newline: str | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline=newline)
