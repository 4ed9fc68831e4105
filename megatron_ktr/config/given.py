"""What rules between options ask of an option: its flag, and whether the run gives it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ktr.config.objective_registry import objective_entry


def flag(name: str) -> str:
    """``video_max_frames`` as ``--video-max-frames``."""
    return f"--{name.replace('_', '-')}"


def is_given(section: Any, name: str, *, objective: str) -> bool:
    """Whether an option of ``section`` differs from its value where the user gives none: the value that ``objective``
    sets, or else the option's own default."""
    own = type(section).__dataclass_fields__[name].default
    return getattr(section, name) != objective_entry(objective).defaults.get(name, own)


def given(section: Any, names: Iterable[str], *, objective: str) -> list[str]:
    """Those of ``names`` that are given."""
    return [name for name in names if is_given(section, name, objective=objective)]
