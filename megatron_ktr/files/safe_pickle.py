"""Reads pickles that somebody else may have written; only globals on a list are allowed.

A pickle is a program: it can name any function of any module and call it. PyTorch's file formats are pickles
nevertheless. So everything that is read from a checkpoint passes one of three checks before megatron-core or PyTorch
read it:

    load_metadata        loads ``.metadata``, a plain pickle, which PyTorch itself would load without any check
    load_torch_object    loads a file of ``torch.save``, with PyTorch's ``weights_only`` unpickler
    check_torch_object   checks one chunk of a larger file in the same way, without loading it

Checksums do not replace these checks: whoever writes a hostile file can also write its checksum.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from megatron_ktr.errors import UserError

_DCP = "torch.distributed.checkpoint.metadata"
_PLANS = "torch.distributed.checkpoint.planner"
METADATA_GLOBALS = frozenset(
    {
        *((_DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((_DCP, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
        (_DCP, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # megatron-core also saves every rank's plan, to reuse it.
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        *((_PLANS, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        # The path where the checkpoint was saved; nothing opens it.
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
"""The (module, name) of every global that a distributed checkpoint's ``.metadata`` may name, besides torch's dtypes."""

UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""The exceptions that unpicklers raise on bytes that are not a pickle."""


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle names a global that is not on the list."""


class _ListedGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and (module, name) not in METADATA_GLOBALS:
            raise ForbiddenGlobal(f"{module}.{name}")
        return super().find_class(module, name)


def load_metadata(path: Path) -> Any:
    """Loads the object in a distributed checkpoint's ``.metadata``; the caller must check what it contains.

    Raises:
        UserError: the pickle names a forbidden global, or the file is not a pickle.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            _require_small_memo(file.read())
            file.seek(0)
            return _ListedGlobals(file).load()
        except ForbiddenGlobal as error:
            raise UserError(_refusal(path, str(error))) from None
        except UNREADABLE as error:
            raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def _require_small_memo(content: bytes) -> None:
    """Refuses a pickle that stores an object under a number far above its own length: Python makes a table of so many
    places, so that ten bytes may ask for all memory. The numbers that pickle writes count up from 0."""
    if b"r" not in content:  # the only such instruction; the other has a byte
        return
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("LONG_BINPUT", "PUT") and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"an object is stored under number {argument}")


def load_torch_object(path: Path) -> Any:
    """Loads what ``torch.save`` wrote: tensors, numbers, text, collections of them, and numpy arrays.

    Raises:
        UserError: the file names a forbidden global, or is not a file of ``torch.save``.
        OSError: the file cannot be read.
    """
    try:
        _require_uncompressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if forbidden := re.search(r"GLOBAL (\S+) ", str(error)):
            raise UserError(_refusal(path, forbidden[1])) from None
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def _require_uncompressed(path: Path) -> None:
    """Refuses an archive whose parts claim more bytes than it has: ``torch.save`` never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(part.file_size for part in archive.infolist())
    if claimed > (size := path.stat().st_size):
        raise ValueError(f"its parts claim {claimed} bytes, it has {size}")


def check_torch_object(file: Any, *, where: str) -> None:
    """Refuses what ``weights_only`` would refuse, without loading tensors; ``file`` must be seekable.

    Raises:
        UserError: the object is refused or damaged; the message begins with ``where``.
    """
    try:
        forbidden = get_unsafe_globals_in_checkpoint(file)
    except UNREADABLE as error:
        raise UserError(f"{where}: damaged: {_first_line(error)}") from None
    if forbidden:
        raise UserError(_refusal(where, sorted(forbidden)[0]))


def _refusal(where: Path | str, name: str) -> str:
    return f"{where}: refused: its pickle names {name}, which no checkpoint needs and which may run code"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    # Keep the first line only, because PyTorch goes on to explain at length how to load such a file nevertheless.
    return text.splitlines()[0][:200] if text else type(error).__name__
