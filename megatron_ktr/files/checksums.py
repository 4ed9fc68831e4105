"""Checksums of every file of a directory: a checkpoint, a converted checkpoint, an export.

``checksums.json`` lies in the directory and is written last, before the directory gets its final name:

    {"algorithm": "xxh3_128",
     "files": {"__0_0.distcp": {"bytes": 1518297, "digest": "…"}, "hf/config.json": {…}, …},
     "digest": "…"}                     of "files" itself, so that damage to this file is not taken for damage to others

Large files are hashed in memory while they are written (``HashingFile``), so that the digest is of the intended
content. A digest taken from the file afterwards would approve whatever a full or failing disk had made of it, and would
read the page cache rather than the disk. Small files that other libraries write are read back and hashed.

XXH3 detects accidental damage and is faster than a disk (``benchmarks/checkpoint/checksums.py``). It is not a
signature: whoever can write the directory can also write its checksums. The protection against hostile files is
``files/safe_pickle.py``, which makes sure that no file is run as code.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_ktr.errors import UserError, unreadable
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.listing import paths_below

MANIFEST = "checksums.json"
ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 4_000_000
_NOT_A_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""What the system says where something else stands in the place of a file."""


@dataclass(frozen=True)
class Digest:
    """The size and checksum of one file."""

    num_bytes: int
    value: str
    """The 128-bit XXH3, in hexadecimal."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file."""

    file: str
    """Its name relative to the directory."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class HashingFile:
    """Wraps a file opened for writing and hashes the bytes before they leave memory; writing must be sequential."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not view.nbytes:  # A tensor without elements cannot be cast.
            return 0
        view = view.cast("B")
        self._hash.update(view)
        written = self._file.write(view)
        if written != len(view):
            raise OSError(errno.EIO, f"{written} of {len(view)} bytes written")
        self._num_bytes += written
        return written

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """Waits until everything written is on the disk, not only in the system's memory."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def digest(self) -> Digest:
        return Digest(self._num_bytes, self._hash.hexdigest())


def write_hashed(path: Path, content: bytes) -> Digest:
    """Writes a whole file and returns the digest of ``content``, whatever the disk makes of it."""
    with open(path, "wb") as file:
        hashing = HashingFile(file)
        hashing.write(content)
        hashing.sync()
    return hashing.digest


def file_digest(path: Path) -> Digest:
    hasher, num_bytes, block = xxhash.xxh3_128(), 0, bytearray(_BLOCK_BYTES)
    with open_file(path) as file:
        while count := file.readinto(block):
            hasher.update(memoryview(block)[:count])
            num_bytes += count
    return Digest(num_bytes, hasher.hexdigest())


def write_manifest(
    directory: Path, *, known: Mapping[str, Digest] | None = None, is_known_synced: bool = False
) -> None:
    """Writes the checksums of all files in ``directory``, and waits until everything in it is on the disk.

    ``known`` holds digests, by relative name, of files that were hashed while they were written. With
    ``is_known_synced`` these files, which may be thousands, are already on the disk and need no wait.
    """
    digests = dict(known or {})
    for path in sorted(paths_below(directory)):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST:
            if name not in digests:
                digests[name] = file_digest(path)
            if not (is_known_synced and known and name in known):
                sync(path)
        elif path.is_dir():
            sync(path)
    files = {name: {"bytes": one.num_bytes, "digest": one.value} for name, one in sorted(digests.items())}
    content = {"algorithm": ALGORITHM, "files": files, "digest": _digest_of_entries(files)}
    write_hashed(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    sync(directory)


def read_manifest(directory: Path) -> dict[str, Digest] | None:
    """The digests by relative name; None if the directory has no ``checksums.json``.

    Raises:
        DamagedManifest: the file exists, but cannot be what was written.
        UserError: it cannot be read; ``TransientError`` where that may pass.
    """
    try:
        with open_file(directory / MANIFEST) as file:
            text = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise DamagedManifest(f"cannot be read: {error.strerror}") from None
        raise unreadable(directory / MANIFEST, error) from error
    try:
        content = json.loads(text)
        algorithm, files = content["algorithm"], content["files"]
        if algorithm != ALGORITHM:
            raise DamagedManifest(f"expected algorithm {ALGORITHM}, got {algorithm!r}")
        if content["digest"] != _digest_of_entries(files):
            raise DamagedManifest("other content than was written")
        digests = {name: Digest(int(entry["bytes"]), str(entry["digest"])) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedManifest(f"not a file of checksums: {type(error).__name__}") from None
    for name in digests:
        if not _is_inside(name):
            raise DamagedManifest(f"it names {name!r}, which is not a file in this directory")
    return digests


class DamagedManifest(Exception):
    """Says what is wrong with ``checksums.json``."""


def file_shares(directory: Path, num_shares: int) -> list[list[str]]:
    """Divides the files that have a checksum among readers: each file, the largest first, goes to the reader with the
    fewest bytes to read. Empty if there are no checksums.

    Raises:
        DamagedManifest, UserError: as ``read_manifest``.
    """
    digests = read_manifest(directory)
    if digests is None:
        return []
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for name in sorted(digests, key=lambda name: (-digests[name].num_bytes, name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += digests[name].num_bytes
    return shares


def forget_cached(path: Path) -> None:
    """Lets the system drop what it remembers of a file that is on the disk, so that the next reader asks the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def find_damage(directory: Path, *, names: Iterable[str] | None = None) -> list[Damage]:
    """Compares files with their checksums and returns the differences.

    It checks all files, or those of ``names`` that have a checksum. Without ``checksums.json`` it returns [], unless
    ``names`` is given, because then there must be checksums. It compares sizes first, so that a truncated file is found
    without reading it.

    Raises:
        UserError: a file exists but cannot be read for a reason other than damage, such as its permissions;
            ``TransientError`` where that may pass.
    """
    try:
        digests = read_manifest(directory)
    except DamagedManifest as error:
        return [Damage(MANIFEST, str(error))]
    if digests is None:
        return [] if names is None else [Damage(MANIFEST, "missing")]
    chosen = digests if names is None else {name: digests[name] for name in names if name in digests}
    found = [damage for name, expected in chosen.items() if (damage := _wrong_size(directory, name, expected))]
    cut = {damage.file for damage in found}
    for name, expected in chosen.items():
        if name not in cut and (damage := _wrong_content(directory, name, expected)):
            found.append(damage)
    return found


