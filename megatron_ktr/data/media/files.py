"""Checks that the media files which records name exist and lie below the media root."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PurePosixPath

from megatron_ktr.data.media.folder import list_pictures
from megatron_ktr.data.media.names import IS_FOLDER, names_folder
from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import TransientError, UserError, is_transient

_UNUSUAL = re.compile(r"[\\:\0]|\.\.|/\.?/|/\.?$|^\.?$|^\./\.|^\s*$")
"""Spellings of paths that need a closer look: schemes, drives, "..", doubled separators, folders."""
_LOOKUPS_BEFORE_LISTING = 32
"""After this many lookups of single files in a folder, the folder is listed, and all further lookups use the listing.
It is not listed at once, because a folder may hold millions of files that no record names."""


def resolve_media_path(media_root: Path | str, written: str) -> Path:
    """The file that ``written`` names below ``media_root``; a leading "/" means the media root, as in Video-R1.

    Raises:
        UserError: the path leads out of the media root, by "..", by a drive, a scheme or a link.
    """
    root = Path(media_root).resolve()
    inside = _written_below(root, written, media_root=media_root)
    try:
        resolved = inside.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"media path {_short(written)} below media_root {media_root}: {error}") from error
    if not resolved.is_relative_to(root):
        raise UserError(
            f"media path {_short(written)} leads by a link out of media_root {media_root} (to {resolved}); "
            "set media_root to a directory that contains the linked files"
        )
    return resolved


def files_of(source: MediaSource, media_root: Path | str) -> Path | tuple[Path, ...]:
    """The files of a medium, as ``read_frames`` takes them: one file, or the pictures of one video in their order.

    Raises:
        UserError: a path leads out of the media root.
        UnusableMedia: a folder of pictures cannot be listed, or holds something else than pictures.
    """
    paths = tuple(resolve_media_path(media_root, written) for written in source.paths)
    if source.is_folder:
        return list_pictures(paths[0], root=Path(media_root).resolve())
    return paths if source.is_pictures else paths[0]


class MediaFiles:
    """Checks for a large number of paths whether they are files, with few calls to the file system."""

    def __init__(self, media_root: Path | str) -> None:
        self._media_root = media_root
        self._root = Path(media_root).resolve()
        self._folders: dict[str, _Folder] = {}

    def check(self, written: str) -> None:
        """Raises ``UserError`` as ``resolve_media_path`` does, and ``UnusableMedia`` if there is no such file.

        A path that ends in "/" must be a folder of pictures. It is listed, but no picture is opened. An error that may
        pass is ``TransientError``: a file server that is away for a moment must not leave records out of a whole run.
        """
        try:
            self._check(written)
        except (UnusableMedia, OSError) as error:
            if is_transient(error):
                what = f"media path {_short(written)} below media_root {self._media_root}"
                raise TransientError(f"{what}: {error}") from error
            raise

    def _check(self, written: str) -> None:
        path = self._quickly_below(written)
        parent, _, name = path.rpartition("/")
        folder = self._folders.get(parent)
        if folder is None:
            folder = self._folders[parent] = _Folder(parent, root=self._root)
        kind = folder.kind_of(name)
        if kind == "link":
            path = resolve_media_path(self._media_root, written)
            kind = "folder" if path.is_dir() else "file" if path.exists() else "nothing"
        if kind == "nothing":
            raise UnusableMedia(_short(written), "no such file below media_root")
        if kind == "folder":
            if not names_folder(written):
                raise UnusableMedia(_short(written), IS_FOLDER)
            list_pictures(Path(path), root=self._root)
        elif names_folder(written):
            raise UnusableMedia(_short(written), "is a file, and a path that ends in '/' names a folder of pictures")

    def _quickly_below(self, written: str) -> str:
        """Returns what ``_written_below`` does, for usual spellings without the cost of its path objects."""
        is_usual = _UNUSUAL.search(written) is None and not written[-1:].isspace()
        if not is_usual or (written.startswith("/") and written.startswith(str(self._root))):
            return str(_written_below(self._root, written, media_root=self._media_root))
        return f"{self._root}/{written.removeprefix('/').removeprefix('./')}"


class _Folder:
    def __init__(self, path: str, *, root: Path) -> None:
        self._path = path
        self._num_lookups = 0
        self._listing: dict[str, str] | None = None
        # If a link leads out of the root, or in a circle, every file of the folder is resolved by itself.
        try:
            self._is_plain = Path(path).resolve().is_relative_to(root)
        except (OSError, RuntimeError):
            self._is_plain = False

    def kind_of(self, name: str) -> str:
        """Returns "file", "folder", "link" or "nothing"."""
        if not self._is_plain:
            return "link"
        self._num_lookups += 1
        if self._num_lookups > _LOOKUPS_BEFORE_LISTING and self._listing is None:
            self._listing = self._list()
        if self._listing is not None:
            return self._listing.get(name, "nothing")
        try:
            mode = os.lstat(os.path.join(self._path, name)).st_mode
        except (OSError, ValueError) as error:
            if is_transient(error):
                raise
            return "nothing"
        return "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "file"

    def _list(self) -> dict[str, str]:
        try:
            with os.scandir(self._path) as entries:
                return {
                    entry.name: "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"
                    for entry in entries
                }
        except FileNotFoundError:
            return {}
        except OSError as error:  # a folder that may be entered and not listed
            if is_transient(error):
                raise
            self._num_lookups = -(1 << 60)
            return None  # type: ignore[return-value]


def _written_below(root: Path, written: str, *, media_root: Path | str) -> Path:
    """The path below the resolved ``root`` that ``written`` names, without following links."""
    plain = written.removeprefix("file://")
    parts = PurePosixPath(plain.replace("\\", "/")).parts
    if not plain.strip() or "\0" in plain or ".." in parts or any(":" in part for part in parts[:1]):
        raise UserError(
            f"media path {_short(written)}: expected a path below media_root {media_root}, without '..' or scheme"
        )
    inside = Path(plain)
    if inside.is_absolute() and inside.is_relative_to(root):
        return inside
    return root.joinpath(*(part for part in parts if part != "/"))


def _short(written: str) -> str:
    text = repr(written)
    return text if len(text) <= 200 else text[:197] + "..."
