"""Keeps the frame cache near its size limit: removes the entries that were not used for the longest time.

Every process counts what it adds. After a hundredth of the limit it looks at the whole directory, unless another
process (of any node or run) has done so in the last half minute. The directory may therefore exceed its limit by what
all processes write in that time. Looking and removing is done in a thread of its own, by one process at a time as far
as possible; two at once would only remove a little more. All times compared are those of the file system's clock.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from pathlib import Path

SCRATCH_PREFIX = ".new."
"""The beginning of names of files that are being written."""
_SHARE_TO_ADD = 0.01
_SHARE_TO_KEEP = 0.95
"""What is left after a removal, so that the next one is not due at once."""
_SECONDS_BETWEEN_SCANS = 30.0
_ABANDONED_SECONDS = 3600.0
"""A file that has been written for so long belongs to a process that was killed."""

_log = logging.getLogger(__name__)


class CacheSpace:
    """The size of everything below ``directory``. ``added`` may be called by several threads."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.num_evicted = 0
        self._added = max_bytes  # the first entry leads to a look: the limit may have been lowered
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def added(self, num_bytes: int) -> None:
        """Notes that an entry was written, and begins to remove old ones when it is time to look."""
        with self._lock:
            self._added += num_bytes
            is_busy = self._thread is not None and self._thread.is_alive()
            if is_busy or self._added < _SHARE_TO_ADD * self.max_bytes:
                return
            self._added = 0
            self._thread = threading.Thread(target=self._look, name="frame cache", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        try:
            if self._is_my_turn():
                self.evict()
        except OSError as error:  # a directory that another process removes, or that cannot be read any more
            _log.debug("frame_cache_dir: %s: %s", self.directory, error)

    def _is_my_turn(self) -> bool:
        """Whether nobody has looked lately; the file ``scanned`` says when somebody did."""
        mark = self.directory / "scanned"
        try:
            last = mark.stat().st_mtime
        except FileNotFoundError:
            last = None
        now = self._now()
        if last is not None and 0 <= now - last < _SECONDS_BETWEEN_SCANS:
            return False
        mark.touch()
        return True

    def _now(self) -> float:
        """The present time on the clock of the file system, which on NFS is the server's."""
        probe = self.directory / f"{SCRATCH_PREFIX}clock.{os.getpid()}.{threading.get_ident()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def evict(self) -> None:
        """Removes abandoned files, then the oldest entries until the rest is 95% of the limit, if it exceeds it."""
        now = self._now()
        entries: list[tuple[float, int, str]] = []
        folders = [folder.path for part in ("frames", "contents") for folder in _scan(self.directory / part)]
        for entry in itertools.chain.from_iterable(map(_scan, (str(self.directory), *folders))):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:  # removed by another process
                continue
            if entry.name.startswith(SCRATCH_PREFIX):
                if now - status.st_mtime > _ABANDONED_SECONDS:
                    _remove(entry.path)
            elif os.path.dirname(entry.path) != str(self.directory):
                # A small file takes a block of the disk too.
                entries.append((status.st_mtime, max(status.st_size, status.st_blocks * 512), entry.path))
        total = sum(size for _, size, _ in entries)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            if total <= _SHARE_TO_KEEP * self.max_bytes:
                break
            if _remove(path):
                self.num_evicted += 1
            total -= size


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> bool:
    """Whether this process removed it."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
