"""Keeps resized frames on disk, so that an epoch, a run or a node need not decode what another has decoded.

    DIR/frames/<2 digits>/<name>      the frames of one medium, with their facts and a checksum
    DIR/contents/<2 digits>/<name>    the digest of the content of files, by their path, size, times and inode
    DIR/scanned                       when the size of everything was last looked at (``frame_cache_space.py``)

The name of an entry is the XXH3 digest of the content of the files, of every option that decides its pixels, and of the
versions of the decoders. A file that is replaced, or an option that is changed, therefore leads to another entry, and
equal files in several places share one.

Any number of processes, nodes and runs may share a directory, on NFS too: correctness needs no lock. An entry is
written to a file of its own and renamed, so it is there whole or not at all; two writers of one entry write the same
bytes. Its checksum is verified whenever it is read. A damaged entry is deleted, counted and decoded anew. XXH3 detects
accidents, not attacks: whoever can write to the directory decides what the model sees.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ktr.data.frame_cache_space import SCRATCH_PREFIX, CacheSpace
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.packed import num_frame_bytes, pack_media, unpack_media
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.errors import UserError

_log = logging.getLogger(__name__)

FORMAT = 1
"""To be raised whenever the same options give other pixels or other facts than before, or the layout of files changes.
"""
_MAGIC = b"KTRFRAME"
_HEAD = struct.Struct("<8sIQ16s")
"""Magic, bytes of facts, bytes of frames, checksum of both."""
_MOST_FACTS = 1 << 20
_PACKAGES = ("av", "decord", "numpy", "pillow", "torch")
"""What decodes and resizes. Another version may round differently."""
_YOUNG_NS = 2_000_000_000
"""A file that changed this recently may change again without a visible change of its time."""
_PROBE_BYTES = 1 << 16
_BLOCK_BYTES = 4_000_000

_MOST_SECONDS = 120.0
"""What takes longer to be read to the end is decoded without the cache: nothing ends a read that goes on for hours."""

Signature = tuple[tuple[str, int, int, int, int], ...]
"""(path, size, times of modification and of change in ns, inode) of each file. The time of change tells when a file was
written over although its time of modification was set back, as copying tools do."""


class FrameCache:
    """Frames on disk below ``directory``, about ``max_bytes`` of them. Threads may share it."""

    def __init__(self, directory: Path | str, *, max_bytes: int) -> None:
        """
        Raises:
            UserError: the directory cannot be made or written to.
        """
        self.directory = Path(directory)
        self._counts: Counter[str] = Counter(dict.fromkeys(("hits", "misses", "damaged", "off"), 0))
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._space = CacheSpace(self.directory, max_bytes=max_bytes)
        self._is_readable = self._is_writable = True
        try:
            self._probe()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"frame_cache_dir: {directory} cannot be used: {reason}; name a directory that can be written to and "
                "has room, or none"
            ) from error

    def read_through(self, job: MediaJob, decode: Decode) -> LoadedMedia:
        """The media of ``job``: the stored ones, else those of ``decode``, which are then stored.

        Raises:
            UnusableMedia: as ``decode`` does. Nothing is stored for such a job.
        """
        before = _signature(job) if self._is_readable else None
        name = None if before is None else self._name(job, before)
        if name is None:
            return decode(job)
        found = self._read(name, job)
        self._count("misses" if found is None else "hits")
        if found is not None:
            return found
        media = decode(job)
        # A crash need not be the file's fault: what is stored must not say for ever that decord cannot decode it.
        is_typical = not media.fallback_reason.startswith("decord crashed")
        if self._is_writable and is_typical and _signature(job) == before:
            self._write(name, media)
        return media

    def counts(self) -> Mapping[str, int]:
        """Events since this process began, by name of metric: frame_cache/hits, misses, damaged, bytes_read,
        bytes_written, evicted, and off, which is 1 once the directory has failed."""
        with self._lock:
            found = Counter(self._counts)
        found["evicted"] = self._space.num_evicted
        return {f"frame_cache/{name}": number for name, number in found.items()}

    def _name(self, job: MediaJob, files: Signature) -> str | None:
        """The name of the job's entry; None if a file cannot be read."""
        content = self._content_digest(files)
        if content is None:
            return None
        what = {
            "format": FORMAT,
            "content": content,
            "suffixes": [path.suffix.lower() for path in job.paths],  # demuxers look at them
            "kind": job.kind,
            "is_pictures": job.is_pictures,
            "request": asdict(job.request),
            "settings": asdict(job.settings),
            "sampling": asdict(job.sampling),
            "versions": _versions(),
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True, default=str).encode())

    def _content_digest(self, files: Signature) -> str | None:
        """A digest of the content of all files in their order. It is kept on disk, because reading a file to the end
        may cost as much as decoding it."""
        kept = self._path("contents", xxhash.xxh3_128_hexdigest(json.dumps(files).encode()))
        try:
            known = kept.read_text(encoding="ascii")
            if len(known) == 32 and int(known, 16) >= 0:
                return known
        except (OSError, ValueError):
            pass  # not there, or damaged: a wrong digest would only lead to an entry that does not exist
        hasher, deadline = xxhash.xxh3_128(), time.monotonic() + _MOST_SECONDS
        try:
            for path, *_ in files:
                digest = _digest_until(path, deadline)
                if digest is None:
                    return None
                hasher.update(digest.encode())
        except OSError:
            return None
        is_young = max(modified for _, _, modified, *_ in files) > time.time_ns() - _YOUNG_NS
        if self._is_writable and not is_young:
            self._write_file(kept, (hasher.hexdigest().encode(),))
        return hasher.hexdigest()

    def _read(self, name: str, job: MediaJob) -> LoadedMedia | None:
        path = self._path("frames", name)
        try:
            with open(path, "rb", buffering=0) as file:
                media, num_bytes = _read_entry(file, name=name, source=job.name)
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # on NFS: removed by another node
                self._fail(error, writing=False)
            return None
        except (ValueError, TypeError, KeyError, EOFError, RecursionError, MemoryError) as error:
            self._count("damaged")
            _log.warning("frame_cache: %s is damaged (%s); its medium is decoded again", path, error)
            _unlink(path)
            return None
        self._count("bytes_read", num_bytes)
        try:
            os.utime(path)  # what is used stays
        except OSError:
            pass  # removed meanwhile, or not ours to touch
        return media

    def _write(self, name: str, media: LoadedMedia) -> None:
        facts, frames = pack_media(media)
        written = json.dumps({"name": name, **facts}).encode()
        hasher = xxhash.xxh3_128(written)
        hasher.update(frames)
        head = _HEAD.pack(_MAGIC, len(written), len(frames), hasher.digest())
        if self._write_file(self._path("frames", name), (head, written, frames)):
            num_bytes = len(head) + len(written) + len(frames)
            self._count("bytes_written", num_bytes)
            self._space.added(num_bytes)

    def _write_file(self, path: Path, parts: tuple[bytes | memoryview, ...]) -> bool:
        """Writes a file whole or not at all; returns whether it did. It is not forced to the disk: what a crash of the
        machine leaves of it is found by its checksum."""
        scratch = path.with_name(f"{SCRATCH_PREFIX}{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as file:
                for part in parts:
                    file.write(part)
            scratch.replace(path)
        except OSError as error:
            _unlink(scratch)
            self._fail(error, writing=True)
            return False
        return True

    def _fail(self, error: OSError, *, writing: bool) -> None:
        """The directory has failed: it is used no more, and this is said once."""
        with self._lock:
            is_first = self._is_writable
            self._is_writable = False
            self._is_readable = self._is_readable and writing
            self._counts["off"] = 1
        if is_first:
            what = "no more frames are stored" if writing else "it is used no more"
            _log.warning("frame_cache_dir: %s: %s; %s, the run goes on", self.directory, error.strerror or error, what)

    def _probe(self) -> None:
        for part in ("frames", "contents"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        scratch = self.directory / f"{SCRATCH_PREFIX}{socket.gethostname()}.{os.getpid()}.probe"
        try:
            with open(scratch, "wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            _unlink(scratch)

    def _path(self, part: str, name: str) -> Path:
        return self.directory / part / name[:2] / name

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number


def _signature(job: MediaJob) -> Signature | None:
    """None if a file is missing or is no regular file, which the decoder then says in its own words."""
    found = []
    for path in job.paths:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return tuple(found) or None


def _digest_until(path: str, deadline: float) -> str | None:
    """The XXH3 of a file's content; None if it is not read to the end in time."""
    hasher, block = xxhash.xxh3_128(), bytearray(_BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            hasher.update(memoryview(block)[:count])
            if time.monotonic() > deadline:
                _log.warning("frame_cache: %s takes too long to read; it is decoded without the cache", path)
                return None
    return hasher.hexdigest()


def _read_entry(file: Any, *, name: str, source: str) -> tuple[LoadedMedia, int]:
    """(the media of an open entry, its bytes).

    Raises:
        ValueError, TypeError, KeyError, EOFError: it is not what was written under this name.
    """
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError("its head is cut off")
    magic, num_facts, num_frames, checksum = _HEAD.unpack(head)
    num_bytes = _HEAD.size + num_facts + num_frames
    if magic != _MAGIC or num_facts > _MOST_FACTS or num_bytes != os.fstat(file.fileno()).st_size:
        raise ValueError("its size or its head is wrong")
    written, frames = np.empty(num_facts, dtype=np.uint8), np.empty(num_frames, dtype=np.uint8)
    for part in (written, frames):
        view = part.data
        while view:
            count = file.readinto(view)
            if not count:
                raise EOFError("it is cut off")
            view = view[count:]
    hasher = xxhash.xxh3_128(written.data)
    hasher.update(frames.data)
    if hasher.digest() != checksum:
        raise ValueError("its checksum is wrong")
    facts = json.loads(written.tobytes())
    if facts["name"] != name or num_frame_bytes(facts) != num_frames:
        raise ValueError("it is another entry")
    return unpack_media(facts, frames, source=source), num_bytes


@functools.cache
def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # a directory that cannot be written to keeps it
