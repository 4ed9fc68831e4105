"""Finds files in a checkout of a repository, and its commit. Nothing of the checkout is run, and git is not asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_ktr.errors import UserError, is_transient, unreadable

MOST_FOLDERS = 20_000
"""How many folders of a checkout are searched for a file that is not at its usual place."""
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REFERENCE = re.compile(r"refs/[\w./-]{1,200}")


def find_file(checkout: Path, wanted: str) -> tuple[Path | None, list[Path]]:
    """(file, other files) for a path ``wanted`` in the repository.

    The file is at that path, or else the only one whose path ends in the same two names. Otherwise it is None, and the
    other files are those of the same name.
    """
    if (checkout / wanted).is_file():
        return checkout / wanted, []
    *_, folder, name = ("", *PurePosixPath(wanted).parts)
    named = list(_files_named(checkout, name))
    alike = [path for path in named if not folder or path.parent.name == folder]
    return (alike[0], []) if len(alike) == 1 else (None, named)


def _files_named(checkout: Path, name: str) -> Iterator[Path]:
    for number, (folder, folders, files) in enumerate(os.walk(checkout, onerror=_refuse)):
        if number == MOST_FOLDERS:
            raise UserError(f"RELEASE_DIR: {checkout} has more than {MOST_FOLDERS} folders: is it one repository?")
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        if name in files:
            yield Path(folder) / name


def _refuse(error: OSError) -> None:
    if is_transient(error):  # the file would be taken for missing, or another one for the only one
        raise unreadable(error.filename, error) from error


def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out, as .git says; None if it does not say."""
    try:
        git = checkout / ".git"
        if git.is_file():  # a worktree or submodule: the file names the folder
            git = checkout / git.read_text(encoding="utf-8")[:4096].removeprefix("gitdir:").strip()
        head = _text_of(git / "HEAD")
        if _COMMIT.fullmatch(head):
            return head
        reference = head.removeprefix("ref:").strip()
        if not _REFERENCE.fullmatch(reference) or ".." in reference:
            return None
        common = git / _text_of(git / "commondir") if (git / "commondir").is_file() else git
        for folder in (git, common):
            if (folder / reference).is_file():
                found = _text_of(folder / reference)
                return found if _COMMIT.fullmatch(found) else None
        for line in _text_of(common / "packed-refs", most=10_000_000).splitlines():
            commit, _, name = line.partition(" ")
            if name == reference and _COMMIT.fullmatch(commit):
                return commit
    except (OSError, ValueError):
        pass
    return None


def _text_of(path: Path, *, most: int = 4096) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(most).strip()
