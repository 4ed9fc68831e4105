"""Runs decord in a separate process.

decord is fast, but it is native code from 2021. On some files it loops for ever inside ``get_batch``, where no Python
timeout can interrupt it, and a crash would end the training rank. So each rank has one child process that runs this
file as a script (it imports decord and numpy only). The parent asks it for frames over a pipe, waits no longer than a
deadline, and starts a new child after a hang or a crash.

Protocol: the parent writes one JSON line ``{"path", "frames", "num_frames", "size", "is_last"}``; the child answers
with one JSON line ``{"shape"}`` followed by that many bytes of uint8 RGB, or ``{"error", "stage"}``. It keeps the
file open between the requests for one video, until ``is_last``.

decord conceals damage: it returns a neighbouring or half-grey picture without an error. Its FFmpeg, however, writes to
the error stream. If anything was written there, the child returns an error instead of the frames, and PyAV decodes
them, because it can tell which frames are damaged.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class DecordFailed(Exception):
    """decord could not deliver these frames. ``stage`` is "open", "decode", "timeout" or "crash"."""

    def __init__(self, stage: str, reason: str) -> None:
        self.stage = stage
        super().__init__(reason)


class DecordProcess:
    """Asks a child process for frames, one request at a time. It is not safe for several threads. The child is kept for
    the whole run.

    ``command`` runs the child. By default it runs this file; tests replace it by something that hangs or crashes.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = list(command or (sys.executable, "-u", os.path.abspath(__file__)))
        self._child: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._owner = os.getpid()
        atexit.register(self.close)

    @staticmethod
    def is_installed() -> bool:
        """Whether decord is installed. It is not on aarch64 and macOS, for which it has no wheels."""
        return importlib.util.find_spec("decord") is not None

    def read_frames(
        self,
        path: Path,
        frames: list[int],
        *,
        num_frames: int,
        size: tuple[int, int],
        is_last: bool,
        timeout_seconds: float,
    ) -> np.ndarray:
        """The frames with the given numbers, uint8 [F, H, W, 3]. They are upright, because decord applies rotation.

        ``num_frames`` and ``size`` (upright height and width) come from the packet index. If decord counts another
        number of frames, its numbering differs from ours, and the request fails with stage "open".
        """
        child = self._start()
        request = {
            "path": str(path),
            "frames": frames,
            "num_frames": num_frames,
            "size": list(size),
            "is_last": is_last,
        }
        deadline = time.monotonic() + timeout_seconds
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(self._read_line(deadline))
            if "error" in answer:
                raise DecordFailed(answer["stage"], answer["error"])
            frames_FHWC = np.empty(answer["shape"], dtype=np.uint8)
            self._read_into(frames_FHWC.data.cast("B"), deadline)
            return frames_FHWC
        except TimeoutError:
            self.close()
            raise DecordFailed("timeout", f"no answer within {timeout_seconds:g} s") from None
        except (EOFError, OSError, json.JSONDecodeError):
            code = self.close()
            raise DecordFailed("crash", f"its process ended with code {code}") from None

    def close(self) -> int | None:
        """Ends the child, if there is one, and returns its exit code."""
        child, self._child, self._pending = self._child, None, b""
        if child is None or os.getpid() != self._owner:  # a fork must not end its parent's child
            return None
        if child.poll() is None:
            child.kill()
        code = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # unsent bytes to a child that is gone
                    pass
        return code

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._child

    def _wait(self, deadline: float) -> int:
        assert self._child is not None and self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        return descriptor

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._pending:
            chunk = os.read(self._wait(deadline), 1 << 16)
            if not chunk:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _read_into(self, target: memoryview, deadline: float) -> None:
        filled = min(len(self._pending), len(target))
        target[:filled], self._pending = self._pending[:filled], self._pending[filled:]
        while filled < len(target):
            count = os.readv(self._wait(deadline), [target[filled : filled + (1 << 24)]])
            if not count:
                raise EOFError
            filled += count


def watch_parent(interval_seconds: float = 1.0) -> None:
    """Ends this process soon after the process that started it has ended, also while native code hangs in it: a thread
    looks whether the parent is still there. (The end of the pipe is seen only by a process that reads it.)"""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _open_reader(request: dict[str, Any]) -> Any:
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    # fault_tol 0: decord must not silently replace a frame that cannot be decoded by a neighbouring one.
    reader = decord.VideoReader(request["path"], num_threads=2, fault_tol=0)
    if len(reader) != request["num_frames"]:
        raise ValueError(f"decord counts {len(reader)} frames, the packets say {request['num_frames']}")
    return reader


def _serve() -> None:
    """The child: answers requests until the parent closes the pipe."""
    # A cluster's scheduler sends its signal to stop to every process of a job. The rank finishes its step first and
    # needs this child for it, so the child ignores the signal.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watch_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code that prints must not write into the answers
    complaints = tempfile.TemporaryFile()
    os.dup2(complaints.fileno(), 2)
    reader, reader_path = None, None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        stage = "open"
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        try:
            if reader_path != request["path"]:
                reader, reader_path = None, None
                reader = _open_reader(request)
                reader_path = request["path"]
            stage = "decode"
            batch = reader.get_batch(request["frames"])  # type: ignore[union-attr]
            frames_FHWC = np.ascontiguousarray(batch.asnumpy())
            if list(frames_FHWC.shape[1:3]) != request["size"]:
                raise ValueError(f"decord gives frames of {frames_FHWC.shape[1:3]}, expected {request['size']}")
            if num_bytes := os.fstat(2).st_size:
                raise ValueError(f"FFmpeg complained: {os.pread(2, min(num_bytes, 300), 0).decode(errors='replace')}")
        except Exception as error:  # whatever decord raises, the parent decides what it means
            reader, reader_path = None, None
            reason = " ".join(str(error).split())[:300]
            answers.write(json.dumps({"error": f"{type(error).__name__}: {reason}", "stage": stage}).encode() + b"\n")
        else:
            answers.write(json.dumps({"shape": list(frames_FHWC.shape)}).encode() + b"\n")
            answers.write(frames_FHWC.data.cast("B"))
            if request["is_last"]:
                reader, reader_path = None, None
        answers.flush()


if __name__ == "__main__":
    # Running a file puts its folder first in the search path, where this package's modules could shadow others.
    sys.path = [entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]
    _serve()
