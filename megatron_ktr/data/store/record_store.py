"""The records of a question file in memory that the processes of a machine share.

The file is streamed once into an Arrow file in a cache directory, named by its content. All ranks and runs map that
file into memory; a record is parsed and checked when it is drawn. A small file is kept in the process's own memory in
the same form, so that small runs leave nothing in the cache. The columns:

    number          place in the question file, from 1 (in JSONL the line)
    text            JSON of the record as it was written, without blanks; empty if ``fault`` says that it has none
    fault           why the record cannot be written as JSON (``records.write_down``); null for nearly all
    digest          16 bytes, ``records.record_digest``
    problem_type    "" where it is missing, null where it is no text
    id_hash         xxh3_64 of the problem id, to find repeated ones
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash
from tqdm import tqdm

from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.data.records import Record, check_record, repeated_ids_text, write_down
from megatron_ktr.data.store.sealed import cache_directory, content_digest, open_sealed, sole_writer, write_sealed
from megatron_ktr.errors import UserError

FORMAT = 1
"""Counts the forms that stores had. A store of another form is left alone."""
IN_MEMORY_BYTES = 8 * 1024 * 1024
"""Smaller question files are kept in memory, unless a directory was chosen."""
_BATCH = 4096
SECONDS_BEFORE_PROGRESS = 5
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("text", pa.large_binary()),
        ("fault", pa.string()),
        ("digest", pa.binary(16)),
        ("problem_type", pa.string()),
        ("id_hash", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class RecordRules:
    """What a run makes of the records of a file. The fields are those of ``records.check_record`` and
    ``read_records``."""

    problem_types: tuple[str, ...] = ()
    needs_solution: bool = True
    needs_reply: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreFile:
    """Where a store is kept."""

    directory: Path
    content: str
    """The digest of the question file."""

    @property
    def path(self) -> Path:
        return self.directory / f"{self.content}-v{FORMAT}.arrow"


class RecordStore(Sequence[Record]):
    """The records of a file that a run uses, checked when they are drawn."""

    def __init__(self, table: pa.Table, rules: RecordRules, *, path: Path, file: StoreFile | None = None) -> None:
        """``path`` is the question file, for messages; ``file`` is where the table lies, None if only in memory.

        Raises:
            UserError: no record is left.
        """
        self.rules = rules
        self.path = path
        self.file = file
        self.table = table
        self._rows: np.ndarray | None = None
        if rules.problem_types:
            # A record without a valid type is not left out, because it may be meant to be of a wanted type.
            wanted = {*rules.problem_types, None}
            types = (name for chunk in table.column("problem_type").chunks for name in chunk.to_pylist())
            self._rows = np.flatnonzero(np.fromiter((name in wanted for name in types), bool, count=len(table)))
        if not len(self):
            found = sorted(name for name in table.column("problem_type").unique().to_pylist() if name is not None)
            none_of = f"none of problem_types {sorted(rules.problem_types)}; found {found}"
            raise UserError(f"data_path: {path} has {none_of if len(table) else 'no records at all'}")

    def __len__(self) -> int:
        return len(self.table) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """The record at a place, read and checked anew.

        Raises:
            ValueError: the record is not usable as a question.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.row_of(index)
        number = self.table.column("number")[row].as_py()
        fault = self.table.column("fault")[row].as_py()
        if fault is not None:
            raise ValueError(fault)
        rules = self.rules
        record = check_record(
            json.loads(self.table.column("text")[row].as_py()),
            number=number,
            needs_solution=rules.needs_solution,
            needs_reply=rules.needs_reply,
            ignored=rules.ignored,
        )
        digest = self.table.column("digest")[row].as_py().hex()
        return {**record, "record_number": number, "record_digest": digest}

    def row_of(self, index: int) -> int:
        """The row of the table that holds the record at a place."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"place {index} of {len(self)} records")
        index %= len(self)
        return index if self._rows is None else int(self._rows[index])

    def number_of(self, index: int) -> int:
        """The number of the record in its file."""
        return int(self.table.column("number")[self.row_of(index)].as_py())

    @cached_property
    def records_digest(self) -> str:
        """As ``records.digest_of_records`` for a list of the same records."""
        together = xxhash.xxh3_128()
        for chunk in self._column("digest").chunks:
            for digest in chunk.to_pylist():
                together.update(digest.hex().encode())
        return together.hexdigest()

    def describe_repeated_ids(self) -> str | None:
        """A sentence about problem ids that several records share; None if every id is unique."""
        hashes = self._column("id_hash").to_numpy()
        unique, first_places, counts = np.unique(hashes, return_index=True, return_counts=True)
        if len(unique) == len(hashes):
            return None
        first = int(first_places[counts > 1].min())
        second = first + 1 + int(np.argmax(hashes[first + 1 :] == hashes[first]))
        number = int(counts[counts > 1].sum())
        raw = json.loads(self.table.column("text")[self.row_of(first)].as_py() or b"null")
        name = raw.get("problem_id") if isinstance(raw, dict) else None
        return repeated_ids_text(
            number,
            len(self),
            first=self.number_of(first),
            second=self.number_of(second),
            problem_id=str(name),
        )

    def _column(self, name: str) -> pa.ChunkedArray:
        column = self.table.column(name)
        return column if self._rows is None else column.take(pa.array(self._rows))


def open_store(
    path: Path | str, rules: RecordRules, *, directory: str | None = None, show_progress: bool = False
) -> RecordStore:
    """The records of a question file.

    Args:
        directory: where stores are kept (``--record-store-dir``); None means the user's cache directory, and memory for
            small files.

    Raises:
        UserError: the file cannot be read, is no JSON or has no records; or the directory cannot be written.
    """
    path = Path(path)
    _refuse_streams(path)
    if directory is None and _size_of(path) < IN_MEMORY_BYTES:
        return RecordStore(pa.Table.from_batches(_batches(path), SCHEMA), rules, path=path)
    file = StoreFile(cache_directory(directory), content_digest(path, option="data_path"))
    table = open_sealed(file.path)
    if table is None:
        with sole_writer(file.directory, file.path.name):
            table = open_sealed(file.path)  # another process may have written it meanwhile
            if table is None:
                _write(path, file, show_progress=show_progress)
        table = table or open_sealed(file.path)
        assert table is not None, "it was just written"
    return RecordStore(table, rules, path=path, file=file)


def _write(path: Path, file: StoreFile, *, show_progress: bool) -> None:
    def write(writer: pa.ipc.RecordBatchFileWriter) -> None:
        with progress(f"reading {path.name}", total=None, is_shown=show_progress) as bar:
            for batch in _batches(path):
                writer.write_batch(batch)
                bar.update(len(batch))
        if content_digest(path, option="data_path") != file.content:
            raise UserError(f"data_path: {path} was changed while it was read: start again")

    write_sealed(file.path, schema=SCHEMA, write=write)


def progress(what: str, *, total: int | None, is_shown: bool) -> tqdm:
    """A bar of records on the error stream, for work that takes more than a few seconds."""
    return tqdm(
        desc=what,
        total=total,
        unit=" records",
        delay=SECONDS_BEFORE_PROGRESS,
        mininterval=1.0 if sys.stderr.isatty() else 30.0,
        disable=not is_shown,
    )


def _refuse_streams(path: Path) -> None:
    """Pipes and devices may never end, and give every rank that reads them something else."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # reading it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"data_path: {path} is a pipe or a device: expected a file, which every rank can read")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it says why


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    rows = iter_raw_records(path)
    while batch := list(islice(rows, _BATCH)):
        yield _batch_of(batch)


def _batch_of(numbered: Iterable[tuple[int, Any]]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, raw in numbered:
        written = write_down(raw)
        columns["number"].append(number)
        columns["text"].append(written.text)
        columns["fault"].append(written.fault)
        columns["digest"].append(bytes.fromhex(written.digest))
        columns["problem_type"].append(problem_type_of(raw))
        columns["id_hash"].append(_id_hash(raw, number=number))
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def problem_type_of(raw: Any) -> str | None:
    """The type by which --problem-types chooses: "" where it is missing, None where it is no text."""
    value = (raw.get("problem_type") or "") if isinstance(raw, dict) else None
    # Half a character, which no column can hold, is written as a number: no wanted type has it either way.
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else None


def _id_hash(raw: Any, *, number: int) -> int:
    value = raw.get("problem_id", number) if isinstance(raw, dict) else number
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return xxhash.xxh3_64_intdigest(str(value if is_name else number).encode(errors="surrogatepass"))
