"""One worker process as the training process sees it: asked for one medium at a time, killed when it fails.

The process has a session of its own, so that neither ctrl-C nor a scheduler's signal to the training process's group
reaches it, and so that killing its process group ends its decord child too. It inherits two pipes and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from megatron_ktr.data.media.job import MediaJob
from megatron_ktr.data.media.packed import num_frame_bytes, unpack_media
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.data.workers.child import LENGTH
from megatron_ktr.errors import UserError

START_SECONDS = 300.0
"""The time for a worker to import what it needs, which on a busy file server takes long."""
_START_ATTEMPTS = 3
"""A worker that is killed while it starts is started again; one that ends by itself is not."""
_LOOK_SECONDS = 0.2
"""Between two looks at the worker's memory."""
_READ_BYTES = 1 << 24
_MOST_ANSWER = 1 << 24
_REAP_SECONDS = 10.0
"""A process that waits for a file server which is gone cannot even be killed. It is then left behind."""
_SIGNALS_OF_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_ROOT = Path(__file__).resolve().parents[3]


class WorkerLost(Exception):
    """A worker can no longer be used. ``why`` is "died", "timeout" or "memory"; the text says more."""

    def __init__(self, why: str, text: str) -> None:
        self.why = why
        super().__init__(text)


class WorkerProcess:
    """A worker, which ``start`` starts. All methods belong to one thread, but ``end`` may be called by any."""

    def __init__(self, *, memory_bytes: int, command: Sequence[str] | None = None) -> None:
        """``command`` runs the worker, by default ``child.py``; tests give one that fails."""
        self.memory_bytes = memory_bytes
        self._command = [*(command or (sys.executable, "-m", "megatron_ktr.data.workers.child")), str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Returns when the worker waits for requests.

        Raises:
            UserError: it cannot be started.
        """
        for attempt in range(1, _START_ATTEMPTS + 1):
            process = self._launch()
            try:
                self._receive(deadline=time.monotonic() + START_SECONDS)
                return
            except TimeoutError:
                reason = f"it is not ready after {START_SECONDS:g} s"
            except WorkerLost as error:
                reason = str(error)
            except (ValueError, TypeError) as error:  # something that Python starts with prints
                reason = f"its first answer makes no sense ({error})"
                self._kill()
            self.close()
            if (process.returncode or 0) >= 0 or self._is_ended or attempt == _START_ATTEMPTS:
                raise UserError(
                    f"data_workers: a worker process cannot start: {reason} (--data-workers 0 decodes without them)"
                )

    def read(self, job: MediaJob, *, timeout_seconds: float) -> LoadedMedia:
        """The media of ``job``.

        Raises:
            UnusableMedia: the worker says so.
            WorkerLost: it hung, died or took too much memory. It is dead then.
            UserError: the worker says so.
        """
        deadline = time.monotonic() + timeout_seconds
        os.ftruncate(self._complaints.fileno(), 0)
        request = pickle.dumps(job, protocol=5)
        try:
            self._write(LENGTH.pack(len(request)) + request, deadline)
            answer = self._receive(deadline)
            if answer["kind"] == "media":
                num_bytes = num_frame_bytes(answer["facts"])
                if num_bytes > self.memory_bytes:
                    raise ValueError(f"{num_bytes} bytes of frames")
                frames = np.empty(num_bytes, dtype=np.uint8)
                self._read_into(frames.data, deadline)
                return unpack_media(answer["facts"], frames, source=job.name)
            if answer["kind"] == "memory":
                raise WorkerLost("memory", self._too_much())
        except TimeoutError:
            self._kill()
            raise WorkerLost("timeout", f"no answer within {timeout_seconds:.3g} s") from None
        except WorkerLost:
            self._kill()
            raise
        except (ValueError, TypeError, KeyError) as error:
            self._kill()
            raise WorkerLost("died", f"the worker gave a senseless answer ({error})") from None
        if answer["kind"] == "unusable":
            raise UnusableMedia(answer["source"], answer["reason"])
        if answer["kind"] == "user_error":
            raise UserError(answer["text"])
        raise RuntimeError(f"in a data worker, on {job.name}:\n{answer['text']}")

    @property
    def is_gone(self) -> bool:
        """Whether it died while nothing was asked of it."""
        return bool(self._poll(self._answers, select.POLLIN, 0.0))

    def end(self) -> None:
        """Ends the worker and its decord child at once, for good. ``close`` has yet to be called."""
        self._is_ended = True
        self._kill()

    def close(self) -> None:
        """Ends the worker and frees what belongs to it."""
        self._reap()
        for file in (self._requests, self._answers, self._complaints):
            with contextlib.suppress(OSError):
                file.close()

    def _kill(self) -> None:
        with self._lock:
            # Until it is reaped no other process can get its number.
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> int:
        self._kill()
        assert self._process is not None
        with self._lock, contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_REAP_SECONDS)
        return -signal.SIGKILL

    def _launch(self) -> subprocess.Popen[bytes]:
        try:
            self._complaints = tempfile.TemporaryFile("ab+", buffering=0)
        except OSError as error:
            raise UserError(
                f"data_workers: no temporary file for a worker's errors: {error.strerror or error} (TMPDIR)"
            ) from error
        search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        # Devices are hidden: whatever a library does at import, a worker takes no memory of a GPU.
        environment = os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # Schedulers send their signal to every process of a job. The trainer finishes its step first and needs its
        # workers for it. A child inherits the signals that the thread which starts it has blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_TRAINER)
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise UserError(f"data_workers: a worker process cannot start: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert process.stdin is not None and process.stdout is not None
        self._requests, self._answers = process.stdin, process.stdout
        os.set_blocking(self._requests.fileno(), False)
        with self._lock:
            self._process = process
        if self._is_ended:
            self._kill()
        return process

    def _receive(self, deadline: float) -> dict[str, Any]:
        head = bytearray(LENGTH.size)
        self._read_into(memoryview(head), deadline)
        (length,) = LENGTH.unpack(head)
        if length > _MOST_ANSWER:
            raise ValueError(f"an answer of {length} bytes")
        text = bytearray(length)
        self._read_into(memoryview(text), deadline)
        return json.loads(bytes(text))

    def _read_into(self, target: memoryview, deadline: float) -> None:
        while target:
            self._wait(self._answers, select.POLLIN, deadline)
            count = os.readv(self._answers.fileno(), [target[:_READ_BYTES]])
            if not count:
                raise WorkerLost("died", self._epitaph())
            target = target[count:]

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._requests, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._requests.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise WorkerLost("died", self._epitaph()) from None

    def _wait(self, file: IO[bytes], event: int, deadline: float) -> None:
        """Returns when ``file`` is ready. Raises ``TimeoutError``, or ``WorkerLost`` if the worker is too big."""
        while True:
            left = deadline - time.monotonic()
            if self._poll(file, event, max(0.0, min(left, _LOOK_SECONDS))):
                return
            if left <= 0:
                raise TimeoutError
            if self._memory() > self.memory_bytes:
                raise WorkerLost("memory", self._too_much())

    @staticmethod
    def _poll(file: IO[bytes], event: int, seconds: float) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(file.fileno(), event)
        return poll.poll(seconds * 1000)

    def _memory(self) -> int:
        """Bytes of memory that the worker and its children have in use, libraries included."""
        assert self._process is not None
        total, pid = 0, self._process.pid
        for number in (pid, *self._children(pid)):
            with contextlib.suppress(psutil.Error):
                total += psutil.Process(number).memory_info().rss
        return total

    @staticmethod
    def _children(pid: int) -> list[int]:
        try:  # a look through all processes of the machine costs milliseconds
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
                return [int(number) for number in file.read().split()]
        except OSError:
            with contextlib.suppress(psutil.Error):
                return [child.pid for child in psutil.Process(pid).children(recursive=True)]
            return []

    def _too_much(self) -> str:
        return f"the worker needs more than {self.memory_bytes / 1e9:.3g} GB (--data-worker-memory-gb)"

    def _epitaph(self) -> str:
        """How the worker ended, which is known as soon as its pipe is closed, or a moment later."""
        code = self._reap()
        if code < 0:
            return f"the worker died (signal {-code})"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the worker ended with code {code}{f': {last[:300]}' if last else ''}"
