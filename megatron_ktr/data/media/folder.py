"""Lists a folder of pictures that are the frames of one video."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_ktr.data.media.names import is_picture
from megatron_ktr.data.unusable import UnusableMedia

MOST_PICTURES = 200_000
"""A folder with more entries is refused: it is more than two hours at 25 a second, and each listing would be slow."""
_NUMBER = re.compile("([0-9]+)")


def list_pictures(folder: Path, *, root: Path) -> tuple[Path, ...]:
    """The pictures of ``folder`` in the natural order of their names: numbers in names count as numbers.

    >>> sorted(["f10.jpg", "f9.jpg", "f1.jpg"], key=natural_key)
    ['f1.jpg', 'f9.jpg', 'f10.jpg']

    Args:
        folder: a resolved path.
        root: the resolved media root, out of which no link may lead.

    Raises:
        UnusableMedia: there is no such folder, it is empty, it holds anything else than pictures, it holds more than
            ``MOST_PICTURES``, or two names have the same place in the order (``7.jpg`` and ``07.png``).
    """
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if len(names) == MOST_PICTURES:
                    raise UnusableMedia(folder, f"holds more than {MOST_PICTURES} files")
                if not is_picture(entry.name) or not entry.is_file():
                    raise UnusableMedia(folder, f"holds {entry.name!r}, which is not a picture; expected pictures only")
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                    raise UnusableMedia(folder, f"{entry.name!r} leads by a link out of the media root")
                names.append(entry.name)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UnusableMedia(folder, getattr(error, "strerror", None) or error) from error
    if not names:
        raise UnusableMedia(folder, "is a folder without a picture")
    keyed = sorted((natural_key(name), name) for name in names)
    for (key, name), (next_key, next_name) in zip(keyed, keyed[1:], strict=False):
        if key == next_key:
            raise UnusableMedia(folder, f"{name!r} and {next_name!r} have the same place in the order of its pictures")
    return tuple(folder / name for _, name in keyed)


def natural_key(name: str) -> list[str | int]:
    """What pictures are ordered by: the name without its suffix, cut into texts and numbers, which take turns."""
    parts: list[str | int] = list(_NUMBER.split(os.path.splitext(name)[0]))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts
