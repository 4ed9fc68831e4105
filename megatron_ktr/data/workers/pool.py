"""Worker processes that decode beside training. A file that hangs, kills or swells a worker costs its sample alone.

torch's ``DataLoader`` and torchdata's ``StatefulDataLoader`` end as a whole when a worker dies, and cannot end one that
hangs. Pools with a pipe that all workers share can be blocked for ever by a worker that is killed while it holds the
pipe's lock. Here every worker has pipes of its own and a thread that waits for it:

    WorkerPool.submit(read)      runs read(decode) in one of the threads
    decode(job)                  asks the thread's process for the frames of one medium (``process.py``)

The thread receives the frames. It replaces its process after a failure, and turns the failure into ``UnusableMedia``.
Processes are fresh Python processes (``child.py``); nothing is forked, because the trainer has threads and a device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.data.workers.process import WorkerProcess
from megatron_ktr.errors import UserError
from megatron_ktr.processes.process import WorkerLost

T = TypeVar("T")
_log = logging.getLogger(__name__)


class WorkerPool:
    """``num_workers`` processes, started when they are first needed."""

    def __init__(
        self,
        num_workers: int,
        *,
        timeout_seconds: float = 300.0,
        memory_bytes: int = 8_000_000_000,
        command: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            timeout_seconds: the longest time that decoding of all media of one sample may take.
            memory_bytes: the most memory of one worker with its decord child.
            command: what runs a worker; see ``WorkerProcess``.
        """
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self._command = command
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="data worker")
        self._of_thread = threading.local()
        self._workers: set[WorkerProcess] = set()
        self._counts: Counter[str] = Counter(replaced=0)
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, read: Callable[[Decode], T]) -> Future[T]:
        """Calls ``read(decode)`` in a thread that has a worker of its own. ``read`` handles one sample: its calls of
        ``decode`` share the time limit.

        ``decode`` raises ``UnusableMedia``, also for what happened to the worker, and ``UserError`` if no worker can
        be started.
        """
        return self._threads.submit(lambda: read(_SampleDecoder(self).decode))

    def counts(self) -> Mapping[str, int]:
        """data_workers/replaced, and "data_workers/replaced: <why>", since this process began."""
        with self._lock:
            return {f"data_workers/{name}": number for name, number in self._counts.items()}

    def close(self) -> None:
        """Ends all workers, also those that hang. What was submitted and is not done is dropped."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._running():
            worker.end()
        self._threads.shutdown(wait=True)
        for worker in self._running():
            worker.close()

    def worker(self) -> WorkerProcess:
        """The worker of the calling thread, started if it is not there."""
        worker: WorkerProcess | None = getattr(self._of_thread, "worker", None)
        if worker is not None and worker.is_gone:
            self.drop(worker, "died", "a data worker died while it had nothing to do; it is replaced")
            worker = None
        if worker is None:
            worker = WorkerProcess(memory_bytes=self.memory_bytes, command=self._command)
            with self._lock:
                self._workers.add(worker)
                if self._is_closed:
                    worker.end()
            try:
                worker.start()
            except UserError:
                with self._lock:
                    self._workers.discard(worker)
                raise
            self._of_thread.worker = worker
        return worker

    def drop(self, worker: WorkerProcess, why: str, text: str) -> None:
        """Ends the calling thread's worker and counts it, unless the pool is being closed."""
        self._of_thread.worker = None
        with self._lock:
            self._workers.discard(worker)
            is_closed = self._is_closed
            if not is_closed:
                self._counts.update(("replaced", f"replaced: {why}"))
        worker.close()
        if not is_closed:
            _log.warning("%s", text)

    def _running(self) -> list[WorkerProcess]:
        with self._lock:
            return list(self._workers)


class _SampleDecoder:
    """Decodes the media of one sample within one time limit."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._seconds_left = pool.timeout_seconds

    def decode(self, job: MediaJob) -> LoadedMedia:
        if self._seconds_left <= 0:  # another medium of the sample took all the time
            raise UnusableMedia(job.name, self._too_late())
        worker = self._pool.worker()
        started = time.monotonic()
        try:
            return worker.read(job, timeout_seconds=self._seconds_left)
        except WorkerLost as error:
            texts = {"died": f"{error} on it", "timeout": self._too_late()}
            reason = texts.get(error.why, str(error))
            self._pool.drop(worker, error.why, f"{job.name}: {reason}; the worker is replaced")
            raise UnusableMedia(job.name, reason) from None
        finally:
            self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - started))

    def _too_late(self) -> str:
        return f"not decoded within the {self._pool.timeout_seconds:g} s of a sample (--data-timeout-seconds)"
