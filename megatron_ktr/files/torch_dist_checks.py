"""Checks a distributed checkpoint before megatron-core or PyTorch read it.

Both unpickle ``.metadata``, and everything that ``.metadata`` calls bytes, without any check. So the directory must
pass these checks first: ``read_metadata`` and ``check_chunks`` before our own code reads chunks
(``files/torch_dist_files.py``), ``require_tensors`` before megatron-core loads.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ktr.errors import UserError
from megatron_ktr.files.safe_pickle import check_torch_object, load_metadata, load_torch_object

COMMON_FILE, METADATA_FILE = "common.pt", ".metadata"


def read_metadata(directory: Path) -> Metadata:
    """Reads ``.metadata``, which describes every tensor and the places of its chunks, without running code in it.

    Raises:
        UserError: the file names a forbidden global, or does not describe a checkpoint.
        OSError: the file cannot be read.
    """
    path = directory / METADATA_FILE
    metadata = load_metadata(path)
    try:
        is_sound = _is_sound(metadata)
    except (AttributeError, TypeError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{path}: damaged: it does not describe a distributed checkpoint")
    return metadata


def _is_sound(metadata: Any) -> bool:
    """Whether all types are right and all chunks lie in files of this directory; readers open these names unchecked."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    return (
        isinstance(metadata, Metadata)
        and isinstance(entries, dict)
        and isinstance(places, dict)
        and all(isinstance(key, str) and _is_sound_entry(entry) for key, entry in entries.items())
        and all(isinstance(index, MetadataIndex) and _is_sound_place(place) for index, place in places.items())
    )


def _is_sound_entry(entry: Any) -> bool:
    if isinstance(entry, BytesStorageMetadata):
        return True
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.properties.dtype, torch.dtype)
        and all(isinstance(size, torch.Size) for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))
    )


def _is_sound_place(place: Any) -> bool:
    numbers = (place.offset, place.length)
    return (
        isinstance(place, _StorageInfo)
        and place.relative_path == Path(place.relative_path).name
        and all(isinstance(number, int) and number >= 0 for number in numbers)
    )


def check_chunks(directory: Path, *, files: Collection[str] | None = None) -> None:
    """Refuses tensors whose pickle may run code, in all ``*.distcp`` files or in ``files``.

    Raises:
        UserError: a chunk is refused or damaged; the message names file and tensor.
        OSError: a file cannot be read.
    """
    metadata = read_metadata(directory)
    by_file: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
    for index, place in metadata.storage_data.items():
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        # Objects stored as bytes are not checked, because ``require_tensors`` makes sure that nobody reads one.
        if is_tensor and (files is None or place.relative_path in files):
            by_file.setdefault(place.relative_path, []).append((index, place))
    for name, chunks in by_file.items():
        with open(directory / name, "rb") as file:
            for index, place in chunks:
                view = _create_file_view(file, place.offset, place.length)
                check_torch_object(view, where=f"{directory / name}, tensor {index.fqn}")


def require_tensors(directory: Path, keys: Collection[str]) -> None:
    """Checks, before megatron-core loads ``keys``, that all of them are tensors and that ``common.pt`` is plain data.

    PyTorch unpickles everything that ``.metadata`` calls bytes, even if a tensor was asked for.

    Raises:
        UserError: a key is missing or holds bytes, or a file names a forbidden global.
        OSError: a file cannot be read.
    """
    stored = read_metadata(directory).state_dict_metadata
    if missing := sorted(key for key in keys if key not in stored):
        raise UserError(f"{directory}: {len(missing)} tensors missing: {', '.join(missing[:4])}")
    if wrong := sorted(key for key in keys if not isinstance(stored[key], TensorStorageMetadata)):
        raise UserError(f"{directory / METADATA_FILE}: refused: {wrong[0]} holds pickled bytes, expected a tensor")
    # megatron-core 0.19 does not write ``common.pt``.
    if (directory / COMMON_FILE).exists() and not isinstance(load_torch_object(directory / COMMON_FILE), dict):
        raise UserError(f"{directory / COMMON_FILE}: damaged: expected a dictionary")
