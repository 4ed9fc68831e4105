"""Damage of files on disk, drawn from a random generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

KINDS = ("flip a bit", "flip 40 bytes", "cut", "empty", "delete", "swap", "append")


def damage_file(path: Path, rng: random.Random, *, kinds: Sequence[str] = KINDS, others: Sequence[Path] = ()) -> str:
    """Damages ``path``; "swap" exchanges it with another of ``others`` that has other content. Returns the kind."""
    content = path.read_bytes()
    different = [one for one in others if one.read_bytes() != content]
    kind = rng.choice([one for one in kinds if one != "swap" or different])
    place = rng.randrange(len(content)) if content else 0
    if kind in ("flip a bit", "flip 40 bytes"):
        length, mask = (1, 1 << rng.randrange(8)) if kind == "flip a bit" else (40, 0xFF)
        flipped = bytes(byte ^ mask for byte in content[place : place + length])
        path.write_bytes(content[:place] + flipped + content[place + length :])
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "append":
        path.write_bytes(content + b"\0")
    elif kind == "delete":
        path.unlink()
    else:
        other = rng.choice(different)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return kind


def damage_checkpoint(directory: Path, rng: random.Random) -> str:
    """Damages one file of a checkpoint or export, or swaps two."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return damage_file(rng.choice(files), rng, others=files)
