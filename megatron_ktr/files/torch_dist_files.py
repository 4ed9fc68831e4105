"""Reads and writes megatron-core's distributed checkpoints tensor by tensor, without a process group.

A ``torch_dist`` directory is a PyTorch distributed checkpoint (``.metadata``: shapes and the place of every chunk;
``*.distcp``: chunks, each written by ``torch.save``) plus two files of megatron-core (``metadata.json``: the format,
``common.pt``: everything that is not a tensor). Any rank may have written a chunk; that does not matter for reading.

PyTorch's own code needs too much memory. Its ``FileSystemWriter`` resolves data lazily, but keeps every tensor of a
file until the file is closed (torch 2.13). Its loader fills whole tensors, and one tensor may be all layers stacked.
The writer in this file writes each chunk as it comes, and the reader can read any region of a tensor.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ktr.errors import UserError, is_transient, unreadable
from megatron_ktr.files.checksums import Digest, HashingFile, write_hashed
from megatron_ktr.files.safe_pickle import UNREADABLE
from megatron_ktr.files.torch_dist_checks import COMMON_FILE, METADATA_FILE, read_metadata

FORMAT_FILE = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Shape = tuple[int, ...]


class TorchDistWriter:
    """Appends chunks to ``__0_N.distcp`` files; ``finish`` makes the directory a checkpoint.

    Args:
        directory: an existing, empty directory.
        max_file_bytes: a new file starts when the current one has reached this size.
    """

    def __init__(self, directory: Path, *, max_file_bytes: int = 4_000_000_000) -> None:
        self.directory = directory
        self.max_file_bytes = max_file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: HashingFile | None = None
        self._open_file: Any = None
        self._num_files = 0
        self.digests: dict[str, Digest] = {}
        """The digest of every file, by name; complete after ``finish``."""

    def write(self, key: str, tensor: Tensor, *, offset: Shape, global_shape: Shape) -> None:
        """Stores ``tensor`` as the chunk of tensor ``key`` that starts at ``offset``.

        ``offset`` and ``global_shape`` may have more leading axes than the tensor, which is then one layer of a stack.
        """
        file = self._current_file()
        start = file.tell()
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor.view((1,) * (len(global_shape) - tensor.ndim) + tuple(tensor.shape))
        save_tensor(tensor, file)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=tensor.shape)
        stored = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(global_shape), [])
        )
        if stored.properties.dtype != tensor.dtype:
            raise UserError(f"{key}: all layers must have one dtype, got {stored.properties.dtype} and {tensor.dtype}")
        index = MetadataIndex(key, offset, len(stored.chunks))
        stored.chunks.append(chunk)
        self._places[index] = _StorageInfo(self._file_name, start, file.tell() - start)

    def finish(self) -> None:
        self.close()
        metadata = Metadata(dict(self._tensors), storage_data=self._places, storage_meta=StorageMeta(), version="1.0.0")
        self._write_whole(METADATA_FILE, pickle.dumps(metadata))
        self._write_whole(COMMON_FILE, torch_saved({}))
        # Write this file last, because megatron-core regards a directory that has it as a complete checkpoint.
        self._write_whole(FORMAT_FILE, json.dumps(FORMAT).encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            self.digests[self._file_name] = self._file.digest
            self._open_file.close()
            self._file = None

    def _write_whole(self, name: str, content: bytes) -> None:
        self.digests[name] = write_hashed(self.directory / name, content)

    @property
    def _file_name(self) -> str:
        return f"__0_{self._num_files - 1}{DEFAULT_SUFFIX}"

    def _current_file(self) -> HashingFile:
        if self._file is not None and self._file.tell() >= self.max_file_bytes:
            self.close()
        if self._file is None:
            self._num_files += 1
            self._open_file = open(self.directory / self._file_name, "wb")  # noqa: SIM115
            self._file = HashingFile(self._open_file)
        return self._file


def torch_saved(value: Any) -> bytes:
    """The bytes that ``torch.save`` writes.

    They are written to memory first, because ``torch.save`` to a file turns the error of a full disk into a
    RuntimeError.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def save_tensor(tensor: Tensor, file: Any) -> None:
    """``torch.save`` that raises ``OSError`` for a full disk, which torch's zip writer turns into a RuntimeError."""
    guarded: Any = _GuardedFile(file)  # it has the methods of a file that torch's zip writer calls
    try:
        # ``torch.save`` of a view would save all of the larger tensor, so copy a view first.
        torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), guarded)
    except Exception:
        if guarded.error is not None:
            raise guarded.error from None
        raise


class _GuardedFile:
    """Remembers the first ``OSError`` of ``write``."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


@dataclass(frozen=True)
class Region:
    """A part of a stored tensor, and the tensor into which it is read."""

    key: str
    offset: Shape
    target: Tensor
    """It has as many axes as the stored tensor, and any dtype and device."""


class TorchDistReader:
    """Random access to the tensors of a distributed checkpoint, whatever layout wrote it.

    Raises:
        UserError: the directory is not a distributed checkpoint (the message names checkpoints inside it, if any), or
            it is damaged.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        _require_checkpoint(self.directory)
        self._reader = FileSystemReader(self.directory)
        with _reporting_damage(self.directory):
            self._metadata = read_metadata(self.directory)
        self._reader.set_up_storage_reader(self._metadata, True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def read(self, key: str, *, offset: Shape, shape: Shape) -> Tensor:
        """Reads the region of tensor ``key`` that has this ``shape`` and starts at ``offset``.

        If the region is exactly one stored chunk, only that chunk is in memory. If it is assembled from several chunks,
        the region and one chunk at a time are in memory.
        """
        region = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, self.tensors[key], [region])
        covered = sum(item.lengths.numel() for item in items)
        if covered != torch.Size(shape).numel():
            raise UserError(f"{self.directory}: tensor {key}: stored chunks do not cover {shape} at {offset}")
        with _reporting_damage(self.directory):
            place = self._metadata.storage_data[items[0].storage_index]
            if region in self.tensors[key].chunks and not place.transform_descriptors:
                return self._read_chunk(place)
            target: Any = _RegionTarget(shape, self.tensors[key].properties.dtype)  # stands in for a load planner
            self._reader.read_data(LoadPlan(items), target)
            return target.tensor

    def fill(self, regions: Sequence[Region]) -> None:
        """Reads all regions; each stored chunk is read once, and only one chunk at a time is in memory besides them."""
        by_key: dict[str, list[Region]] = {}
        for region in regions:
            by_key.setdefault(region.key, []).append(region)
        parts: dict[MetadataIndex, list[tuple[ReadItem, Tensor]]] = {}
        places = self._metadata.storage_data
        with _reporting_damage(self.directory):
            for key, wanted in by_key.items():
                if len({one.offsets for one in self.tensors[key].chunks}) < len(self.tensors[key].chunks):
                    raise UserError(f"{self.directory}: tensor {key}: two stored chunks are of one place")
                boxes = [ChunkStorageMetadata(torch.Size(one.offset), one.target.shape) for one in wanted]
                items = create_read_items_for_chunk_list(key, self.tensors[key], boxes)
                if sum(item.lengths.numel() for item in items) != sum(one.target.numel() for one in wanted):
                    raise UserError(f"{self.directory}: tensor {key}: stored chunks do not cover what is read of it")
                for item in items:
                    parts.setdefault(item.storage_index, []).append((item, wanted[_number_of(item.dest_index)].target))
            for index in sorted(parts, key=lambda index: (places[index].relative_path, places[index].offset)):
                chunk = self._read_chunk(places[index])
                self._require_as_described(index, chunk)
                for item, target in parts[index]:
                    _narrowed(target, item.dest_offsets, item.lengths).copy_(
                        _narrowed(chunk, item.storage_offsets, item.lengths)
                    )

    def _require_as_described(self, index: MetadataIndex, chunk: Tensor) -> None:
        stored = self.tensors[index.fqn]
        described = stored.chunks[_number_of(index)].sizes
        if chunk.shape != described or chunk.dtype != stored.properties.dtype:
            raise UserError(
                f"{self.directory}: tensor {index.fqn}: the chunk at {tuple(index.offset or ())} is "
                f"{tuple(chunk.shape)} of {chunk.dtype}, expected {tuple(described)} of {stored.properties.dtype}"
            )

    def _read_chunk(self, place: _StorageInfo) -> Tensor:
        if place.transform_descriptors:
            raise UserError(f"{self.directory / place.relative_path}: compressed chunks are not read here")
        with open(self.directory / place.relative_path, "rb") as file:
            chunk: Any = _create_file_view(file, place.offset, place.length)
            return torch.load(chunk, map_location="cpu", weights_only=True)


class _RegionTarget:
    """The part of a load planner's interface that ``FileSystemReader.read_data`` uses."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(shape, dtype=dtype)

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        return _narrowed(self.tensor, item.dest_offsets, item.lengths)

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Does nothing, because the data has already been copied into place."""


def _number_of(index: MetadataIndex) -> int:
    """The place of a chunk in its tensor's list of chunks; torch lets an index leave it out, but ours never do."""
    assert index.index is not None, index
    return index.index


def _narrowed(tensor: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _require_checkpoint(directory: Path) -> None:
    try:
        found = json.loads((directory / FORMAT_FILE).read_text(encoding="utf-8"))["sharded_backend"]
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise unreadable(directory / FORMAT_FILE, error) from error
        raise _no_checkpoint(directory) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_checkpoint(directory) from error
    if found != FORMAT["sharded_backend"]:
        raise UserError(f"{directory}: expected a checkpoint of format torch_dist, got {found!r}")


def _no_checkpoint(directory: Path) -> UserError:
    inside = sorted(path.parent.name for path in directory.glob(f"*/{FORMAT_FILE}"))
    hint = f"; it contains checkpoints: {', '.join(inside)}" if inside else ""
    return UserError(f"{directory}: not a Megatron distributed checkpoint (no valid {FORMAT_FILE}){hint}")


@contextlib.contextmanager
def _reporting_damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, *UNREADABLE) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise unreadable(error.filename or directory, error) from error
        raise UserError(f"{directory}: damaged or incomplete checkpoint: {error}") from error
