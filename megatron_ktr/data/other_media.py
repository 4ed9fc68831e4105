"""The media of another question beside each prompt, for the view ``attribution/views/other_video.py``.

The other record is one of the same source, at a distance in its file that follows from the seed and the prompt's draw
number. So it is the same for every number of replicas and workers, and after a resume. Candidates are passed over if
they are left out, name one of the prompt's own files, or lack a kind of medium (image, video) that the prompt has. Each
medium of the prompt then gets the other record's medium of its kind (its first by the other's first, and so on, from
the beginning again where there are fewer), brought to its own number of frames and its own height and width: frames are
picked evenly over the other video, and pictures are resized, whatever their shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import torch

from megatron_ktr.data.media.job import Decode
from megatron_ktr.data.media.preprocess import LoadedMedia, resize_frames
from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.workers.look_ahead import LookAhead, SampleMedia
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.types import Prompt, VisualInput

_log = logging.getLogger(__name__)
_MOST_LOOKED_AT = 256
"""Records that are looked at for one prompt."""
_MOST_READ = 4
"""Records whose media are read for one prompt: as many as that may be unusable before the prompt gets none."""


class Place(Protocol):
    """A place of the endless sequence of records (``data.dataset.Element``)."""

    @property
    def draw_number(self) -> int: ...

    @property
    def source(self) -> RecordSource: ...

    @property
    def record(self) -> Mapping[str, Any]: ...

    @property
    def next_position(self) -> int: ...


class OtherMedia:
    """Chooses and reads other media. What it gives follows from the seed and the draw number, so it has no state that a
    checkpoint would have to keep."""

    def __init__(self, *, seed: int, element_at: Callable[[int], Place], pool: WorkerPool | None) -> None:
        """``element_at`` gives the first element at or after a position. With a ``pool``, its workers read the media
        ahead of time."""
        self.seed = seed
        self._read: Future[SampleMedia] | None = None
        """The media of the first candidate for the element drawn last."""
        self._ahead = None if pool is None else LookAhead(element_at=element_at, submit=partial(self._submit, pool))

    def draw(self, position: int, *, num_wanted: int) -> None:
        """Call it for each position before ``add_to``. Workers then read for ``num_wanted`` elements, this one
        included."""
        if self._ahead is not None:
            _, self._read = self._ahead.take(position, num_wanted=num_wanted)

    def add_to(self, prompt: Prompt, element: Place) -> Prompt:
        """The prompt with ``other_media``. They stay empty, and are counted as ``no_other_media``, if none can be
        had."""
        if not prompt.media:
            return prompt
        loader, read = element.source.loader, self._read
        for candidate in itertools.islice(self._candidates(element), _MOST_READ):
            found = loader.read_media(candidate) if read is None else read.result()
            media = [one.visual for one in found if isinstance(one, LoadedMedia)]
            if len(media) == len(media_sources(candidate)):
                return dataclasses.replace(prompt, other_media=_like(prompt.media, media))
            read = None  # it was of the first candidate
        loader.counts["no_other_media"] += 1
        _log.warning("record %s: no other question has media of its kinds that can be read", prompt.problem_id)
        return prompt

    def close(self) -> None:
        """Forgets what was read ahead."""
        if self._ahead is not None:
            self._ahead.drop()

    def _submit(self, pool: WorkerPool, element: Place) -> Future[SampleMedia]:
        def read(decode: Decode) -> SampleMedia:
            first = next(self._candidates(element), None)
            return [] if first is None else element.source.loader.read_media(first, decode)

        return pool.submit(read)

    def _candidates(self, element: Place) -> Iterator[Mapping[str, Any]]:
        source, own = element.source, media_sources(element.record)
        records = source.records
        own_files, kinds = _files(own), {one.kind for one in own}
        if not own:
            return
        for attempt in range(_MOST_LOOKED_AT):
            index = self._index(element.draw_number, attempt, number=len(records))
            if source.is_left_out[index]:
                continue
            others = media_sources(records[index])
            if kinds <= {one.kind for one in others} and not own_files & _files(others):
                yield records[index]

    def _index(self, draw_number: int, attempt: int, *, number: int) -> int:
        """The place of the record that is looked at in this attempt, uniform over the file."""
        key = f"other media\x1f{self.seed}\x1f{draw_number}\x1f{attempt}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % number


def _files(sources: Sequence[Any]) -> set[str]:
    return {os.path.normpath(path) for source in sources for path in source.paths}


def _like(own: Sequence[VisualInput], others: Sequence[VisualInput]) -> tuple[VisualInput, ...]:
    """``others`` in the kinds, frame numbers and sizes of ``own``."""
    of_kind = {kind: itertools.cycle([one for one in others if one.kind == kind]) for kind in {m.kind for m in own}}
    return tuple(_resampled(medium, next(of_kind[medium.kind])) for medium in own)


def _resampled(own: VisualInput, other: VisualInput) -> VisualInput:
    """``other`` with the number of frames, size, grid and timing of ``own``."""
    places = torch.linspace(0, len(other.frames_FCHW) - 1, len(own.frames_FCHW)).round().long()
    height, width = own.frames_FCHW.shape[-2:]
    frames_FCHW = resize_frames(other.frames_FCHW[places], (height, width))
    return dataclasses.replace(own, frames_FCHW=frames_FCHW, source=other.source, features=None)
