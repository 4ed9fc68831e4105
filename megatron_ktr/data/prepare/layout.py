"""What a published layout is: how its records are recognised, taken apart and turned into ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = dict[str, Any]


class Keyed(NamedTuple):
    """One entry of a file that is a single JSON object, e.g. video -> its questions."""

    key: str
    value: Any


class Unreadable(NamedTuple):
    """A row that its file does not hold whole."""

    reason: str


@dataclass(frozen=True)
class Options:
    """What the user says about the published files beyond their layout."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of ours -> column of the file, for ``plain``."""
    video_map: Mapping[str, str] = field(default_factory=dict)
    """Video id -> path without suffix, e.g. NExT-QA's ``map_vid_vidorID.json``; empty = the id is the path."""
    video_suffix: str = ".mp4"
    """Suffix of the videos of which a layout only gives the id."""
    strip_prefix: str = ""
    """Removed from the beginning of every media path that has it."""
    add_prefix: str = ""
    """Folder put before every media path, relative to the media root."""
    ignored: Collection[str] = ()
    """Fields that are only data although they look like instructions."""


def whole(raw: Any) -> Iterable[Any]:
    """The usual ``Layout.split``: a raw record holds one question."""
    return (raw,)


@dataclass(frozen=True)
class Layout:
    """A published layout. ``megatron_ktr/data/prepare/layouts`` has one file for each."""

    name: str
    title: str
    """What is published in it."""
    media_root: str
    """The folder that its media paths are below, in words for people."""
    recognises: Callable[[Any], bool]
    """Whether a raw record looks like one of this layout; never raises."""
    convert: Callable[[Any, Options], Record]
    """One record of ours from one part of a raw record. Raises ``ValueError`` with the reason if that is impossible."""
    split: Callable[[Any], Iterable[Any]] = whole
    """The parts of a raw record, one for each question. Raises ``ValueError`` like ``convert``."""
    is_supervised: bool = False
    """Whether the records are for ``--objective sft`` and need no right answer."""
    options: tuple[str, ...] = ()
    """The fields of ``Options`` that it reads besides the two prefixes."""
    reads: tuple[str, ...] = ()
    """Fields that look like instructions of another layout (``media/request.py``), and that it reads."""
