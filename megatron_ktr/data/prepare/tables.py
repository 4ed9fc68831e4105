"""Reads tables row by row: parquet files, Arrow files, and folders of Hugging Face ``datasets``.

    save_to_disk        state.json and data-00000-of-00002.arrow, ...; dataset_dict.json and a folder for each split
    snapshot of a hub   train-00000-of-00002.parquet, ... in the folder, or below data/ or the name of a configuration

Batches of rows are read one after another, so that the size of a table does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import read_json_object
from megatron_ktr.files.listing import paths_in

OPTION = "convert"
SUFFIXES = (".parquet", ".arrow")
_SHARD = re.compile(r"(.+?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
_ROWS, _ROWS_WITH_BYTES = 512, 8
"""Rows of a batch; rows that may hold whole media come in small batches."""


def iter_table_rows(path: Path, *, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of a table, with numbers from 1 on through all its files.

    Raises:
        UserError: there is no table, it is damaged, or the folder has several splits and ``split`` names none of them.
    """
    files = _files_of(path, split=split) if path.is_dir() else [path]
    if split is not None and not path.is_dir():
        raise UserError(f"--split {split}: {path} is one file, not a Hugging Face data set")
    number = 0
    for file in files:
        try:
            for row in _file_rows(file):
                number += 1
                yield number, row
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{OPTION}: {file} cannot be read as a table: {error}") from error


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    open_file(path).close()  # the libraries below would wait for the writer of a pipe
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_num_rows(file.schema_arrow)):
                yield from batch.to_pylist()
        return
    with pa.OSFile(str(path), "rb") as source:
        try:
            # What ``datasets`` writes is a stream.
            reader = pa.ipc.open_stream(source)
            batches: Any = iter(reader)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        num_rows = _num_rows(reader.schema)
        for batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, num_rows):
                yield from batch.slice(start, num_rows).to_pylist()


def _num_rows(schema: pa.Schema) -> int:
    return _ROWS_WITH_BYTES if any("binary" in str(field.type) for field in schema) else _ROWS


def _files_of(folder: Path, *, split: str | None) -> list[Path]:
    """The table files of a folder, in order."""
    splits = _saved_splits(folder) or _published_splits(folder)
    if not splits:
        raise UserError(
            f"{OPTION}: {folder} is a folder without tables: expected state.json, dataset_dict.json or parquet files "
            "in it or in data/; name the file where the annotations are JSON, CSV or text"
        )
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split is None or split not in splits:
        what = f"--split {split}: {folder} has" if split is not None else f"{OPTION}: {folder} has several splits;"
        raise UserError(f"{what} {', '.join(sorted(splits))}; name one with --split")
    return _whole(split, splits[split])


def _whole(split: str, files: list[Path]) -> list[Path]:
    """The files of a split, if all that their names count are there ("train-00000-of-00002")."""
    found = [match for file in files if (match := _SHARD.fullmatch(file.stem))]
    expected = [(str(place), str(len(files))) for place in range(len(files))]
    if found and sorted((str(int(match.group(2))), str(int(match.group(3)))) for match in found) != sorted(expected):
        raise UserError(
            f"{OPTION}: {files[0].parent} has {len(files)} files of the split {split}, whose names count "
            f"{int(found[0].group(3))}: is the download whole?"
        )
    return files


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> files of what ``save_to_disk`` wrote; empty where it wrote nothing."""
    if (folder / "dataset_dict.json").is_file():
        names = read_json_object(folder / "dataset_dict.json", option=OPTION).get("splits")
        if not isinstance(names, list) or not names:
            raise UserError(f"{OPTION}: expected names of splits in {folder / 'dataset_dict.json'}, got {names!r:.80}")
        return {name: _saved_files(folder / name) for name in map(_plain_name, names)}
    if (folder / "state.json").is_file():
        return {"train": _saved_files(folder)}
    return {}


def _saved_files(folder: Path) -> list[Path]:
    state = read_json_object(folder / "state.json", option=OPTION)
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise UserError(f"{OPTION}: expected a list of files in _data_files of {folder / 'state.json'}")
    if state.get("_indices_files"):
        raise UserError(f"{OPTION}: {folder} selects rows by indices: save it again after flatten_indices()")
    return [folder / _plain_name(file.get("filename")) for file in files]


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{OPTION}: expected the name of a file or split in a data set's JSON, got {name!r:.80}")
    return name


def _published_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> parquet files of a folder, or of its only folder that has some."""
    if files := paths_in(folder, "*.parquet"):
        splits: dict[str, list[Path]] = {}
        for file in files:
            match = _SHARD.fullmatch(file.stem)
            splits.setdefault(match.group(1) if match else file.stem, []).append(file)
        return splits
    inner = [inner for inner in paths_in(folder) if inner.is_dir() and paths_in(inner, "*.parquet")]
    if len(inner) > 1:
        raise UserError(f"{OPTION}: {folder} has several tables; name one of the folders {[one.name for one in inner]}")
    return _published_splits(inner[0]) if inner else {}
