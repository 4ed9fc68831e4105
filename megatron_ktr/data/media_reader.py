"""Reads media through two caches: resized frames in memory, and the frame cache on disk (``frame_cache.py``)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia


class MediaCache:
    """A cache of resized media in memory. Beyond ``max_bytes`` the least recently used ones are dropped. Threads may
    share it.

    It assumes that files do not change during a run.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[MediaJob, LoadedMedia] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, job: MediaJob) -> LoadedMedia | None:
        with self._lock:
            if job in self._items:
                self._items.move_to_end(job)
            return self._items.get(job)

    def put(self, job: MediaJob, media: LoadedMedia) -> None:
        size = media.visual.frames_FCHW.nbytes
        with self._lock:
            if size > self.max_bytes or job in self._items:
                return
            self._items[job] = media
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, oldest = self._items.popitem(last=False)
                self.num_bytes -= oldest.visual.frames_FCHW.nbytes


class MediaReader:
    """Reads media from memory, else from the cache on disk, else by decoding. All loaders of a run share one reader."""

    def __init__(self, *, memory_bytes: int = 0, disk: FrameCache | None = None) -> None:
        self.memory = MediaCache(memory_bytes)
        self.disk = disk

    def read(self, job: MediaJob, decode: Decode = MediaJob.load) -> LoadedMedia:
        """The media of ``job``. Several threads may call it, each with its own ``decode``.

        Raises:
            UnusableMedia: as ``decode`` does.
        """
        media = self.memory.get(job)
        if media is None:
            media = decode(job) if self.disk is None else self.disk.read_through(job, decode)
            self.memory.put(job, media)
        return media

    def counts(self) -> Mapping[str, int]:
        """``frame_cache/...`` since this process began; empty without a cache on disk."""
        return {} if self.disk is None else self.disk.counts()
