"""Finds the videos of a benchmark below the media root, in the folder in which this download has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_ktr.data.records import check_record
from megatron_ktr.errors import is_transient, unreadable
from megatron_ktr.evaluation.item import Item

SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi")
"""The suffixes that copies of a video are looked for with, beside its own."""


def place_media(items: Sequence[Item], folders: Sequence[str], *, media_root: Path) -> list[Item]:
    """The items with the paths at which their videos are below ``media_root``.

    A path that begins with ``folders[0]`` is looked for in each of the folders (``Benchmark.media_folders``), in their
    order, and there with each of ``SUFFIXES``. A video that is nowhere keeps its path, so that whoever reads it says
    that it is missing. The path that is chosen does not change the item's id.

    Raises:
        TransientError: a file server does not say whether a video is there.
    """
    found: dict[str, str] = {}
    placed = []
    for item in items:
        written = item.record.get("video")
        if not isinstance(written, str):
            placed.append(item)
            continue
        if written not in found:
            places = _places(written, folders)
            found[written] = next((place for place in places if _is_there(media_root / place)), written)
        if found[written] != written:
            record = check_record({**item.record, "video": found[written]}, number=item.record.get("record_number", 1))
            item = dataclasses.replace(item, record=record)
        placed.append(item)
    return placed


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_transient(error):  # it would be looked for elsewhere
            raise unreadable(path, error) from error
        return False
    return True


def _places(written: str, folders: Sequence[str]) -> Iterator[str]:
    yield written
    published = f"{folders[0]}/" if folders and folders[0] else ""
    if not folders or not written.startswith(published):
        return
    below = written[len(published) :]
    for folder in folders:
        if folder.endswith("*"):
            place = folder.removesuffix("*") + PurePosixPath(below).name
        else:
            place = f"{folder}/{below}" if folder else below
        yield place
        if not place.endswith("/"):
            yield from (str(PurePosixPath(place).with_suffix(suffix)) for suffix in SUFFIXES)
