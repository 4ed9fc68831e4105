"""One child process as its parent sees it: asked for one thing at a time, killed when it fails.

The process has a session of its own, so that neither ctrl-C nor a scheduler's signal to the parent's group reaches it,
and so that killing its process group ends the processes that it has started. It inherits two pipes and nothing else.
It is started by a thread that lives as long as it is needed: the kernel kills it when that thread ends.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_ktr.errors import UserError
from megatron_ktr.processes.child import LENGTH

START_SECONDS = 300.0
"""The time for a child to import what it needs, which on a busy file server takes long."""
_START_ATTEMPTS = 3
"""A child that is killed while it starts is started again; one that ends by itself is not."""
_LOOK_SECONDS = 0.2
"""Between two looks at the child's memory."""
_READ_BYTES = 1 << 24
_MOST_ANSWER = 1 << 24
_REAP_SECONDS = 10.0
"""A process that waits for a file server which is gone cannot even be killed. It is then left behind."""
_END_SECONDS = 2.0
"""Between the end of a child's answers and its own end."""
_MOST_DESCENDANTS = 4096
_SIGNALS_OF_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_ROOT = Path(__file__).resolve().parents[2]


class WorkerLost(Exception):
    """A child can no longer be used. ``why`` is "died", "timeout" or "memory"; the text says more."""

    def __init__(self, why: str, text: str) -> None:
        self.why = why
        super().__init__(text)


@dataclass(frozen=True)
class Words:
    """How messages name a kind of child and its options."""

    option: str
    """The option that the child belongs to, such as ``data_workers``."""
    remedy: str
    """What helps where no child can be started."""
    memory_option: str = ""
    """The option with the limit of memory; "" if it is fixed."""


class ChildProcess:
    """A child, which ``start`` starts. All methods belong to one thread, but ``end`` may be called by any."""

    def __init__(self, command: Sequence[str], *, memory_bytes: int, words: Words) -> None:
        """``command`` runs the child; the limit of memory, in bytes, is appended to it."""
        self.memory_bytes = memory_bytes
        self._words = words
        self._command = [*command, str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Returns when the child waits for requests.

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
                raise UserError(f"{self._words.option}: a worker process cannot start: {reason} ({self._words.remedy})")

    def ask(self, request: bytes, *, timeout_seconds: float) -> dict[str, Any]:
        """Sends a request, and returns the first answer to it.

        Raises:
            WorkerLost: the child hung, died, took too much memory or made no sense. It is dead then.
        """
        deadline = time.monotonic() + timeout_seconds
        with self.losing(timeout_seconds):
            self.send(request, deadline)
            return self._receive(deadline)

    def next_answer(self, *, timeout_seconds: float) -> dict[str, Any]:
        """A further answer to the last request. Raises as ``ask`` does."""
        with self.losing(timeout_seconds):
            return self._receive(time.monotonic() + timeout_seconds)

    @contextlib.contextmanager
    def losing(self, timeout_seconds: float):
        """Kills the child for whatever goes wrong inside, and says so by ``WorkerLost``."""
        try:
            yield
        except TimeoutError:
            self._kill()
            raise WorkerLost("timeout", f"no answer within {timeout_seconds:.3g} s") from None
        except WorkerLost:
            self._kill()
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._kill()
            raise WorkerLost("died", f"the worker gave a senseless answer ({error})") from None

    def send(self, request: bytes, deadline: float) -> None:
        """Writes a request. Inside ``losing``."""
        os.ftruncate(self._complaints.fileno(), 0)
        self._write(LENGTH.pack(len(request)) + request, deadline)

    @property
    def is_gone(self) -> bool:
        """Whether it died while nothing was asked of it."""
        return bool(self._poll(self._answers, select.POLLIN, 0.0)) or self._has_exited()

    def end(self) -> None:
        """Ends the child and what it has started at once, for good. ``close`` has yet to be called."""
        self._is_ended = True
        self._kill()

    def close(self) -> None:
        """Ends the child and frees what belongs to it."""
        self._reap()
        for file in (self._requests, self._answers, self._complaints):
            with contextlib.suppress(OSError):
                file.close()

    def _kill(self) -> None:
        with self._lock:
            # Until it is reaped no other process can get its number.
            if self._process is not None and self._process.returncode is None:
                strays = descendants_of(self._process.pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                for stray in strays:  # those that have a session of their own
                    with contextlib.suppress(psutil.Error):
                        stray.kill()

    def _reap(self) -> int:
        self._kill()
        assert self._process is not None
        with self._lock, contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_REAP_SECONDS)
        return -signal.SIGKILL

    def _has_exited(self) -> bool:
        """Whether the child has ended. A process that it has forked may hold the pipes open. It is not reaped here."""
        assert self._process is not None
        if not hasattr(os, "waitid"):
            return False
        with self._lock, contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def _launch(self) -> subprocess.Popen[bytes]:
        option = self._words.option
        try:
            self._complaints = tempfile.TemporaryFile("ab+", buffering=0)
        except OSError as error:
            raise UserError(
                f"{option}: no temporary file for a worker's errors: {error.strerror or error} (TMPDIR)"
            ) from error
        search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        # Devices are hidden: whatever a library does at import, a worker takes no memory of a GPU.
        environment = os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # Schedulers send their signal to every process of a job. The trainer finishes its step first and needs its
        # workers for it. A child inherits the signals that the thread which starts it has blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_PARENT)
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
            raise UserError(f"{option}: a worker process cannot start: {error.strerror}") from error
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
        answer = json.loads(bytes(text))
        if not isinstance(answer, dict):
            raise ValueError(f"expected an object, got {type(answer).__name__}")
        return answer

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
        """Returns when ``file`` is ready. Raises ``TimeoutError``, or ``WorkerLost`` if the child is too big or has
        ended."""
        while True:
            has_exited = self._has_exited()
            left = deadline - time.monotonic()
            if self._poll(file, event, 0.0 if has_exited else max(0.0, min(left, _LOOK_SECONDS))):
                return
            if has_exited:  # and what it has written is read
                raise WorkerLost("died", self._epitaph())
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
        """Bytes of memory that the child and its descendants have in use, libraries included."""
        assert self._process is not None
        total, pid = 0, self._process.pid
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
        for process in descendants_of(pid):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _too_much(self) -> str:
        option = f" ({self._words.memory_option})" if self._words.memory_option else ""
        return f"the worker needs more than {self.memory_bytes / 1e9:.3g} GB{option}"

    def _epitaph(self) -> str:
        """How the child ended, which is known as soon as its pipe is closed, or a moment later."""
        deadline = time.monotonic() + _END_SECONDS  # the kernel closes the pipe before it knows the exit code
        while not self._has_exited() and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._reap()
        if code < 0:
            return f"the worker died (signal {-code})"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the worker ended with code {code}{f': {last[:300]}' if last else ''}"


def descendants_of(pid: int) -> list[psutil.Process]:
    """The living children of a process, theirs, and so on; at most 4096."""
    found: list[psutil.Process] = []
    open_pids = [pid]
    while open_pids and len(found) < _MOST_DESCENDANTS:
        for number in _children_of(open_pids.pop()):
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(number))
                open_pids.append(number)
    return found


def _children_of(pid: int) -> list[int]:
    numbers: list[int] = []
    try:  # a look through all processes of the machine costs milliseconds
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                numbers += [int(number) for number in file.read().split()]
        return numbers
    except OSError:
        if sys.platform == "linux" and not os.path.exists(f"/proc/{pid}"):
            return numbers
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(pid).children()]
        return []