def require_intact(directory: Path | str, *, option: str, names: Iterable[str] | None = None) -> bool:
    """Verifies a directory that has checksums; returns False if it has none, which is allowed.

    Raises:
        UserError: a file differs from what was written; the message, of one line, names the first such file.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        return False
    if damage := find_damage(directory, names=names):
        raise UserError(damage_line(directory, damage, option=option))
    return True


def damage_line(directory: Path, damage: list[Damage], *, option: str) -> str:
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return (
        f"{option}: {directory} is damaged: {damage[0]}{more}; if the files were changed on purpose, delete "
        f"{MANIFEST} there"
    )


def _wrong_size(directory: Path, name: str, expected: Digest) -> Damage | None:
    path = directory / name
    status = _unless_unreadable(path, path.stat, name=name)
    if isinstance(status, Damage):
        return status
    if not stat.S_ISREG(status.st_mode):
        return Damage(name, "not a file")
    if status.st_size != expected.num_bytes:
        return Damage(name, f"{status.st_size} bytes, {expected.num_bytes} were written")
    return None


def _wrong_content(directory: Path, name: str, expected: Digest) -> Damage | None:
    digest = _unless_unreadable(directory / name, lambda: file_digest(directory / name), name=name)
    if isinstance(digest, Damage):
        return digest
    return None if digest == expected else Damage(name, "other content than was written")


def _unless_unreadable(path: Path, action: Callable[[], Any], *, name: str) -> Any:
    """The action's result, or ``Damage`` if there is no such file."""
    try:
        return action()
    except FileNotFoundError:
        return Damage(name, "missing")
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            return Damage(name, f"cannot be read: {error.strerror}")
        # Other errors say nothing about the content: missing permissions, an unreachable file server, a disk that fails
        # once. A disk that fails for good says the same, so a person decides what is given up for it.
        raise unreadable(path, error) from error


def _digest_of_entries(files: Any) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
