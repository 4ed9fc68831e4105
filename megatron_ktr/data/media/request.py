"""Reads what a record says about its media: the files, and the fields that say how to read them.

A record, or one part of its ``messages``, may have the fields that qwen-vl-utils reads. Each field is either followed
(``HONOURED``) or makes the record unusable (``REFUSED``); none is silently ignored. The run's own limits hold as well:
a record may ask for values within them, and a record that contradicts them is refused. ``docs/records.md`` explains
each field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from megatron_ktr.data.media.names import VIDEO_SUFFIXES, is_picture, names_folder
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.types import MediaKind

if TYPE_CHECKING:
    from megatron_ktr.data.media.preprocess import PreprocessSettings

_CLIP = "it is the clip to watch in some data sets and the answer in others: name a clip video_start and video_end"
_PART_OF_AUDIO = "the model does not hear"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("start_time", "end_time", "start_sec", "end_sec", "bound"), _CLIP),
    **dict.fromkeys(("start_second", "end_second", "start_timestamp", "end_timestamp"), _CLIP),
    **dict.fromkeys(("clip", "clip_start", "clip_end", "start_frame", "end_frame"), _CLIP),
    **dict.fromkeys(("resized_height", "resized_width"), "sizes are chosen by min_pixels and max_pixels"),
    **dict.fromkeys(("audio", "audios", "use_audio_in_video"), _PART_OF_AUDIO),
    **dict.fromkeys(("tools", "functions"), "prompts have no tools"),
    **dict.fromkeys(("loss_weight", "sample_weight"), "records have no weights"),
    "mm_processor_kwargs": "name its fields in the record",
}
"""Fields that look like instructions but are not followed, each with the reason or a remedy."""
SYNONYMS: Mapping[str, str] = {"start": "video_start", "end": "video_end"}
"""MVBench's names for the clip that a question is about. Data sets that store the answer in these fields need
--ignore-fields."""
MEDIA_LOOKALIKES = frozenset(
    "frames frame_paths video_path video_paths video_file video_url video_urls image_path image_paths image_file "
    "image_url image_urls img file_name media".split()
)
"""Field names under which other data sets store media. They are not read here. A record that has only such a field is
refused, because the question would be asked without its media."""


@dataclass(frozen=True)
class MediaRequest:
    """How a record asks for one image or video to be read. None means that the run's options decide.

    The field names are those of records.
    """

    fps: float | None = None
    """The number of frames to take per second of a video file; for a list or folder of pictures, their frame rate."""
    sample_fps: float | None = None
    """The frame rate of a list or folder of pictures; not allowed for a video file."""
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    """Start and end of the clip in seconds from the video's beginning. Only frames of the clip are used."""

    def given(self) -> dict[str, Any]:
        """The fields that are not None, by name."""
        return {name: value for name in HONOURED if (value := getattr(self, name)) is not None}

    @property
    def pictures_fps(self) -> float | None:
        return self.fps if self.sample_fps is None else self.sample_fps

    def sampling(self, run: FrameSampling, *, is_pictures: bool) -> FrameSampling:
        """The run's frame sampling, changed as this request asks.

        Raises:
            ValueError: the request exceeds the run's limit of frames, or contradicts itself.
        """
        most = run.max_frames if self.max_frames is None else min(self.max_frames, run.max_frames)
        least = run.min_frames if self.min_frames is None else self.min_frames
        for name, asked in (("nframes", self.nframes), ("min_frames", self.min_frames)):
            if asked is not None and asked > most:
                raise ValueError(f"{name} {asked} exceeds the most frames of a video, {most}")
        if most < run.multiple:
            raise ValueError(f"max_frames {most} is less than one temporal patch, {run.multiple} frames")
        num_frames, rule = run.num_frames, run.rule
        if self.nframes is not None:
            num_frames, rule = self.nframes, "fixed"
        elif self.fps is not None and not is_pictures:
            num_frames, rule = None, "fps"  # the requested rate replaces the run's fixed number
        return replace(
            run,
            fps=run.fps if self.fps is None or is_pictures else self.fps,
            num_frames=num_frames,
            rule=rule,
            min_frames=min(least, most),
            max_frames=most,
            start_seconds=self.video_start,
            end_seconds=self.video_end,
        )

    def settings(self, run: PreprocessSettings, *, kind: MediaKind) -> PreprocessSettings:
        """The run's preprocessing settings, changed as this request asks.

        Raises:
            ValueError: no size satisfies both the run's limits and the request.
        """
        low_name, high_name = f"{kind}_min_pixels", f"{kind}_max_pixels"
        low = max(getattr(run, low_name), self.min_pixels or 0)
        high = min(getattr(run, high_name), self.max_pixels or getattr(run, high_name))
        if low > high:
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels} leave no size within the run's "
                f"{getattr(run, low_name)} to {getattr(run, high_name)} pixels of one {kind} frame"
            )
        if high < run.factor**2:
            raise ValueError(f"max_pixels {self.max_pixels} is less than one visual token, {run.factor**2} pixels")
        total = min(run.video_total_pixels, self.total_pixels or run.video_total_pixels)
        return replace(run, **{low_name: low, high_name: high}, video_total_pixels=total)


NOTHING_ASKED = MediaRequest()
HONOURED: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(MediaRequest))
_OF_IMAGES = frozenset(("min_pixels", "max_pixels", "total_pixels"))
_SMALLEST, _LARGEST = 1e-6, 1e9
"""The smallest and largest rate, time or size. Values outside are mistakes, and seconds per frame would overflow."""
_WHOLE = ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")


@dataclass(frozen=True)
class MediaSource:
    """One image or video of a record."""

    kind: MediaKind
    written: str | tuple[str, ...]
    """The path as the record has it. A tuple of paths names the pictures that are the frames of one video, in order; a
    path that ends in "/" names the folder that holds them."""
    request: MediaRequest = NOTHING_ASKED

    @property
    def is_folder(self) -> bool:
        return isinstance(self.written, str) and names_folder(self.written)

    @property
    def is_pictures(self) -> bool:
        """Whether it is a video that is given as single pictures."""
        return not isinstance(self.written, str) or self.is_folder

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.written,) if isinstance(self.written, str) else self.written

    @property
    def name(self) -> str:
        """The name of the medium for logs and reports, with its clip if it has one."""
        return media_name(self.written, self.request)


def media_name(written: object, request: MediaRequest = NOTHING_ASKED) -> str:
    """>>> media_name(("f0.jpg", "f1.jpg", "f2.jpg"), MediaRequest(video_start=2))
    'f0.jpg .. f2.jpg (3 pictures), from 2 s'
    """
    name = f"{written[0]} .. {written[-1]} ({len(written)} pictures)" if isinstance(written, tuple) else str(written)
    if request.video_start is not None:
        name += f", from {request.video_start:g} s"
    return name if request.video_end is None else f"{name}, until {request.video_end:g} s"


def media_sources(record: Mapping[str, Any]) -> list[MediaSource]:
    """The media of a record from ``check_record``, in the order of its field ``media``."""
    media = record.get("media", ())
    requests = record.get("media_requests") or [{}] * len(media)
    return [
        MediaSource(kind, written if isinstance(written, str) else tuple(written), MediaRequest(**fields))
        for (kind, written), fields in zip(media, requests, strict=True)
    ]


