"""One worker process as the training process sees it: asked for one medium at a time, killed when it fails
(``processes/process.py``). Killing it ends its decord child too."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Sequence

import numpy as np

from megatron_ktr.data.media.job import MediaJob
from megatron_ktr.data.media.packed import num_frame_bytes, unpack_media
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from megatron_ktr.processes.process import ChildProcess, Words, WorkerLost

_WORDS = Words(
    option="data_workers",
    remedy="--data-workers 0 decodes without them",
    memory_option="--data-worker-memory-gb",
)


class WorkerProcess(ChildProcess):
    """A worker that decodes."""

    def __init__(self, *, memory_bytes: int, command: Sequence[str] | None = None) -> None:
        """``command`` runs the worker, by default ``child.py``; tests give one that fails."""
        command = command or (sys.executable, "-m", "megatron_ktr.data.workers.child")
        super().__init__(command, memory_bytes=memory_bytes, words=_WORDS)

    def read(self, job: MediaJob, *, timeout_seconds: float) -> LoadedMedia:
        """The media of ``job``.

        Raises:
            UnusableMedia: the worker says so.
            WorkerLost: it hung, died or took too much memory. It is dead then.
            UserError: the worker says so.
        """
        deadline = time.monotonic() + timeout_seconds
        with self.losing(timeout_seconds):
            self.send(pickle.dumps(job, protocol=5), deadline)
            answer = self._receive(deadline)
            kind = answer["kind"]
            if kind == "media":
                num_bytes = num_frame_bytes(answer["facts"])
                if num_bytes > self.memory_bytes:
                    raise ValueError(f"{num_bytes} bytes of frames")
                frames = np.empty(num_bytes, dtype=np.uint8)
                self._read_into(frames.data, deadline)
                return unpack_media(answer["facts"], frames, source=job.name)
            if kind == "memory":
                raise WorkerLost("memory", self._too_much())
        if kind == "unusable":
            raise UnusableMedia(answer["source"], answer["reason"])
        if kind == "user_error":
            raise UserError(answer["text"])
        raise RuntimeError(f"in a data worker, on {job.name}:\n{answer['text']}")
