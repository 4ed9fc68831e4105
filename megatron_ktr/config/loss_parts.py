"""The advantages and the ratios that exist, and where they are found. Importing this module imports no torch.

A new one is one file in ``objectives/advantages/`` or ``objectives/surrogates/`` and one line here. The file has a
function ``build(section)``, which makes the part from the objective section.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection

_ADVANTAGES, _SURROGATES = "megatron_ktr.objectives.advantages", "megatron_ktr.objectives.surrogates"
ADVANTAGES: dict[str, str] = {
    "group": f"{_ADVANTAGES}.group:build",
    "group_mean": f"{_ADVANTAGES}.group_mean:build",
    "leave_one_out": f"{_ADVANTAGES}.leave_one_out:build",
    "batch": f"{_ADVANTAGES}.batch:build",
    "batch_baseline": f"{_ADVANTAGES}.batch:build_with_group_baseline",
}
"""Value of ``--advantage`` -> module:function."""
RATIOS: dict[str, str] = {
    "token": f"{_SURROGATES}.clipped:build",
    "sequence": f"{_SURROGATES}.sequence:build",
    "sequence_token": f"{_SURROGATES}.sequence:build_by_token",
    "cispo": f"{_SURROGATES}.cispo:build",
}
"""Value of ``--ratio`` -> module:function of the surrogate."""


def advantage_names() -> tuple[str, ...]:
    return tuple(ADVANTAGES)


def ratio_names() -> tuple[str, ...]:
    return tuple(RATIOS)


def build_part(places: Mapping[str, str], name: str, section: ObjectiveSection) -> Any:
    """The part called ``name`` with the options of ``section``; imports its file if that has not happened yet."""
    module, _, function = places[name].partition(":")
    return getattr(importlib.import_module(module), function)(section)
