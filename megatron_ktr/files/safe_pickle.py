"""Reading pickles that somebody else may have written: named globals are allowed, nothing else is looked up.

A pickle is a program: it may name any function of any module and call it. PyTorch's formats are pickles all the same,
so whatever is read from a checkpoint passes one of three gates before megatron-core or PyTorch touch it:

    load_metadata        ``.metadata``, a plain pickle, which PyTorch itself loads without any check
    load_torch_object    a file of ``torch.save``, by PyTorch's ``weights_only`` unpickler
    check_torch_object   the same without loading, for one chunk of a larger file

Checksums do not replace them: who writes a hostile file can write its checksum.
"""

from __future__ import annotations

import pickle
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
        # megatron-core's own saving adds every rank's plan, to use it again.
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        *((_PLANS, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        # Where the checkpoint was saved: a name, which nothing opens.
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
"""What the description of a distributed checkpoint consists of, besides torch's dtypes."""

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
"""What unpicklers raise on bytes that nobody pickled."""


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle names something that is not on the list."""


class _ListedGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and (module, name) not in METADATA_GLOBALS:
            raise ForbiddenGlobal(f"{module}.{name}")
        return super().find_class(module, name)


def load_metadata(path: Path) -> Any:
    """The object in a distributed checkpoint's ``.metadata``; what it contains is for the caller to check.

    Raises:
        UserError: it names a forbidden global, or is not a pickle. OSError as it comes.
    """
    with open(path, "rb") as file:
        try:
            return _ListedGlobals(file).load()
        except ForbiddenGlobal as error:
            raise UserError(_refusal(path, str(error))) from None
        except UNREADABLE as error:
            raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def load_torch_object(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors, numbers, text and collections of them (and numpy arrays).

    Raises:
        UserError: it names a forbidden global, or is not such a file. OSError as it comes.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if forbidden := re.search(r"GLOBAL (\S+) ", str(error)):
            raise UserError(_refusal(path, forbidden[1])) from None
        raise UserError(f"{path}: damaged: {_first_line(error)}") from None


def check_torch_object(file: Any, *, where: str) -> None:
    """Refuses what ``weights_only`` would refuse, without loading tensors; ``file`` is seekable.

    Raises:
        UserError: beginning with ``where``.
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
    # PyTorch explains at length how to load such a file nevertheless.
    return text.splitlines()[0][:200] if text else type(error).__name__
