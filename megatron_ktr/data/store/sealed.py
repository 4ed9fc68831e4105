"""Arrow files in a directory that several processes share: written whole or not at all, and noticed when damaged.

A file is an Arrow IPC file followed by 16 bytes, the xxh3_128 of all bytes before them. ``sole_writer`` lets one
process of the machine write while the others wait for what it writes.
"""

from __future__ import annotations

import fcntl
import glob
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import xxhash

from megatron_ktr.errors import UserError, is_transient, unreadable

_PIECE_BYTES = 1024 * 1024
_SEAL_BYTES = 16


def content_digest(path: Path, *, option: str) -> str:
    """The xxh3_128 of a file's bytes, as hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return _digest_of(file, num_bytes=None).hexdigest()
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from error


def cache_directory(chosen: str | None) -> Path:
    """The directory for stores: ``chosen``, or the user's cache directory. Raises ``UserError`` if there is no home."""
    if chosen is not None:
        return _of_home(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else _of_home("~/.cache")) / "megatron_ktr" / "records"


def _of_home(written: str) -> Path:
    """``written`` with its ``~`` replaced. A container may run as a user that nobody knows."""
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        raise UserError(f"record_store_dir: {written}: {error} Name a directory with --record-store-dir") from error


@contextmanager
def sole_writer(directory: Path, name: str) -> Iterator[None]:
    """Waits until no other process of this machine writes ``name``, and keeps the others waiting.

    Raises:
        UserError: the directory cannot be written, also if that turns out inside.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f".{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"record_store_dir: {directory} cannot be written: {error.strerror or error}; name another directory with "
            "--record-store-dir"
        ) from error


def write_sealed(path: Path, *, schema: pa.Schema, write: Callable[[pa.ipc.RecordBatchFileWriter], None]) -> None:
    """Writes an Arrow file whose batches ``write`` gives; ``path`` appears when it is complete. Call it inside
    ``sole_writer``.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
    """
    # Processes of two machines or containers may have the same number.
    mine = f".{path.name}.{socket.gethostname()}."
    for abandoned in path.parent.glob(f"{glob.escape(mine)}*"):  # nobody else of this machine writes now
        abandoned.unlink(missing_ok=True)
    scratch = path.with_name(f"{mine}{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            sink = _Sink(file)
            with pa.PythonFile(sink, mode="w") as out, pa.ipc.new_file(out, schema) as writer:
                write(writer)
            file.write(sink.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def open_sealed(path: Path) -> pa.Table | None:
    """The table in a file that ``write_sealed`` wrote, mapped into memory; None if there is none or it is damaged, so
    that it has to be written anew.

    Raises:
        UserError: it cannot be read now, which may pass.
    """
    try:
        num_bytes = path.stat().st_size - _SEAL_BYTES
        if num_bytes <= 0:
            return None
        with path.open("rb") as file:
            if _digest_of(file, num_bytes=num_bytes).digest() != file.read(_SEAL_BYTES):
                return None
        with pa.memory_map(str(path)) as mapped:
            return pa.ipc.open_file(pa.BufferReader(mapped.read_buffer(num_bytes))).read_all()
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise unreadable(path, error, option="record_store_dir") from error
        return None


class _Sink:
    """The part of a file that pyarrow writes to, with the digest of what it wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()
        self.closed = False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _digest_of(file: BinaryIO, *, num_bytes: int | None) -> xxhash.xxh3_128:
    digest, left = xxhash.xxh3_128(), num_bytes
    while piece := file.read(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES)):
        digest.update(piece)
        left = None if left is None else left - len(piece)
    return digest