def read_request(raw: Mapping[str, Any], *, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The fields of ``HONOURED`` that a record or a message part sets, with their values checked.

    Raises:
        ValueError: a value is impossible, two values contradict each other, or there is a field of ``REFUSED``.
    """
    for name in REFUSED:
        if name in raw and name not in ignored and not _is_empty(raw[name]):
            raise ValueError(
                f"field '{name}' is not followed: {REFUSED[name]} (where it is only data: --ignore-fields {name})"
            )
    found: dict[str, Any] = {}
    for written, name in {**{name: name for name in HONOURED}, **SYNONYMS}.items():
        value = raw.get(written)
        if value is None or written in ignored:
            continue
        kinds = int if name in _WHOLE else (int, float)
        lowest_is_allowed = name in ("video_start", "min_frames")
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not (_SMALLEST <= value <= _LARGEST or lowest_is_allowed and value == 0)
        ):
            what = "a whole number" if name in _WHOLE else "a number"
            raise ValueError(
                f"expected '{written}' to be {what} above 0 (where it is only data: --ignore-fields {written}), "
                f"got {_short(value)}"
            )
        if found.get(name, value) != value:
            raise ValueError(f"'{written}' {value} and '{name}' {found[name]} differ: which is the clip?")
        found[name] = value
    _check_request(found)
    return found


def unread_instructions(raw: Mapping[str, Any], *, read: Collection[str] = ()) -> list[str]:
    """The fields of a published record that say how its media are to be read, or look like it, and are not ``read``.
    Rates are not among them: in published files they tell what the rate is."""
    rates = ("fps", "sample_fps")
    names = [*(name for name in HONOURED if name not in rates), *REFUSED]
    return [name for name in names if name not in read and not _is_empty(raw.get(name))]


def _check_request(found: Mapping[str, Any]) -> None:
    if "fps" in found and "nframes" in found:
        raise ValueError("expected 'fps' or 'nframes', got both")
    if found.get("fps", found.get("sample_fps")) != found.get("sample_fps", found.get("fps")):
        raise ValueError(f"'fps' {found['fps']} and 'sample_fps' {found['sample_fps']} differ: which is the rate?")
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if low in found and high in found and found[low] > found[high]:
            raise ValueError(f"'{low}' {found[low]} exceeds '{high}' {found[high]}")
    if "video_end" in found and found["video_end"] <= found.get("video_start", 0):
        raise ValueError(f"'video_end' {found['video_end']} is not after 'video_start' {found.get('video_start', 0)}")


def fields_for(kind: str, of_record: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a record that apply to its media of this kind. Rates and clips apply to videos only."""
    return {name: value for name, value in of_record.items() if kind == "video" or name in _OF_IMAGES}


def check_request_fits(source: MediaSource) -> None:
    """Raises ``ValueError`` if a field has no meaning for this medium."""
    request = source.request
    if source.kind == "image" and (others := request.given().keys() - _OF_IMAGES):
        raise ValueError(f"'{min(others)}' is about a video, and {source.name} is an image")
    if source.kind == "video" and not source.is_pictures and request.sample_fps is not None:
        raise ValueError(
            "'sample_fps' is the rate of a list of pictures, or of a folder of them, whose path ends in '/'; for a "
            "video file say 'fps'"
        )


def group_files(kind: MediaKind, value: Any, *, key: str) -> list[tuple[MediaKind, str | tuple[str, ...]]]:
    """The media that the field ``key`` of a record names; its ``value`` is one path or a list.

    Each path of an image is one image. Each path of a video file is one video, and so is each folder of pictures, whose
    path ends in "/". A list of pictures is one video; it may be the whole value or an element of it.

    Raises:
        ValueError: the value does not fit the kind.
    """
    if value is None or value == "" or value == []:
        return []
    for written in _flat(value):
        if not isinstance(written, str) or not written.strip():
            raise ValueError(f"expected a path (or a list of paths) in '{key}', got {written!r}")
    if kind == "image":
        return [(kind, _image_path(written, key=key)) for written in _as_list(value)]
    values = _as_list(value)
    if isinstance(value, list) and all(isinstance(written, str) and is_picture(written) for written in values):
        return [(kind, tuple(values))]
    return [(kind, _video_files(written, key=key, is_alone=len(values) == 1)) for written in values]


def _video_files(written: Any, *, key: str, is_alone: bool) -> str | tuple[str, ...]:
    if isinstance(written, list):
        if not written or not all(isinstance(inner, str) and is_picture(inner) for inner in written):
            raise ValueError(f"expected a list inside '{key}' to name the pictures of one video, got {_short(written)}")
        return tuple(written)
    if not is_picture(written):
        return written
    if is_alone:
        raise ValueError(
            f"'{key}' names one picture, {written!r}, as a video: name it under 'image', or as a list of pictures"
        )
    raise ValueError(
        f"'{key}' mixes pictures and videos: expected pictures only (the frames of one video) or video files only, "
        f"got {_short(written)} among others"
    )


def _image_path(written: Any, *, key: str) -> str:
    if isinstance(written, list):
        raise ValueError(f"expected a path (or a list of paths) in '{key}', got {_short(written)}")
    if names_folder(written):
        raise ValueError(f"'{key}' names a folder, {written!r}: expected a picture (a folder of pictures is a video)")
    if PurePosixPath(written).suffix.lower() in VIDEO_SUFFIXES:
        raise ValueError(f"'{key}' names a video, {written!r}: name it under 'video'")
    return written


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _flat(value: Any) -> list[Any]:
    return [inner for outer in _as_list(value) for inner in (outer if isinstance(outer, list) else [outer])]


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
