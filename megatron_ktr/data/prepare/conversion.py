"""Turns published files into one question file, record by record.

    rows --layout.split, layout.convert--> record --checks--> line of DIR/NAME.jsonl

A record that cannot be converted, or that training could not read, is skipped and counted. The file is written beside
its place and renamed at the end, so that it is there whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ktr.data.media.request import unread_instructions
from megatron_ktr.data.prepare.embedded import EmbeddedMedia
from megatron_ktr.data.prepare.fields import short
from megatron_ktr.data.prepare.layout import Keyed, Layout, Options, Record, Unreadable
from megatron_ktr.data.prepare.layouts import load_layouts
from megatron_ktr.data.prepare.tally import Tally
from megatron_ktr.data.prepare.unique_ids import UniqueIds
from megatron_ktr.data.raw_records import MAX_RECORD_CHARS
from megatron_ktr.data.records import check_record
from megatron_ktr.errors import UserError

_NUM_LOOKED_AT = 32
_MARKER = re.compile(r"<(image|video)>")
Rows = Iterator[tuple[int, Any]]


def recognise(rows: Rows, *, path: Path) -> tuple[Layout, Rows]:
    """The layout of a file, from its first rows, and all its rows again.

    Raises:
        UserError: no layout has their fields; the message has the fields.
    """
    first = list(itertools.islice(rows, _NUM_LOOKED_AT))
    if not first:
        raise UserError(f"convert: {path} has no records at all")
    values = [value for _, value in first]
    # Some records of a good file may be damaged: half of them decide.
    for layout in load_layouts().values():
        if sum(layout.recognises(value) for value in values) * 2 >= len(values):
            return layout, itertools.chain(first, rows)
    raise UserError(
        f"--from auto: {path} has the fields of no known layout ({_fields(values[0])}); see convert --list, "
        "or say what its columns are: --from plain --columns video=..,question=..,answer=.."
    )


def _fields(value: Any) -> str:
    if isinstance(value, Keyed):
        return f"an object with the key {short(value.key)}, whose value has {_fields(value.value)}"
    return f"fields {short(list(value)[:20])}" if isinstance(value, dict) else short(value)


@dataclass
class Conversion:
    """One question file that is being written."""

    layout: Layout
    options: Options
    media: EmbeddedMedia
    ids: UniqueIds

    def convert(self, rows: Rows, file: BinaryIO, *, tally: Tally) -> None:
        """Writes the records of ``rows`` and counts them in ``tally``.

        Raises:
            UserError: the rows cannot be read on, or embedded media exceed their limit.
        """
        for number, row in rows:
            for part in self._parts(number, row, tally=tally):
                tally.num_read += 1
                try:
                    # The media are not written before their record is known to be good.
                    record, checked = self._checked(part, number=number)
                    line = _line(record)
                except ValueError as error:
                    tally.skipped.add(number, error)
                    continue
                self.media.write()
                file.write(line)
                tally.add(checked)

    def _parts(self, number: int, row: Any, *, tally: Tally) -> Iterable[Any]:
        try:
            if isinstance(row, Unreadable):
                raise ValueError(row.reason)
            self._refuse_unread(row.value if isinstance(row, Keyed) else row)
            return self.layout.split(self.media.take_out(row))
        except ValueError as error:
            tally.num_read += 1
            tally.skipped.add(number, error)
            return ()

    def _refuse_unread(self, row: Any) -> None:
        """Raises ``ValueError`` for fields that would change what is seen or learnt, and that the layout drops."""
        read = {*self.layout.reads, *self.options.columns.values(), *self.options.ignored}
        if isinstance(row, dict) and (unread := unread_instructions(row, read=read)):
            raise ValueError(
                f"the field '{unread[0]}' would be lost, which {self.layout.name} does not have "
                f"(where it is only data: --ignore-fields {unread[0]})"
            )

    def _checked(self, part: Any, *, number: int) -> tuple[Record, Record]:
        """The record to write, and the same as training would read it. Raises ``ValueError``."""
        record = self.layout.convert(part, self.options)
        is_supervised = self.layout.is_supervised
        problem_id = record.get("problem_id") or str(number)
        record = {**record, "problem_id": problem_id}
        checked = check_record(record, number=number, needs_solution=not is_supervised, needs_reply=is_supervised)
        _check_markers(record, checked)
        # The last step, because an id that is taken cannot be given back.
        record["problem_id"] = self.ids.make_unique(problem_id, number=number)
        return record, checked


def _check_markers(record: Mapping[str, Any], checked: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where markers stand in the text, but not one for each of the media."""
    asked = [record.get("problem", ""), *record.get("options", ())]
    asked += [turn["content"] for turn in record.get("messages", ()) if turn["role"] == "user"]
    found = [match.group(1) for written in asked for match in _MARKER.finditer(written)]
    for kind in ("image", "video"):
        num_media = sum(medium == kind for medium, _ in checked["media"])
        if found and found.count(kind) != num_media:
            raise ValueError(f"{found.count(kind)} markers <{kind}> in the text for {num_media} {kind}s")


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line = f"{text}\n".encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected text in whole characters and finite numbers: {error}") from error
    if len(text) > MAX_RECORD_CHARS:
        raise ValueError(f"the record has {len(text)} characters, more than {MAX_RECORD_CHARS}")
    return line
