"""Chooses the checkpoint from which a run continues: the newest one whose files are what was written.

Newer, damaged checkpoints are renamed, ``step_00000030`` to ``damaged_step_00000030``. Nothing is deleted, and the next
start does not find them again. If no checkpoint is intact, nothing is changed and the run does not start, because the
files may hold weeks of work. A file that cannot be read is not damaged: nothing is changed for it either.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.errors import TransientError, UserError, is_transient, unreadable
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, damage_line, find_damage, read_manifest

_log = logging.getLogger(__name__)

TRAINING_FILE, CONFIG_FILE = "training.json", "config.yaml"
REQUIRED_FILES = ("metadata.json", ".metadata", TRAINING_FILE, CONFIG_FILE)
FORMAT_VERSION = 2
"""The version in ``training.json``. Checkpoints of version 1, or without a version, have no checksums, and their random
states are pickled."""

Verify = Callable[[Path], list[Damage]]
"""A function that returns what is wrong with a checkpoint; [] if nothing is."""


@dataclass(frozen=True)
class Verdict:
    """The result of checking a run's checkpoints, newest first, up to the first intact one."""

    intact: Path | None
    damaged: tuple[tuple[Path, Damage], ...]
    """The newer checkpoints, each with the first thing that is wrong with it."""


def newest_intact(checkpoints: Sequence[Path], *, verify: Verify) -> Verdict:
    """Finds the newest intact one of ``checkpoints``, which are given oldest first.

    Raises:
        UserError: there are checkpoints, but none is intact; the message names each with its damage.
        TransientError: one cannot be read now, which may pass: an older one would cost the steps after it.
    """
    damaged: list[tuple[Path, Damage]] = []
    for path in reversed(checkpoints):
        try:
            found = verify(path)
        except UserError as error:
            if not is_transient(error):
                raise
            raise TransientError(
                f"--resume: {error}; nothing was set aside, because that may pass: start again. If it stays so, move "
                f"{path} away, and the run goes on from an older checkpoint"
            ) from error
        if not found:
            return Verdict(path, tuple(damaged))
        damaged.append((path, found[0]))
    if damaged:
        named = "; ".join(f"{path.name}: {damage}" for path, damage in damaged)
        raise UserError(
            f"--resume: no checkpoint in {damaged[0][0].parent} is intact ({named}); nothing was changed: restore one, "
            "or begin anew in another --run-dir"
        )
    return Verdict(None, ())


def set_aside(verdict: Verdict) -> None:
    """Renames the damaged checkpoints, and logs for each why, and from which checkpoint the run continues."""
    for path, damage in verdict.damaged:
        aside = unused_path(path.with_name(f"damaged_{path.name}"))
        rename_path(path, aside)
        _log.warning("%s is damaged (%s): set aside as %s; going on from %s", path, damage, aside.name, verdict.intact)
    if verdict.intact is not None and not (verdict.intact / MANIFEST).exists():
        _log.warning(
            "%s has no checksums (%s): an earlier version saved it, so damage to it would go unnoticed",
            verdict.intact,
            MANIFEST,
        )


def checkpoint_damage(checkpoint: Path) -> list[Damage]:
    """What is wrong with a training checkpoint; this process verifies all files."""
    return incompleteness(checkpoint) or find_damage(checkpoint)


def incompleteness(checkpoint: Path) -> list[Damage]:
    """What is wrong with a checkpoint before any content is verified: files, or their checksums, are missing.

    Earlier versions wrote checkpoints without checksums. The version in ``training.json`` distinguishes these from a
    checkpoint that lost its checksums. They are used as they are, and read by the same unpicklers, which run no code.

    Raises:
        UserError: a file exists and cannot be read; ``TransientError`` where that may pass.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedManifest:
        return []  # ``find_damage`` reports it.
    if manifest is not None:
        return [Damage(name, f"not in {MANIFEST}") for name in REQUIRED_FILES if name not in manifest]
    try:
        missing = [Damage(name, "missing") for name in REQUIRED_FILES if not (checkpoint / name).is_file()]
        if missing or _is_without_checksums(checkpoint / TRAINING_FILE):
            return missing
    except OSError as error:
        raise unreadable(error.filename or checkpoint, error) from error
    return [Damage(MANIFEST, "missing")]


def _is_without_checksums(training_file: Path) -> bool:
    """Raises ``OSError`` if the file cannot be read."""
    try:
        return int(json.loads(training_file.read_bytes()).get("version", 1)) < 2
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def require_intact_checkpoint(directory: Path, *, option: str) -> None:
    """Verifies a distributed checkpoint, of a training or converted, before anything of it is used.

    Raises:
        UserError: a file differs from what was written; the message, of one line, names the first such file.
    """
    is_training = (directory / TRAINING_FILE).exists()
    if damage := checkpoint_damage(directory) if is_training else find_damage(directory):
        raise UserError(damage_line(directory, damage, option=option))
    if not (directory / MANIFEST).exists() and (directory / "metadata.json").exists():
        _log.warning("%s has no checksums (%s): damage to it would go unnoticed", directory, MANIFEST)


def unused_path(path: Path) -> Path:
    """``path`` if it does not exist, else the first of name_2, name_3, ... that does not."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return unused


def rename_path(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as error:
        raise UserError(f"--run-dir: cannot rename {path} to {target}: {error.strerror}") from error
