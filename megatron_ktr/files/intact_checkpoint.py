"""Which checkpoint a run goes on from: the newest one whose files are what was written.

Newer ones that are not are set aside, ``step_00000030`` as ``damaged_step_00000030``: nothing is deleted, and the next
start does not find them again. Where none is intact nothing is touched and nothing starts: weeks of work may be in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, damage_line, find_damage, read_manifest

_log = logging.getLogger(__name__)

TRAINING_FILE, CONFIG_FILE = "training.json", "config.yaml"
REQUIRED_FILES = ("metadata.json", ".metadata", TRAINING_FILE, CONFIG_FILE)
FORMAT_VERSION = 2
"""In ``training.json``. 1, or none: checkpoints without checksums, their random states pickled."""

Verify = Callable[[Path], list[Damage]]
"""What is wrong with a checkpoint; [] if nothing is."""


@dataclass(frozen=True)
class Verdict:
    """On the checkpoints of a run, newest first, up to the first intact one."""

    intact: Path | None
    damaged: tuple[tuple[Path, Damage], ...]
    """Newer ones, and the first thing that is wrong with each."""


def newest_intact(checkpoints: Sequence[Path], *, verify: Verify) -> Verdict:
    """``checkpoints`` oldest first.

    Raises:
        UserError: there are some and none is intact; it names each with its damage.
    """
    damaged: list[tuple[Path, Damage]] = []
    for path in reversed(checkpoints):
        found = verify(path)
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
    """Renames the damaged ones and says, in a line each, why and where the run goes on."""
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
    """What is wrong with a checkpoint of a training, all files verified by this process."""
    return incompleteness(checkpoint) or find_damage(checkpoint)


def incompleteness(checkpoint: Path) -> list[Damage]:
    """What is wrong before any content is verified: files that are missing, checksums among them.

    Checkpoints of versions that wrote no checksums have none; their ``training.json`` tells them from one that lost
    them. They are used as they are (and read by the same unpicklers that run no code).
    """
    try:
        manifest = read_manifest(checkpoint)
    except (DamagedManifest, OSError):
        return []  # ``find_damage`` says what is wrong with it.
    if manifest is not None:
        return [Damage(name, f"not in {MANIFEST}") for name in REQUIRED_FILES if name not in manifest]
    missing = [Damage(name, "missing") for name in REQUIRED_FILES if not (checkpoint / name).is_file()]
    if missing or _is_without_checksums(checkpoint / TRAINING_FILE):
        return missing
    return [Damage(MANIFEST, "missing")]


def _is_without_checksums(training_file: Path) -> bool:
    try:
        return int(json.loads(training_file.read_bytes()).get("version", 1)) < 2
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def require_intact_checkpoint(directory: Path, *, option: str) -> None:
    """Before anything of a distributed checkpoint is used, be it a training's or a converted one.

    Raises:
        UserError: one line that names the first file that is not what was written.
    """
    is_training = (directory / TRAINING_FILE).exists()
    if damage := checkpoint_damage(directory) if is_training else find_damage(directory):
        raise UserError(damage_line(directory, damage, option=option))
    if not (directory / MANIFEST).exists() and (directory / "metadata.json").exists():
        _log.warning("%s has no checksums (%s): damage to it would go unnoticed", directory, MANIFEST)


def unused_path(path: Path) -> Path:
    """``path``, or where that exists the first of name_2, name_3, ... that does not."""
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
