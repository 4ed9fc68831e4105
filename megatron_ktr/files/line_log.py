"""A file to which whole lines are added. A line that cannot be written now (a full disk) waits in memory, and is
written, in its place, as soon as there is room again."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

MOST_WAITING = 10_000
"""Lines that wait; the oldest of more are lost."""


class LineLog:
    """Adds lines to ``path``, which ends with a whole line at any time."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: the file cannot be opened.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)

    @property
    def num_waiting(self) -> int:
        """The lines that are not in the file yet."""
        return len(self._waiting)

    def add(self, line: str) -> None:
        """Adds a line, after those that wait.

        Raises:
            OSError: it waits, because it cannot be written now.
        """
        self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes the lines that wait, as far as there is room.

        Raises:
            OSError: some still wait.
        """
        while self._waiting:
            line = self._waiting[0]
            size = os.fstat(self._descriptor).st_size
            try:
                written = os.write(self._descriptor, line)
                if written != len(line):
                    # The rest of the line gets its error from the system, or is written after all.
                    while written < len(line):
                        written += os.write(self._descriptor, line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise
            self._waiting.popleft()

    def close(self) -> None:
        """Closes the file; lines that still wait are lost. Closing twice does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self.flush()
            os.close(self._descriptor)
            self._descriptor = -1
