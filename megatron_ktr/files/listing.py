"""Lists directories, and raises what ``Path.glob`` hides: it finds nothing in a directory that cannot be read. On
Python 3.11 it hides a denied permission alone, on newer ones also a file server that does not answer."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ktr.errors import unreadable


def paths_in(directory: Path, pattern: str = "*") -> list[Path]:
    """What ``directory`` holds under names that match ``pattern``, by name; empty if it does not exist.

    Raises:
        UserError: it cannot be listed; ``TransientError`` where that may pass.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(directory, error) from error
    return [directory / name for name in sorted(fnmatch.filter(names, pattern))]


def paths_below(directory: Path) -> Iterator[Path]:
    """Every file and directory below ``directory``, without following links to directories. Raises as ``paths_in``."""
    for path in paths_in(directory):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from paths_below(path)


def paths_in_folders_below(directory: Path, folders: Sequence[str], pattern: str) -> list[Path]:
    """What matches ``pattern`` in the folders below ``directory`` that have the names ``folders``, at any depth: in the
    order of these names, then by path. Raises as ``paths_in``."""
    found: dict[str, list[Path]] = {name: [] for name in folders}
    for path in paths_below(directory):
        if path.name in found:
            found[path.name] += paths_in(path, pattern)
    return [path for name in folders for path in sorted(found[name])]
