"""Hugging Face model directories on disk: lazy reading of safetensors shards, streamed writing, side files.

Nothing here holds more than one tensor in memory. The reader returns slices of memory-mapped files. The writer makes
every shard's header from names, shapes and dtypes alone, then appends tensors as they come.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ktr.errors import UserError, unreadable
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.chat_template import set_chat_template
from megatron_ktr.files.checksums import MANIFEST, Digest, HashingFile
from megatron_ktr.files.json_files import read_json_object
from megatron_ktr.files.listing import paths_in

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDE_FILE_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
"""Patterns of the side files: config, tokenizer, processor, chat template, generation config, licence. The weights'
index also matches, but ``copy_side_files`` leaves it out."""

DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


def published_name(name: str) -> str:
    """Converts Hugging Face's in-memory parameter name to the name in published checkpoints and in our exports."""
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class SafetensorsReader:
    """All tensors of a directory's ``*.safetensors`` files, under canonical names, read slice by slice.

    ``rename`` maps a stored name to the canonical one. Every file is opened (headers only) at construction.

    Raises:
        UserError: there are no weights, a file that the index names is missing, a file is damaged or cannot be read, or
            a tensor is stored twice.
    """

    def __init__(self, directory: Path | str, *, rename=lambda name: name) -> None:
        self.directory = Path(directory)
        self.infos: dict[str, TensorInfo] = {}
        self._location: dict[str, tuple[Path, str]] = {}
        self._open_files: dict[Path, Any] = {}
        for path in _weight_files(self.directory):
            _require_readable(path)
            with _reporting_damage(path):
                handle = self._open_files[path] = safe_open(path, framework="pt")
                for stored in handle.keys():  # noqa: SIM118 (not a mapping)
                    piece = handle.get_slice(stored)
                    self._add(path, stored, rename(stored), tuple(piece.get_shape()), piece.get_dtype())

    def _add(self, path: Path, stored: str, name: str, shape: tuple[int, ...], dtype_name: str) -> None:
        if name in self.infos:
            other = self._location[name]
            raise UserError(f"tensor {name} is stored twice: as {other[1]} in {other[0]} and as {stored} in {path}")
        if dtype_name not in DTYPE_NAMES:
            raise UserError(f"{path}: tensor {stored} has the unsupported dtype {dtype_name}")
        self.infos[name] = TensorInfo(name, shape, DTYPE_NAMES[dtype_name])
        self._location[name] = (path, stored)

    def read(self, name: str, axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Returns ``tensor.narrow(axis, start, length)`` and reads only these bytes."""
        path, stored = self._location[name]
        with _reporting_damage(path):
            piece = self._open_files[path].get_slice(stored)
            stop = self.infos[name].shape[axis] if length is None else start + length
            return piece[(slice(None),) * axis + (slice(start, stop),)]


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face model directory")
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: expected an object weight_map with a file's name for each tensor")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{index} names files that do not exist: {', '.join(missing)}")
        return [directory / name for name in names]
    files = paths_in(directory, "*.safetensors")
    if not files:
        raise UserError(f"{directory}: no *.safetensors file; expected a Hugging Face model directory with weights")
    return files


def _require_readable(path: Path) -> None:
    """Raises ``UserError`` if the system cannot open the file: safetensors calls any such file missing."""
    try:
        open_file(path).close()
    except OSError as error:
        raise unreadable(path, error) from error


@contextlib.contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None


class SafetensorsWriter:
    """Writes the announced tensors, in the announced order, to shards of at most ``max_shard_bytes`` each.

    A tensor larger than that gets a shard of its own. File names and index follow Hugging Face.
    """

    def __init__(self, directory: Path, infos: Sequence[TensorInfo], *, max_shard_bytes: int) -> None:
        self.directory = directory
        self._shards = _split_shards(infos, max_shard_bytes=max_shard_bytes)
        count = len(self._shards)
        self._names = (
            [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Digest]:
        """Writes ``tensors``, which must be exactly the announced ones; it checks their names, shapes and dtypes.

        Returns the checksums of the shards, by name.
        """
        stream, digests = iter(tensors), {}
        for name, shard in zip(self._names, self._shards, strict=True):
            with open(self.directory / name, "wb") as opened:
                file = HashingFile(opened)
                file.write(_shard_header(shard))
                for info in shard:
                    _append(file, info, *next(stream))
                file.flush()
                digests[name] = file.digest
        if leftover := next(stream, None):
            raise RuntimeError(f"tensor {leftover[0]} was not announced to the writer")
        if len(self._shards) > 1:
            weight_map = {
                info.name: name for name, shard in zip(self._names, self._shards, strict=True) for info in shard
            }
            total = sum(info.num_bytes for shard in self._shards for info in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return digests


def write_shard(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> Digest:
    """Writes tensors on any device to one safetensors file and returns its checksum; copies one at a time to the host.

    It is for a stream of tensors whose names are not known in advance; ``SafetensorsWriter`` needs all names first.
    """
    infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    with open(path, "wb") as opened:
        file = HashingFile(opened)
        file.write(_shard_header(infos))
        for info, (name, tensor) in zip(infos, tensors, strict=True):
            _append(file, info, name, tensor)
        file.flush()
    return file.digest


def _append(file: HashingFile, info: TensorInfo, name: str, tensor: Tensor) -> None:
    if (name, tuple(tensor.shape), tensor.dtype) != (info.name, info.shape, info.dtype):
        raise RuntimeError(f"expected {info}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
    raw = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    file.write(raw.numpy().data)


def _split_shards(infos: Sequence[TensorInfo], *, max_shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def _shard_header(shard: Sequence[TensorInfo]) -> bytes:
    """The header of a safetensors file: 8 bytes of length (little endian), then JSON padded with blanks to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in shard:
        header[info.name] = {
            "dtype": SAFETENSORS_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_side_files(source: Path | str, target: Path | str, *, chat_template: str | None = None) -> None:
    """Copies everything except weights and checksums.

    These are config, tokenizer, processor, chat template, generation config and licence. ``chat_template`` is the text
    of a template that takes the place of the copied one.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILE_PATTERNS:
        for path in paths_in(source, pattern):
            if path.is_file() and not path.name.endswith(".index.json") and path.name != MANIFEST:
                shutil.copyfile(path, target / path.name)
    for name in ("additional_chat_templates", "chat_templates"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    if chat_template is not None:
        set_chat_template(target, chat_template)


@contextlib.contextmanager
def new_directory(target: Path | str, *, option: str, need_bytes: int = 0) -> Iterator[Path]:
    """A scratch directory beside ``target``; it is renamed to ``target`` at the end and deleted on any error.

    Raises:
        UserError: ``target`` exists, its parent is not writable, or the disk is full or too small for ``need_bytes``.
    """
    target = Path(os.path.abspath(target))
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} already exists; give {option} a new directory")
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise UserError(
                f"{target.parent}: disk full: {need_bytes} bytes needed, {free} free; choose another {option}"
            )
        scratch.mkdir()
        yield scratch
        os.rename(scratch, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{target.parent}: disk full while writing {target.name}; choose another {option}"
            ) from error
        if error.errno in (errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{target}: cannot be written: {error.strerror}; choose another {option}") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
