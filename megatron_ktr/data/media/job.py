"""One image or video to be read, as plain data: what caches are named by, and what is sent to a worker process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings, load_media
from megatron_ktr.data.media.request import MediaRequest, media_name
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.types import MediaKind


@dataclass(frozen=True)
class MediaJob:
    """The files of one medium, and everything that decides which pixels are made of them."""

    paths: tuple[Path, ...]
    """Resolved and checked to lie below the media root. Several files are the pictures of one video."""
    kind: MediaKind
    is_pictures: bool
    request: MediaRequest
    settings: PreprocessSettings
    sampling: FrameSampling

    @property
    def name(self) -> str:
        """What logs call the medium; ``VisualInput.source`` of the result."""
        files = tuple(map(str, self.paths))
        return media_name(files if self.is_pictures else files[0], self.request)

    def load(self) -> LoadedMedia:
        """Reads and resizes the medium in this process. Raises ``UnusableMedia`` as ``load_media`` does."""
        return load_media(
            self.paths if self.is_pictures else self.paths[0],
            kind=self.kind,
            settings=self.settings,
            sampling=self.sampling,
            request=self.request,
        )


Decode = Callable[[MediaJob], LoadedMedia]
"""Makes frames of a job: ``MediaJob.load``, or the same in a worker process. Raises ``UnusableMedia``."""
